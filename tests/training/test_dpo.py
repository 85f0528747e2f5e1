"""Learning from preferences: the loss and its gradient by hand, rows of pairs, whole runs, and records without a pair."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import Dpo, Hybrid, Metadata, MetaTokens, config_hash
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.data.pipeline import Paths, open_corpora, training_batches, training_rows
from metajax.experiment import open_task, run_experiment
from metajax.models.flops import step_flops
from metajax.reporting.rows import spans
from metajax.runs.files import read_lines
from metajax.training import trainer
from metajax.training.losses import apply_model
from metajax.training.objectives.dpo import preference_sums
from metajax.training.program import Program
from metajax.training.replay import replay
from metajax.training.state import to_arrays

SCANNED = {"runtime.unroll": 1, "runtime.implementation": "reference"}
MODELS = {
    "gpt": {"model.position": "learned", "model.bias": True},
    "llama": {"model.norm": "rmsnorm", "model.activation": "swiglu", "model.kv_heads": 1, "model.tied": False},
    "hymba": {"model.hybrid": Hybrid(prefix_tokens=3, state=4), "model.window": 8, "model.norm": "rmsnorm", **SCANNED},
}


def records(count=60):
    """Pairs whose chosen answer is the prompt's word and whose rejected answer is that word reversed."""
    rng = np.random.default_rng(7)
    drawn = ("".join(rng.choice(list("abcdefgh"), int(rng.integers(2, 7)))) + "z" for _ in range(2 * count))
    words = list(dict.fromkeys(drawn))[:count]
    return [{"prompt": f"{w}? ", "chosen": w, "rejected": w[::-1], "id": str(n)} for n, w in enumerate(words)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records())


def pairs_fields(path):
    """Fine-tuning on the chosen answers of a file, after their prompts."""
    data = {"data.sources": (f"jsonl:{path}?text=chosen&origin=id",), "data.sequence_length": 96}
    evaluation = {"evaluation.conditions": ("right",), "evaluation.sample_tokens": 0}
    return {**data, **evaluation, "metadata": Metadata(template="{prompt}", wrap="plain", keep=1.0)}


@pytest.fixture
def dpo_config(tiny_config, pairs):
    """dpo_config(**changes) -> Config of pairs after their prompts, on the reference `parent`."""
    base = {**pairs_fields(pairs), "init.from": "parent", "dpo": Dpo(beta=0.3)}
    return lambda **changes: tiny_config(**(base | changes))


def prepare(config, paths):
    corpora = open_corpora(config, paths)
    program = Program.build(config, corpora.tokenizer.vocabulary.size, jax.devices()[:1])
    return corpora, program, program.create_state().model


def alone(corpora, batch):
    """(a row for each answer of a batch's pairs, chosen and rejected in turn; its targets; their positions)."""
    known, vocabulary = {row["chosen"]: row for row in records()}, corpora.tokenizer.vocabulary
    found = []
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for chosen in range(1, segments.max(), 2):
            text = corpora.tokenizer.decode(tokens[segments == chosen][1:].tolist())
            found.append(known[text.partition("? ")[2]])
    assert len({row["id"] for row in found}) == len(found) > len(batch["tokens"]), "several pairs to a row"
    shape = (2 * len(found), 24)
    tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    answered = np.zeros(shape, bool)
    for n, (prompt, answer) in enumerate((row["prompt"], row[side]) for row in found for side in ("chosen", "rejected")):
        ids = [vocabulary.bos, *prompt.encode(), *answer.encode(), vocabulary.eos]
        positions = len(ids) - 1
        tokens[n, :positions], targets[n, :positions], segments[n, :positions] = ids[:-1], ids[1:], 1
        answered[n, len(prompt) : positions] = True
    positions = np.tile(np.arange(24, dtype=np.int32), (len(tokens), 1))
    return (
        {name: jnp.asarray(v) for name, v in (("tokens", tokens), ("positions", positions), ("segment_ids", segments))},
        targets,
        answered,
    )


def test_the_loss_is_the_papers_in_float64():
    rng = np.random.default_rng(2)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 0], [1, 1, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0], [0] * 12])
    nll, reference = rng.gamma(2.0, 2.0, (2, 3, 12)).astype(np.float32)
    weights, beta = (rng.random((3, 12)) < 0.7).astype(np.float32), 0.3
    total, parts = preference_sums(*map(jnp.asarray, (nll, reference, weights, segments)), beta)
    losses, margins, rewards = [], [], []
    for row, pair in ((0, 1), (0, 3), (1, 1)):
        policy, held = (
            [-(weights[row] * values[row])[segments[row] == s].sum(dtype=np.float64) for s in (pair, pair + 1)]
            for values in (nll, reference)
        )
        margin = beta * ((policy[0] - held[0]) - (policy[1] - held[1]))
        margins.append(margin)
        losses.append(np.log1p(np.exp(-margin)))
        rewards.append(beta * (policy[0] - held[0]))
    assert min(margins) < 0 < max(margins), "both signs are met"
    expected = {"pairs": 3, "margin": sum(margins), "accuracy": np.sum(np.array(margins) > 0), "chosen_reward": sum(rewards)}
    assert abs(float(total) - sum(losses)) < 1e-5
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_at_the_reference_is_that_of_the_difference(dpo_config, paths, kind):
    """Policy = reference: loss log 2, gradient -beta/2 of the mean difference of log p, the pairs packed or each answer alone."""
    config = dpo_config(**MODELS[kind], **{"optimizer.clip_norm": 0.0, "optimizer.weight_decay": 0.0})
    corpora, program, model = prepare(config, paths)
    batch = training_batches(corpora)[0]

    rows, targets, answered = alone(corpora, batch)

    def difference(model):
        log_p = jnp.take_along_axis(jax.nn.log_softmax(apply_model(model, rows)), targets[..., None], axis=-1)[..., 0]
        sums = jnp.sum(jnp.where(answered, log_p, 0.0), axis=1)
        return jnp.mean(sums[::2] - sums[1::2])

    expected = to_arrays(jax.jit(jax.grad(difference))(model))
    state, on_device = program.create_state(), program.put(batch)
    after, metrics = jax.jit(program.step)(state, on_device, model)
    assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-6) and abs(float(metrics["margin"])) < 1e-5
    moments = to_arrays(after.opt_state)
    b1 = config.optimizer.betas[0]
    scale = max(float(jnp.abs(value).max()) for value in expected.values())
    for name, value in expected.items():
        [first] = [moment for path, moment in moments.items() if path.endswith(f"mu/{name}")]
        np.testing.assert_allclose(first / (1 - b1), -0.3 / 2 * value, atol=1e-5 * scale, err_msg=name)


def test_accumulation_equals_the_whole_batch(dpo_config, paths):
    steps = {}
    for pieces in (1, 4):
        config = dpo_config(**{"training.accumulation_steps": pieces})
        corpora, program, model = prepare(config, paths)
        batch, reference = program.put(training_batches(corpora)[0]), jax.tree.map(lambda x: x * 1.5, model)
        state = program.create_state()
        _, metrics = program.compile_step(state, batch)(state, batch, reference)
        steps[pieces] = {name: float(value) for name, value in metrics.items()}
    assert steps[4] == pytest.approx(steps[1], rel=1e-5) and steps[1]["margin"] != 0


def test_rows_hold_whole_pairs_after_their_prompts(dpo_config, paths):
    """Every training record once in an epoch; bits per byte counts the chosen answers, the loss both."""
    corpora = open_corpora(dpo_config(), paths)
    [cache], rows, seen = corpora.caches, training_rows(corpora), []
    train, n = len(cache.documents("train", 0.2)), 0
    while len(seen) < train:
        row = rows[n]
        shown = [(run.asked, str(run.text)) for run in spans(row, corpora.tokenizer)]
        for segment in range(1, row["segment_ids"].max(), 2):
            chosen, rejected = (
                corpora.tokenizer.decode(row["tokens"][row["segment_ids"] == s][1:].tolist()).split("? ")
                for s in (segment, segment + 1)
            )
            assert chosen[0] == chosen[1] == rejected[0] == rejected[1][::-1]
            assert ("body", chosen[1][:-1]) in shown and ("rejected", rejected[1][:-1]) in shown, (
                "the last letter predicts the end"
            )
            seen.append(chosen[0])
        n += 1
    assert len(set(seen)) == len(seen) == train


@pytest.fixture(scope="module")
def parent(tmp_path_factory, tiny_config, pairs):
    """A folder of runs with `parent`, on the same documents and prompts."""
    home = tmp_path_factory.mktemp("parents")
    run_experiment(
        tiny_config(**pairs_fields(pairs), **{"training.steps": 1}), home / "parent", Paths(cache=home / "cache", runs=home)
    )
    return home


@pytest.fixture
def here(parent, tmp_path):
    """Paths of a folder of runs where `parent` is."""
    shutil.copytree(parent / "parent", tmp_path / "parent")
    return Paths(cache=parent / "cache", runs=tmp_path)


def test_a_run_raises_the_margin_and_resumes_with_the_same_numbers(dpo_config, here, monkeypatch):
    config = dpo_config(**{"training.steps": 12, "optimizer.learning_rate": 0.01, "runtime.save_every": 5})
    whole = run_experiment(config, here.runs / "whole", here)
    curve = read_lines(here.runs / "whole" / "metrics.jsonl")
    assert curve[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and curve[-1]["margin"] > 0.1
    assert whole["eval"]["preferences"]["pairs"] == 5 and whole["eval"]["right"]["bpb"] > 0
    assert "5 validation pairs" in (here.runs / "whole" / "report.html").read_text()

    original = trainer.Trainer._log

    def log(self, step, *rest):
        original(self, step, *rest)
        if step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "_log", log)
        run_experiment(config, here.runs / "cut", here)
    resumed = run_experiment(config, here.runs / "cut", here)
    assert resumed["restarted_from"] == 5 and read_lines(here.runs / "cut" / "metrics.jsonl") == curve
    for name in ("eval", "counts"):
        assert resumed[name] == whole[name], name

    (here.runs / "cut" / "report.json").unlink()
    parent = here.runs / "parent"
    (parent / "checkpoints" / "5").mkdir()  # being written: not a checkpoint yet
    assert run_experiment(config, here.runs / "cut", here)["eval"] == whole["eval"]
    (here.runs / "cut" / "report.json").unlink()
    shutil.copytree(parent / "checkpoints" / "1", parent / "checkpoints" / "9")
    shutil.copy(parent / "hashes" / "1-p0.json", parent / "hashes" / "9-p0.json")
    with pytest.raises(
        UserError, match=r"init\.from = parent has trained further, and the reference with it: step 9 now, 1 when"
    ):
        run_experiment(config, here.runs / "cut", here)


def test_a_replay_bundle_has_the_reference(dpo_config, here):
    config = dpo_config(**{"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0})
    with pytest.raises(trainer.NonFinite):
        run_experiment(config, here.runs / "run", here)
    [bundle] = (here.runs / "run").glob("replay-step-*")
    assert not replay(bundle, open_task(config, here).program)["finite"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": None}, "no rejected answer ('rejected')"),
        ({"rejected": ""}, "no rejected answer ('rejected')"),
        ({"chosen": ""}, "no chosen answer"),
        ({"prompt": None}, "no prompt (metadata.template)"),
        (
            {"rejected": "z" * 200},
            "its two answers with their prompts take more than the 96 positions of a row (data.sequence_length)",
        ),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_record_that_makes_no_pair_is_named(dpo_config, paths, tmp_path, changes, message, split):
    """Also for validation records, before training."""
    rows = records(40)
    path = write(tmp_path / "pairs.jsonl", rows)
    config = dpo_config(**{"data.sources": (f"jsonl:{path}?text=chosen&origin=id",), "evaluation.documents": 40})
    [cache] = open_corpora(config, paths).caches
    bad = int(cache.documents(split, 0.2)[2])
    rows[bad] = {k: v for k, v in (rows[bad] | changes).items() if v is not None}
    write(path, rows)
    with pytest.raises(UserError) as error:
        run_experiment(config, tmp_path / "run", paths)
    count = len(cache.documents(split, 0.2))
    assert str(error.value) == f"{path}, line {bad + 1}: {message}; so are 1 of {count} records"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_numbers_of_documents_count_only_good_records(dpo_config, paths, tmp_path):
    rows = records(40)
    lines = [json.dumps(row) for row in rows]
    lines[3] = "{"
    lines[30] = json.dumps(rows[30] | {"rejected": ""})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(lines))
    source = f"jsonl:{path}?text=chosen&origin=id"
    config = dpo_config(**{"data.sources": (source,), "data.on_bad_record": "skip", "evaluation.documents": 40})
    with pytest.raises(UserError, match=rf"{path}, line 61: no rejected answer"):
        run_experiment(config, tmp_path / "run", paths)


@pytest.mark.fault(30)
def test_pairs_are_read_like_other_corpora(dpo_config, paths, tmp_path):
    """Separators of Unicode and a byte order mark, and the rejected answer in a column whose name a template has to quote."""
    rows = [{("og:no" if k == "rejected" else k): v for k, v in row.items()} for row in records(40)]
    rows[3]["og:no"] += "\u2028\x85"
    (tmp_path / "pairs.jsonl").write_text(
        "\ufeff\n" + "\n \n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8"
    )
    config = dpo_config(**{"data.sources": (f"jsonl:{tmp_path}/pairs.jsonl?text=chosen&origin=id",), "dpo.rejected": "og:no"})
    corpora = open_corpora(config, paths)
    assert len(corpora.caches[0]) == 40
    training_batches(corpora)[0]


def test_a_missing_column_is_named(dpo_config, paths):
    corpora = open_corpora(dpo_config(**{"dpo.rejected": "rejeted"}), paths)
    with pytest.raises(UserError, match=r"dpo\.rejected = 'rejeted': jsonl:.* has no such column; did you mean 'rejected'"):
        training_batches(corpora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init.from": ""}, "init.from has to be a whole run"),
        ({"init.from": "parent?blocks"}, "init.from has to be a whole run"),
        ({"metadata.keep": 0.9}, "metadata has to be the prompt"),
        ({"metadata.position": "append"}, "metadata has to be the prompt"),
        ({"data.attend_across_documents": True}, "data.attend_across_documents has to be false"),
        ({"data.switch": {"step": 2, "metadata": "none"}}, "data.switch.metadata has to be same"),
        ({"optimizer.z_loss": 0.1}, "optimizer.z_loss has to be 0"),
        ({"dpo.beta": 0}, "dpo.beta = 0"),
    ],
)
def test_configs_that_make_no_pairs_are_refused(dpo_config, changes, message):
    with pytest.raises(UserError, match=message):
        dpo_config(**changes)


def test_runs_without_dpo_keep_their_hash_and_the_reference_costs_a_pass(tiny_config, dpo_config, paths):
    assert config_hash(tiny_config()) == config_hash(tiny_config(dpo=None)) != config_hash(dpo_config())
    config = dpo_config(meta_tokens=MetaTokens())
    batch = training_batches(open_corpora(config, paths))[0]
    without = override(config, {"dpo": None})
    assert 3 * step_flops(config, 300, batch) == 4 * step_flops(without, 300, batch)
