"""The step of prompt learners: learning rates and training runs of the papers' code, drawn pairs, cached features."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.training.state import State
from metajax.vision.clip.model import unit
from metajax.vision.clip.prompts import Learner, class_texts
from metajax.vision.config import ImageConfig, Images, Prompts
from metajax.vision.data.preprocessing import normalise
from metajax.vision.prompt_learning import Frozen, draw, draw_types, epoch_schedule, prompt_learning, prompt_program

GOLDENS = Path(__file__).parents[1] / "goldens"
BASE, COOP, COCOOP, RATES = (np.load(GOLDENS / f"{name}.npz") for name in ("prompt_clip_a", "coop_a", "cocoop_a", "dassl_lr_a"))
KEY = jax.random.key(0)


@jax.jit
def encode(model, images):
    return unit(model.encode_image(images))


@pytest.mark.parametrize("epochs", [10, 50, 200])
def test_learning_rates_are_the_published_ones(epochs):
    rate = epoch_schedule(Prompts(epochs=epochs), 3)
    found = jax.vmap(rate)(jnp.arange(3 * epochs)).reshape(epochs, 3)
    assert np.all(found == found[:, :1]), "one rate in an epoch"
    np.testing.assert_allclose(found[:, 0], RATES[f"lr_E{epochs}_base0.002_warm1_cons1e-05"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["coop", "cocoop"])
def test_a_training_run_equals_the_published_code(prompt_clip, kind):
    z, coop = (COOP, True) if kind == "coop" else (COCOOP, False)
    published = json.loads(str(z["train_optim_json"]))
    cfg = Prompts(
        condition="none" if coop else "meta",
        bottleneck=3,
        epochs=published["MAX_EPOCH"],
        learning_rate=published["LR"],
        warmup_rate=published["WARMUP_CONS_LR"],
        weight_decay=published["WEIGHT_DECAY"],
    )
    order = [[0, 1], [2, 3]] * 4 if coop else [[0], [1], [2], [3]] * 2
    texts = class_texts(
        prompt_clip, z["v2/tokenized_prompts" if coop else "tokenized_prompts"], COOP["v2/name_lens"].tolist(), cfg
    )
    seen = encode(prompt_clip, jnp.asarray(BASE["images"].transpose(0, 2, 3, 1)))
    learner = Learner(cfg, prompt_clip.cfg, 5, KEY)
    learner.context[...] = jnp.asarray(z["v2/ctx" if coop else "param/ctx"])
    if not coop:
        for ours, theirs in {"w1": "linear1.weight", "b1": "linear1.bias", "w2": "linear2.weight", "b2": "linear2.bias"}.items():
            getattr(learner.meta_net, ours)[...] = jnp.asarray(z[f"param/meta_net.{theirs}"].T)

    config = ImageConfig(name=kind, images=Images(view="centre"), prompts=cfg, weights="x")
    frozen = Frozen.of(config, prompt_clip, texts, seen)
    program = prompt_program(config, prompt_clip.cfg, frozen, 5, len(order[0]), epoch=2 if coop else 4)
    state = State(learner, program.tx.init(learner), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    step = jax.jit(program.step)
    for n, index in enumerate(order):
        pixels = np.zeros((len(index), 1, 32, 32, 3), np.uint8)  # not looked at: the features are known
        state, metrics = step(state, {"index": np.array(index), "label": BASE["labels"][index], "pixels": pixels}, frozen)
        np.testing.assert_allclose(metrics["loss"], z["train_losses"][n], rtol=0, atol=2e-5)
        np.testing.assert_allclose(metrics["learning_rate"], z["train_lrs"][n], rtol=1e-6)
    last = z["train_ctx_after_epoch"][-1] if coop else z["trained/ctx"]
    np.testing.assert_allclose(state.model.context[...], last, rtol=0, atol=1e-5)
    if not coop:
        np.testing.assert_allclose(state.model.meta_net.w1[...], z["trained/meta_net.linear1.weight"].T, rtol=0, atol=1e-5)


def test_drawn_types_differ_and_follow_their_weights():
    weights = jnp.array([0.5, 0.25, 0.25])
    drawn = np.asarray(draw_types(KEY, weights, 4000))
    assert np.all(drawn[:, 0] != drawn[:, 1])
    share = np.bincount(drawn.reshape(-1), minlength=3) / drawn.size
    # Ordered pairs of different types: 2 * (1/8 + 1/8) with the first type, 2 * 1/16 without it, of 5/8 in all.
    np.testing.assert_allclose(share, [0.4, 0.3, 0.3], atol=0.02)


def test_triplets_leave_cocoops_loss_unchanged_and_features_may_be_cached(prompt_clip):
    cfg = Prompts(condition="meta", bottleneck=3)
    texts = class_texts(prompt_clip, COCOOP["tokenized_prompts"], COOP["v2/name_lens"].tolist(), cfg)
    learner, rng = Learner(cfg, prompt_clip.cfg, 5, KEY), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 2, 32, 32, 3)).astype(np.uint8)
    batch = {"index": np.array([0]), "label": np.array([3]), "pixels": pixels}

    @functools.partial(jax.jit, static_argnums=0)
    def means(config, batch, frozen):
        found = prompt_learning(config, learner, draw(config, batch, jnp.int32(0), frozen), frozen)
        return {name: total / weight for name, (total, weight) in found.items()}

    def run(cfg, features):
        config = ImageConfig(name="x", prompts=cfg, weights="x")
        found = means(config, batch, Frozen.of(config, prompt_clip, texts, features))
        return found["loss"], found

    plain, parts = run(cfg, None)
    cached = encode(prompt_clip, normalise(jnp.asarray(pixels[:, 0]), prompt_clip.cfg))
    np.testing.assert_allclose(run(cfg, cached)[0], plain, rtol=2e-6)
    total, with_triplets = run(replace(cfg, alpha=0.2), None)
    np.testing.assert_allclose(with_triplets["ce"], parts["ce"], rtol=2e-6)
    np.testing.assert_allclose(total, with_triplets["ce"] + 0.2 * with_triplets["ad_triplet"], rtol=2e-6)
    assert float(with_triplets["delta_norm"]) > 0
