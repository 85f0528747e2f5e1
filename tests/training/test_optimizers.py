"""Schedules, and twelve AdamW steps of nanoGPT met number for number."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metajax.config import Config, Data, Optimizer, Training
from metajax.interop.gpt2 import from_gpt2, to_gpt2
from metajax.models.lm import decay_mask
from metajax.models.presets import gpt2
from metajax.training.optimizers import make_optimizer, schedule
from metajax.training.state import State
from metajax.training.step import train_step

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


def test_wsd_decays_over_its_last_share_alone():
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
        data=Data(row_length=golden["train_x"].shape[2] - 1, batch_rows=golden["train_x"].shape[1]),
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
    tx = make_optimizer(config, decay_mask(model))
    step = jax.jit(lambda state, batch: train_step(state, batch, config=config, tx=tx))
    state = State(model, tx.init(model), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    rate, losses, norms, rates = schedule(config.optimizer, 12), [], [], []
    for i, x in enumerate(golden["train_x"]):
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
        rates.append(float(rate(i)))
    np.testing.assert_allclose(losses, golden["train_losses"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(norms, golden["train_grad_norms"], atol=5e-5, rtol=0)
    np.testing.assert_allclose(rates, golden["train_lrs"], rtol=2e-6)
    final = to_gpt2(state.model, "nanogpt")
    for tensor in [k for k in golden if k.startswith("final/")]:
        np.testing.assert_allclose(final[tensor.removeprefix("final/")], golden[tensor], atol=1e-5, rtol=0)


def test_decay_reaches_matrices_and_embeddings_alone():
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
    params = {"w": jnp.ones(3)}
    tx = make_optimizer(config, {"w": True})
    updates, _ = tx.update({"w": 100.0 * jnp.ones(3)}, tx.init(params), params)
    np.testing.assert_allclose(
        optax.apply_updates(params, updates)["w"], np.zeros(3), atol=1e-6
    )  # Adam's first step is lr * sign
