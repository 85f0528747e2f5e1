"""The train step: a golden, accumulation, errors that stop it, and the tokens in its loss."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import Hybrid, MetaTokens
from metajax.core.fields import override
from metajax.data.pipeline import open_corpora, training_batches
from metajax.training.losses import token_scores
from metajax.training.program import Program
from metajax.training.state import from_arrays, to_arrays

# Loss and gradient norm of the first three steps of `tiny_config`. When the maths is meant to change, put in what the
# assertion prints; when it is not, this test has found a mistake.
GOLDEN = {"loss": [5.760996, 5.741292, 5.688215], "grad_norm": [0.7030727, 0.9709897, 1.152962]}


def prepare(config, paths, devices=None):
    corpora = open_corpora(config, paths)
    program = Program.build(config, corpora.tokenizer.vocabulary.size, devices or jax.devices()[:1])
    return program, training_batches(corpora)


def run(config, paths, steps):
    program, batches = prepare(config, paths)
    state = program.create_state()
    step_fn, metrics = program.compile_step(state, program.put(batches[0])), []
    for n in range(steps):
        state, values = step_fn(state, program.put(batches[n]))
        metrics.append({k: v.item() for k, v in jax.device_get(values).items()})
    return state, metrics


def test_a_hybrid_model_learns(tiny_config, paths):
    mixers = Hybrid(prefix_tokens=4, full_layers=(0,), kv_groups=(1, 2), state=4)
    fields = {"model.hybrid": mixers, "model.layers": 3, "model.window": 8, "model.norm": "rmsnorm", "model.init_std": 0.1}
    config = tiny_config(
        **fields, **{"runtime.unroll": 1, "runtime.implementation": "reference", "optimizer.learning_rate": 0.02}
    )
    program, batches = prepare(config, paths)
    state = program.create_state()
    before = jax.device_get(to_arrays(state.model))
    batch = program.put(batches[0])
    step_fn, losses = program.compile_step(state, batch), []
    for _ in range(6):
        state, values = step_fn(state, batch)
        losses.append(float(values["loss"]))
    assert losses[-1] < losses[0] - 0.5 and all(np.isfinite(losses))
    assert all(np.any(np.asarray(value) != before[name]) for name, value in to_arrays(state.model).items())


def test_golden_step(tiny_config, paths):
    _, metrics = run(tiny_config(), paths, 3)
    for name, expected in GOLDEN.items():
        np.testing.assert_allclose([m[name] for m in metrics], expected, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("meta", [None, MetaTokens(), MetaTokens(inject="none", rate=0, attention="causal")])
def test_accumulation_equals_the_whole_batch(tiny_config, paths, meta):
    whole = tiny_config(meta_tokens=meta)
    (one, first), (four, second) = (run(override(whole, {"training.accumulation_steps": n}), paths, 3) for n in (1, 4))
    np.testing.assert_allclose([m["loss"] for m in first], [m["loss"] for m in second], rtol=1e-6)
    np.testing.assert_allclose([m["grad_norm"] for m in first], [m["grad_norm"] for m in second], rtol=1e-5)
    for path, value in to_arrays(one.model).items():
        np.testing.assert_allclose(value, to_arrays(four.model)[path], atol=2e-5, err_msg=path)


def test_loss_is_the_weighted_mean_over_the_whole_batch(tiny_config, paths):
    config = tiny_config()
    program, batches = prepare(config, paths)
    state, batch = program.create_state(), batches[0]
    batch = batch | {
        "loss_weights": batch["loss_weights"] * np.linspace(0, 1, batch["tokens"].size, dtype=np.float32).reshape(4, -1)
    }
    nll = token_scores(state.model, program.put(batch)).nll
    expected = float((nll * batch["loss_weights"]).sum() / batch["loss_weights"].sum())
    on_device = program.put(batch)
    _, metrics = program.compile_step(state, on_device)(state, on_device)
    assert abs(float(metrics["loss"]) - expected) < 1e-5


def test_a_step_that_is_not_finite_changes_nothing_and_halts(tiny_config, paths):
    program, batches = prepare(tiny_config(), paths)
    state = program.create_state()
    broken = to_arrays(state.model)
    broken["embedding"] = broken["embedding"].at[:, 0].set(jnp.inf)
    state = state.replace(model=from_arrays(state.model, broken, "the test"))
    before = {k: np.asarray(v) for k, v in to_arrays((state.model, state.opt_state)).items()}
    step_fn = program.compile_step(state, program.put(batches[0]))
    state, metrics = step_fn(state, program.put(batches[0]))
    assert not metrics["finite"] and state.halted and state.step == 0
    healed = to_arrays(state.model) | {"embedding": jnp.zeros_like(broken["embedding"])}
    state = state.replace(model=from_arrays(state.model, healed, "the test"))
    state, metrics = step_fn(state, program.put(batches[1]))
    assert metrics["finite"] and state.step == 0, "a halted state stays halted, so that the host can still read it"
    after = to_arrays((state.model, state.opt_state))
    for path in before:
        if not path.endswith("embedding"):
            np.testing.assert_array_equal(before[path], after[path], err_msg=path)


def test_bfloat16_compute_keeps_float32_parameters(tiny_config, paths):
    config = override(tiny_config(), {"model.compute_dtype": "bfloat16"})
    state, metrics = run(config, paths, 3)
    _, reference = run(tiny_config(), paths, 3)
    assert {v.dtype for v in jax.tree.leaves(state.model)} == {jnp.dtype("float32")}
    for ours, theirs in zip(metrics, reference, strict=True):
        assert ours["loss"] != theirs["loss"]
        assert abs(ours["loss"] - theirs["loss"]) < 0.02 * theirs["loss"]


def test_the_step_compiles_once(tiny_config, paths):
    """An ahead-of-time compiled step refuses other shapes instead of compiling again."""
    program, batches = prepare(tiny_config(), paths)
    state = program.create_state()
    step_fn = program.compile_step(state, program.put(batches[0]))
    with pytest.raises(TypeError, match="compiled with"):
        step_fn(state, jax.tree.map(lambda x: x[:, :-1], program.put(batches[0])))


def test_remat_and_unroll_do_not_change_the_step(tiny_config, paths):
    reference = run(tiny_config(), paths, 2)[1]
    for changes in ({"remat": "full"}, {"remat": "dots", "unroll": 1}, {"unroll": 1}):
        config = tiny_config()
        metrics = run(replace(config, runtime=replace(config.runtime, **changes)), paths, 2)[1]
        np.testing.assert_allclose([m["loss"] for m in metrics], [m["loss"] for m in reference], rtol=1e-6)
