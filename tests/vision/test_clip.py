"""CLIP compared with OpenAI's code: features, intermediates, logits, loss, gradients; published sizes; losses; cut texts."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metajax.config import Runtime
from metajax.core.errors import UserError
from metajax.interop.layouts import values_of
from metajax.models.lm import decay_mask, named_params
from metajax.vision.clip.config import Clip, preset
from metajax.vision.clip.model import CLIP, LOSSES, contrastive_loss, cut_after_end, sigmoid_loss
from metajax.vision.weights import clip_tensors, from_state, layout_of

GOLDENS = Path(__file__).parents[1] / "goldens"
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
FILES = {name: np.load(GOLDENS / f"{name}.npz") for name in ("clip_vit_a", "clip_rn_a")}
ABS = {"clip_vit_a": 3e-5, "clip_rn_a": 5e-5}


@pytest.fixture(scope="module")
def golden(clip_config):
    """golden(name) -> (state dict, model, images [B, H, W, 3], tokens)."""
    return functools.cache(functools.partial(load, clip_config))


def load(clip_config, name):
    z = FILES[name]
    state = {key.removeprefix("sd/"): value for key, value in z.items() if key.startswith("sd/")}
    images = z["image"] if "image" in z else (z["image_uint8_nchw"] / 255 - MEAN[:, None, None]) / STD[:, None, None]
    images = jnp.asarray(images.transpose(0, 2, 3, 1), jnp.float32)
    return state, from_state(state, clip_config(z), "openai"), images, jnp.asarray(z["text"])


@jax.jit
def everything(model, images, tokens):
    capture = ("residual", "attention_probabilities") if model.cfg.patch else ("stem", "final")
    seen, taps = model.visual(images, capture)
    read, text_taps = model.text(model.text.embed(tokens), jnp.argmax(tokens, axis=-1), ("final",))
    return seen, read, model(images, tokens), taps, text_taps["final"]


def near(found, wanted, gate):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=gate)


@pytest.mark.parametrize("name", FILES)
def test_features_and_logits(golden, name):
    z, (_, model, images, tokens) = FILES[name], golden(name)
    seen, read, logits, taps, final = everything(model, images, tokens)
    near(seen, z["image_features"], ABS[name])
    near(read, z["text_features"], ABS[name])
    near(logits, z["logits_per_image"], ABS[name])
    near(final, z["text_after_ln_final"], ABS[name])
    if model.cfg.patch:
        near(taps["residual"][0], z["visual_after_ln_pre"], ABS[name])
        near(taps["residual"][1], z["visual_after_block0"], ABS[name])
        near(jnp.sum(taps["attention_probabilities"], axis=-1), np.ones((2, 3, 4, 17)), 1e-6)
    else:
        near(taps["stem"].transpose(0, 3, 1, 2), z["visual_after_stem"], ABS[name])
        near(taps["final"].transpose(0, 3, 1, 2), z["visual_after_layer4"], ABS[name])


@pytest.mark.parametrize("name", FILES)
def test_loss_and_gradients(golden, name):
    """Under rematerialisation, which must not change them."""
    z, (state, whole, images, tokens) = FILES[name], golden(name)
    model = from_state(state, whole.cfg, "openai", Runtime(remat="full"))
    loss_of = lambda model: contrastive_loss(model(images, tokens[: len(images)]))  # noqa: E731
    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(model)
    near(loss, z["contrastive_loss"], ABS[name])
    found = dict(values_of(gradient, clip_tensors(model, "openai"), layout_of(model.cfg, "openai")))
    for key, wanted in z.items():
        if key.startswith("grad/"):
            near(found[key.removeprefix("grad/")], wanted, 5e-5 * np.abs(wanted).max())


def test_texts_cut_after_their_end_have_the_same_features(golden):
    _, model, _, tokens = golden("clip_vit_a")
    tokens = tokens[jnp.argmax(tokens, axis=-1) < 15]
    short = cut_after_end(np.asarray(tokens))
    assert short.shape[1] < tokens.shape[1]
    encode = jax.jit(lambda tokens: model.encode_text(tokens))
    near(encode(jnp.asarray(short)), encode(tokens), 1e-6)
    with pytest.raises(UserError, match="17 tokens, but the text tower has 16"):
        model.encode_text(jnp.zeros((1, 17), int))


def test_half_precision_stays_near(golden):
    state, model, images, tokens = golden("clip_vit_a")
    half = from_state(state, replace(model.cfg, compute_dtype="bfloat16"), "openai")
    for seen, whole in zip(everything(half, images, tokens)[:2], everything(model, images, tokens)[:2], strict=True):
        assert seen.dtype == jnp.bfloat16 and 1e-4 < np.linalg.norm(seen - whole) / np.linalg.norm(whole) < 0.02


def parameters(model):
    """Numbers of trained parameters of the image tower, the text tower and all, without running statistics."""
    sizes = {path: p.size for path, p in named_params(model).items() if isinstance(p, nnx.Param)}
    return tuple(sum(n for path, n in sizes.items() if path.startswith(start)) for start in ("visual", "text", ""))


@pytest.mark.parametrize(
    ("name", "totals"),
    {
        "ViT-B/16": (86_192_640, 63_428_096, 149_620_737),
        "ViT-B/32": (87_849_216, 63_428_096, 151_277_313),
        "ViT-L/14": (303_966_208, 123_650_304, 427_616_513),
        "RN50": (38_316_896, 63_690_240, 102_007_137),
    }.items(),
)
def test_published_sizes(name, totals):
    model = jax.eval_shape(lambda: CLIP(preset(name), runtime=Runtime(), key=jax.random.key(0)))
    assert parameters(model) == totals


def test_losses_by_hand():
    logits = jnp.array([[2.0, 0.0], [1.0, 3.0]])
    rows = math.log(1 + math.exp(-2)) * 2
    columns = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))
    near(contrastive_loss(logits), (rows + columns) / 4, 1e-6)
    pairs = sum(math.log(1 + math.exp(-x)) for x in (2.0, 0.0, -1.0, 3.0))
    near(sigmoid_loss(logits), pairs / 2, 1e-6)
    alike = jnp.zeros((2, 2)), jnp.ones((2, 2), bool)
    near(contrastive_loss(*alike), math.log(2), 1e-6)
    near(sigmoid_loss(*alike), 2 * math.log(2), 1e-6)


def test_a_sigmoid_clip_has_a_bias_and_scalars_do_not_decay():
    cfg = Clip(
        vision_layers=(1,),
        vision_width=8,
        vision_heads=2,
        text_width=8,
        text_heads=2,
        embed=4,
        patch=4,
        image_size=8,
        text_layers=1,
        context=4,
        vocab=8,
        loss="sigmoid",
    )
    make = lambda: CLIP(cfg, runtime=Runtime(), key=jax.random.key(0))  # noqa: E731
    logits = jax.jit(lambda images, texts: make().logits(images, texts))(jnp.eye(2, 4), 2 * jnp.eye(2, 4))
    near(logits, 10 * np.eye(2) - 10, 1e-5)
    decays = {path for path, param in named_params(decay_mask(jax.eval_shape(make))).items() if param.get_value()}
    assert not decays & {"logit_scale", "logit_bias", "visual.pre_norm.scale"}
    assert decays >= {"visual.patches.kernel", "text.projection"}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_small_clip_learns_from_its_start(loss):
    """Four pairs, two of one class: after 40 steps of Adam every image is nearest to its class's texts."""
    cfg = Clip(
        vision_layers=(1,),
        vision_width=16,
        vision_heads=2,
        text_width=16,
        text_heads=2,
        embed=8,
        patch=4,
        image_size=8,
        text_layers=1,
        context=4,
        vocab=16,
        loss=loss,
    )
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    tokens = jnp.array([[1, 2, 15, 0], [3, 15, 0, 0], [4, 5, 6, 15], [3, 2, 15, 0]])
    classes = jnp.array([0, 1, 2, 1])
    matches, adam = classes[:, None] == classes, optax.adam(1e-2)

    @jax.jit
    def trained():
        model = CLIP(cfg, runtime=Runtime(), key=jax.random.key(0))

        def step(carry, _):
            model, state = carry
            value, gradient = jax.value_and_grad(lambda model: LOSSES[loss](model(images, tokens), matches))(model)
            updates, state = adam.update(gradient, state)
            return (optax.apply_updates(model, updates), state), value

        (model, _), losses = jax.lax.scan(step, (model, adam.init(model)), length=40)
        return losses, model(images, tokens)

    losses, logits = trained()
    assert losses[-1] < losses[0] / 2
    np.testing.assert_array_equal(classes[jnp.argmax(logits, axis=1)], classes)


def test_impossible_clips_are_refused(golden):
    with pytest.raises(UserError, match="did you mean 'ViT-B/16'"):
        preset("ViT-B-16")
    with pytest.raises(UserError, match=r"a ResNet \(patch 0\) needs 4"):
        preset("ViT-B/16", patch=0)
    _, model, images, _ = golden("clip_rn_a")
    with pytest.raises(UserError, match="unknown 'residual'"):
        model.visual(images, ("residual",))
