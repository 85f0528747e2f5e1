"""Analyses of hybrid models: maps compared with the layers' outputs, branches that are really off, needles at their depths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import entr

from metajax.analysis import analysis
from metajax.analysis.branches import without_branch
from metajax.analysis.common.study import TEXT, capture, open_study
from metajax.analysis.mixing_maps import describe, ssm_map, ssm_maps, ssm_rates
from metajax.analysis.needle import depth_of, needle
from metajax.analysis.overhead import twins
from metajax.config import Hybrid, Tasks
from metajax.core.errors import UserError
from metajax.data.pipeline import open_corpora
from metajax.training.program import Program, abstract_model

METAS, LENGTH = 3, 24
HYBRID = Hybrid(prefix_tokens=METAS, full_layers=(0,), kv_groups=(1, 2), state=4)
TASKS = Tasks(names=("needle",), train_length=48, eval_lengths=(32,), eval_examples=12)
RUN = {"tasks": TASKS, "data.tokenizer": "bpe:512+tasks", "data.sequence_length": 64, "evaluation.documents": 0}
RUN |= {"model.layers": 3, "model.window": 6, "model.norm": "rmsnorm", "model.hybrid": HYBRID, "runtime.unroll": 1}


@pytest.fixture(scope="module")
def opened(tiny_config, paths):
    config = tiny_config(**RUN)
    corpora = open_corpora(config, paths)
    program = Program.build(config, corpora.tokenizer.vocabulary.size, jax.devices()[:1])
    return program, corpora, jax.tree.map(lambda x: 2 * x, program.create_state().model)


@pytest.fixture(scope="module")
def text(opened):
    return open_study(*opened, task=TEXT, length=LENGTH, prompts=4)


def test_a_map_of_mamba_equals_its_recurrence():
    """With keys that are all positive the map's rows, before they are scaled to 1, sum the recurrence's answer to an input of ones."""
    keys = jax.random.split(jax.random.key(0), 3)
    steps, b, c = (
        jax.nn.softplus(jax.random.normal(k, shape)) for k, shape in zip(keys, ((2, 9), (2, 9, 4), (2, 9, 4)), strict=True)
    )
    rates = -jnp.arange(1.0, 5.0)
    made = ssm_map(steps, b, c, rates)
    np.testing.assert_allclose(made.sum(-1), 1, rtol=1e-6)
    assert not np.triu(np.asarray(made[0]), 1).any()
    for source in range(9):
        h, answers = np.zeros((2, 4)), []
        for t in range(9):
            h = np.exp(steps[:, t, None] * rates) * h + (t == source) * steps[:, t, None] * b[:, t]
            answers.append((h * c[:, t]).sum(-1))
        if source == 0:
            total = 0
        total = total + np.stack(answers, 1)
        one = np.stack(answers, 1)
        np.testing.assert_allclose(made[:, :, source] * _row_sums(steps, b, c, rates), one, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(total, _row_sums(steps, b, c, rates), rtol=2e-5)


def _row_sums(steps, b, c, rates):
    h, sums = np.zeros((2, 4)), []
    for t in range(9):
        h = np.exp(steps[:, t, None] * rates) * h + steps[:, t, None] * b[:, t]
        sums.append((h * c[:, t]).sum(-1))
    return np.stack(sums, 1)


def test_maps_have_meta_tokens_first_and_every_layers_rates(opened, text):
    model = opened[2]
    batch = {name: jnp.asarray(value) for name, value in text.rows.items()}
    maps = np.asarray(jax.jit(ssm_maps)(model, batch))
    assert maps.shape[:2] == (4, 3) and maps.shape[3:] == (LENGTH, METAS + LENGTH)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    rates = ssm_rates(model)
    last = model.blocks[1][1].mixer.mamba.A_log[...]
    np.testing.assert_allclose(rates[2], -np.exp(last[0]))


def test_shares_entropy_and_reach_by_hand():
    maps = jax.random.dirichlet(jax.random.key(1), jnp.ones(7), (3, 2, 2, 5))  # rows, layers, heads, queries; 2 metas, 5 tokens
    found = {name: np.asarray(value) for name, value in describe(maps).items()}
    maps = np.asarray(maps)
    assert found["meta"].shape == (3, 2)
    np.testing.assert_allclose(found["meta"][1, 0], maps[1, 0, :, 1:, :2].sum(-1).mean(), rtol=1e-6)
    np.testing.assert_allclose(found["first"][1, 0], maps[1, 0, :, 1:, 2].mean(), rtol=1e-6)
    np.testing.assert_allclose(found["self"][1, 0], np.mean([maps[1, 0, :, i, 2 + i] for i in range(1, 5)]), rtol=1e-6)
    np.testing.assert_allclose(sum(found[name] for name in ("meta", "first", "self", "cross")), 1, rtol=1e-6)
    np.testing.assert_allclose(found["entropy"][1, 0], entr(maps[1, 0, :, 1:]).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["reach"][1, 0], (maps[1, 0, :, 4, 2:] * [4, 3, 2, 1, 0]).sum(-1).mean(), rtol=1e-5)


mixer_out = jax.jit(lambda model, batch: capture(model, batch, "mixer_out")["mixer_out"])


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("branch", ["attention", "ssm"])
def test_a_branch_that_is_off_adds_nothing(opened, text, layer, branch):
    model = opened[2]
    batch = {name: jnp.asarray(value) for name, value in text.rows.items()}
    before = jax.tree.map(np.asarray, model)
    off = without_branch(model, layer, branch)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, model))
    own, same = (np.asarray(mixer_out(m, batch)) for m in (model, off))
    np.testing.assert_array_equal(own[:, :layer], same[:, :layer])
    assert np.abs(own[:, layer] - same[:, layer]).max() > 1e-4
    both = without_branch(off, layer, {"attention": "ssm", "ssm": "attention"}[branch])
    assert not np.asarray(mixer_out(both, batch))[:, layer].any()


def test_needles_are_at_the_stated_depth(opened):
    assert depth_of(np.array([5, 7, 9, 7]), 3, 7) == 1 / 3
    found = needle.measure(open_study(*opened, task="needle", prompts=2))
    assert found.keys() == {"32"} and all(n["n"] == 12 == sum(cell["n"] for cell in n["depths"]) for n in found.values())


def test_numbers_words_and_figures(opened, text, tmp_path):
    assert analysis.fitting(text) == ("branches", "mixing_maps", "overhead")
    study = open_study(*opened, prompts=4)
    assert analysis.fitting(study) == ("branches", "mixing_maps", "needle", "overhead") and study.task == "needle"
    list(analysis.run(study, analysis.fitting(study)[:3], tmp_path))
    for section in analysis.sections(tmp_path):
        assert section["lines"] and all("nan" not in line for line in section["lines"])
        assert section["figures"] and all(svg.startswith("<svg") for svg, _ in section["figures"])
    with pytest.raises(UserError, match=r"sharpening: .* this run has none"):
        list(analysis.run(text, ("sharpening",), tmp_path))
    with pytest.raises(UserError, match="validation documents of 500 tokens"):
        open_study(*opened, task=TEXT, length=500)


def test_attention_alone_can_have_as_many_parameters_as_the_hybrid(opened):
    program, corpora, _ = opened
    size = corpora.tokenizer.vocabulary.size
    count = {n: sum(x.size for x in jax.tree.leaves(abstract_model(c, size))) for n, c in twins(program.config, size).items()}
    layers, width = program.config.model.layers, program.config.model.width
    assert abs(count["attention_as_large"] - count["whole"]) <= 3 * layers * width / 2  # one more column of each network
    assert max(count["attention"], count["ssm"]) < count["block"] < count["whole"]
