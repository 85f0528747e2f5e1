"""Schedules, and twelve AdamW steps that equal nanoGPT's in every number."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from metajax.config import Config, Data, Hybrid, MetaTokens, Optimizer, Training
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.distributed.rules import param_shardings
from metajax.experiment import run_experiment
from metajax.models.lm import decay_mask
from metajax.models.presets import gpt2
from metajax.runs.files import read_lines
from metajax.training.objectives import objectives
from metajax.training.optimizers import make_optimizer, schedule
from metajax.training.program import Program
from metajax.training.state import State, to_arrays
from metajax.training.step import train_step
from tests.gpt2_weights import from_gpt2, to_gpt2

GOLDENS = Path(__file__).parents[1] / "goldens"


def test_cosine_meets_the_gpt2_recipe():
    golden = np.load(GOLDENS / "nanogpt_a.npz")
    recipe = Optimizer(learning_rate=6e-4, final_fraction=0.1, warmup_steps=2000, horizon=600_000)
    rates = [float(schedule(recipe, 200_000)(step)) for step in golden["lr_iters"]]
    np.testing.assert_allclose(rates, golden["lr_values_gpt2_recipe"], rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1 - 0.9 * 4 / 9, 0.1, 0.1]),
        ("wsd", [0.5, 1.0, 1.0, 0.1, 0.1]),
        ("cosine", [0.5, 1.0, 0.1 + 0.45 * (1 + np.cos(np.pi * 4 / 9)), 0.1, 0.1]),
    ],
)
def test_schedules_by_hand(name, expected):
    optimizer = Optimizer(learning_rate=1.0, final_fraction=0.1, warmup_steps=1, schedule=name, decay_share=0.2)
    rate = schedule(optimizer, 10)
    np.testing.assert_allclose([float(rate(s)) for s in (0, 1, 5, 10, 50)], expected, rtol=1e-6)


def test_wsd_decays_only_over_its_last_share():
    rate = schedule(Optimizer(learning_rate=1.0, final_fraction=0.0, warmup_steps=0, schedule="wsd", decay_share=0.5), 10)
    np.testing.assert_allclose([float(rate(s)) for s in (4, 5, 6, 9)], [1.0, 1.0, 0.8, 0.2], rtol=1e-6)


@pytest.mark.parametrize("name", ["nanogpt_a", "nanogpt_b"])
def test_twelve_steps_of_nanogpt(name):
    golden = np.load(GOLDENS / f"{name}.npz")
    shape, hyper = json.loads(str(golden["config_json"])), json.loads(str(golden["train_hparams_json"]))
    cfg = gpt2(shape["n_layer"], shape["n_head"], shape["n_embd"], bias=shape["bias"])
    model = from_gpt2({k.removeprefix("sd/"): v for k, v in golden.items() if k.startswith("sd/")}, cfg, "nanogpt")
    config = Config(
        name=name,
        model=cfg,
        data=Data(sequence_length=golden["train_x"].shape[2] - 1, batch_size=golden["train_x"].shape[1]),
        optimizer=Optimizer(
            learning_rate=hyper["learning_rate"],
            final_fraction=hyper["min_lr"] / hyper["learning_rate"],
            warmup_steps=hyper["warmup_iters"],
            horizon=hyper["lr_decay_iters"],
            betas=(hyper["beta1"], hyper["beta2"]),
            weight_decay=hyper["weight_decay"],
            clip_norm=hyper["grad_clip"],
        ),
        training=Training(steps=len(golden["train_x"])),
    )
    tx, rate = make_optimizer(config, model), schedule(config.optimizer, 12)
    how = {"config": config, "tx": tx, "rate": rate, "objective": objectives["language_model"]}
    step = jax.jit(lambda state, batch: train_step(state, batch, **how))
    state = State(model, tx.init(model), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    losses, norms, rates = [], [], []
    for x in golden["train_x"]:
        tokens = jnp.asarray(x[:, :-1])
        batch = {
            "tokens": tokens,
            "targets": jnp.asarray(x[:, 1:]),
            "loss_weights": jnp.ones(tokens.shape, jnp.float32),
            "is_body": jnp.ones(tokens.shape, bool),
            "segment_ids": jnp.ones_like(tokens),
            "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        }
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(losses, golden["train_losses"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(norms, golden["train_grad_norms"], atol=5e-5, rtol=0)
    np.testing.assert_allclose(rates, golden["train_lrs"], rtol=2e-6)
    final = to_gpt2(state.model, "nanogpt")
    for tensor in [k for k in golden if k.startswith("final/")]:
        np.testing.assert_allclose(final[tensor.removeprefix("final/")], golden[tensor], atol=1e-5, rtol=0)


def test_decay_applies_only_to_matrices_and_embeddings():
    model = jax.eval_shape(lambda: from_fresh())
    marked = {
        jax.tree_util.keystr(p, simple=True, separator="."): leaf
        for p, leaf in jax.tree_util.tree_leaves_with_path(decay_mask(model))
    }
    decayed = {name.removesuffix(".value") for name, flag in marked.items() if flag}
    assert {"embedding", "positions", "blocks.0.0.mlp.up.w", "blocks.0.0.mixer.attention.query.w"} <= decayed
    assert not any("norm" in name or name.endswith(".b") for name in decayed)


def from_fresh():
    from metajax.config import Runtime
    from metajax.models.lm import LM

    return LM(gpt2(2, 2, 8, bias=True), vocab_size=16, max_length=8, meta=None, runtime=Runtime(), key=jax.random.key(0))


def test_no_clipping_when_the_norm_is_zero():
    config = Config(
        name="x", optimizer=Optimizer(clip_norm=0.0, learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0)
    )
    params = {"w": nnx.Param(jnp.ones((3, 1)), axes=("embed", "mlp"))}
    tx = make_optimizer(config, params)
    updates, _ = tx.update(jax.tree.map(lambda x: 100.0 * x, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)["w"][...]
    np.testing.assert_allclose(moved, np.zeros((3, 1)), atol=1e-6)  # Adam's first step is lr * sign


HYBRID = Hybrid(prefix_tokens=4, kv_groups=(1, 2), full_layers=(0,), state=4)
SCANNED = {"runtime.unroll": 1, "runtime.implementation": "reference"}
MUON = {"optimizer.name": "muon", "optimizer.weight_decay": 0.1}
MODELS = {
    "stacked": ({"model.position": "learned", "model.bias": True, "model.layers": 3, "model.tied": False}, MetaTokens()),
    "hybrid": ({"model.hybrid": HYBRID, "model.layers": 3, "model.window": 8, "model.norm": "rmsnorm", **SCANNED}, None),
}


@pytest.mark.parametrize("kind", MODELS)
def test_muon_gets_the_matrices_of_blocks_and_adamw_the_rest(tiny_config, kind):
    changes, meta = MODELS[kind]
    program = Program.build(tiny_config(**MUON, **changes, meta_tokens=meta), 64, jax.devices()[:1])
    state = program.abstract_state()
    names = {path.removeprefix("model/") for path in to_arrays(state) if path.startswith("model/")}
    moments = [path for path in to_arrays(state.opt_state) if "/mu/" in path]
    by = {part: {path.partition("/mu/")[2] for path in moments if f"/{part}/" in path} for part in ("muon", "adamw")}
    assert by["muon"] | by["adamw"] == names and not by["muon"] & by["adamw"], "each parameter has one optimizer"
    assert by["muon"] and all(name.startswith("blocks") for name in by["muon"])
    shapes = {name: leaf.ndim for name, leaf in to_arrays(state.model).items()}
    left = {name.rpartition("/")[2] for name in by["adamw"] if name.startswith("blocks/") and shapes[name] > 2}
    assert left <= {"conv", "log_rate", "A_log"}, "AdamW gets stacked vectors, convolutions and rates, but no matrix"
    assert {"embedding", "positions", "unembedding", "prefix"} & names <= by["adamw"]


def test_a_step_of_muon_on_a_stack_is_that_of_each_layer(tiny_config):
    """The stack has a leading axis; optax's Muon with its defaults gets one matrix of it at a time."""
    rng, cfg = np.random.default_rng(0), tiny_config(**MUON, **{"optimizer.clip_norm": 0.0, "optimizer.schedule": "constant"})
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    stack, grads = draw(2, 3, 8, 12), draw(2, 3, 8, 12)  # two runs of three layers
    params = {"w": nnx.Param(stack, axes=("embed", "mlp")), "b": nnx.Param(draw(3, 12), axes=("norm",))}
    tx, rate = make_optimizer(cfg, params), schedule(cfg.optimizer, cfg.training.steps)
    all_grads = {"w": params["w"].replace(grads), "b": params["b"].replace(draw(3, 12))}
    updates, _ = jax.jit(tx.update)(all_grads, tx.init(params), params)
    own = optax.contrib.muon(rate, weight_decay=0.1)
    for place in np.ndindex(2, 3):
        one = {"w": stack[place]}
        expected, _ = jax.jit(own.update)({"w": grads[place]}, own.init(one), one)
        np.testing.assert_allclose(updates["w"][...][place], expected["w"], rtol=1e-5, atol=1e-8)


def test_muon_learns_and_resumes(tiny_config, paths, tmp_path):
    config = tiny_config(**MUON, **{"runtime.save_every": 3, "optimizer.learning_rate": 0.01})
    whole = run_experiment(config, tmp_path / "whole", paths)
    losses = [line["loss"] for line in read_lines(tmp_path / "whole" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in ("report.json", "checkpoints/6", "hashes/6-p0.json"):
        target = tmp_path / "cut" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    again = run_experiment(config, tmp_path / "cut", paths)
    assert again["restarted_from"] == 3 and again["eval"] == whole["eval"]
    assert read_lines(tmp_path / "cut" / "metrics.jsonl") == read_lines(tmp_path / "whole" / "metrics.jsonl")


def test_muons_state_is_sharded_like_its_parameters(tiny_config):
    program = Program.build(tiny_config(**MUON), 64, jax.devices()[:1])
    tree = jax.eval_shape(program.fresh_state, jax.random.key(0))
    shardings = to_arrays(param_shardings(tree, AbstractMesh((1, 4), ("data", "fsdp"))))
    matrix = next(path for path in shardings if path.endswith("up/w") and path.startswith("model/"))
    [moment] = [path for path in shardings if path.endswith("/mu/" + matrix.removeprefix("model/"))]
    assert shardings[moment].spec == shardings[matrix].spec == PartitionSpec(None, ("fsdp",), None)


def test_a_field_of_another_optimizer_is_refused(tiny_config):
    config = tiny_config(**{"optimizer.momentum": 0.9})
    with pytest.raises(UserError, match=r"optimizer\.momentum"):
        Program.build(config, 64, jax.devices()[:1])
    Program.build(override(config, {"optimizer.name": "muon"}), 64, jax.devices()[:1])


@pytest.mark.parametrize("field", ["optimizer.name", "training.objective"])
def test_an_unknown_name_is_refused_with_the_nearest(tiny_config, field):
    near = {"optimizer.name": "mun", "training.objective": "language_modl"}[field]
    with pytest.raises(UserError, match=rf"{field}.*did you mean '(muon|language_model)'"):
        Program.build(tiny_config(**{field: near}), 64, jax.devices()[:1])
