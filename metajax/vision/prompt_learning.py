"""A prompt learner beside a frozen CLIP: the step of CoOp, CoCoOp and AAPL, and its evaluation on base, new and other classes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from metajax.config import Clip, ImageConfig, Prompts
from metajax.core.errors import require
from metajax.data.pipeline import Paths
from metajax.vision import delta_tokens
from metajax.vision.clip.model import CLIP, unit
from metajax.vision.clip.prompts import (
    ClassTexts,
    Learner,
    ad_triplet,
    class_texts,
    cross_entropy,
    prompt_features,
    prompt_logits,
)
from metajax.vision.clips import open_clip
from metajax.vision.contrastive import describe, encode_images, zero_shot
from metajax.vision.data.augmentations import augment
from metajax.vision.data.batches import prompt_batches, test_pixels, viewer
from metajax.vision.data.preprocessing import centre, normalise
from metajax.vision.data.sets import ImageSet, check_set, content_of, few_shot, fingerprint_of, part_of_classes
from metajax.vision.data.sources import open_images
from metajax.vision.data.templates import SELECTED
from metajax.vision.task import Losses, Task
from metajax.vision.zero_shot import accuracy, harmonic

PROFILED = 100  # images whose delta tokens are looked at
TEST_AT_ONCE = 100


@struct.dataclass
class Frozen:
    """Beside the learner. features: of the training images, where they never change; else empty."""

    model: CLIP
    texts: ClassTexts | None
    features: jax.Array


def prompt_task(config: ImageConfig, paths: Paths) -> Task:
    """A learner of the one source's classes, all or the base half; zero-shot classes where there is no context."""
    cfg, choice = config.prompts, config.images
    model, tokenizer = open_clip(config, paths)
    whole = open_images(choice.sources[0], paths.cache, paths.data)
    check_set(whole, "train")
    check_set(whole, "test")
    shots = few_shot(whole.splits["train"], choice.shots, config.seed)
    seen = part_of_classes(_with_train(whole, shots), choice.classes)
    items, size = seen.splits["train"], model.cfg.image_size
    targets = [open_images(spec, paths.cache, paths.data) for spec in choice.targets]
    for target in targets:
        check_set(target, "test")
    epoch = max(1, len(items) // cfg.batch)
    content = [content_of(_with_train(whole, shots), "train", "test"), *(content_of(target, "test") for target in targets)]
    texts = texts_for(model, tokenizer, seen, cfg) if cfg.context else None
    centres = np.stack([centre(seen.read(item.key), size) for item in items])
    features = encode_images(model, centres) if config.still else jnp.zeros((0, model.cfg.embed))
    rate = epoch_schedule(cfg, epoch)
    looked_at = centres[:PROFILED]
    words = context_words(model, tokenizer, cfg)

    def create(key: jax.Array) -> Learner:
        return Learner(cfg, model.cfg, len(seen.classes), key, words)

    def choose(learner: Learner) -> np.ndarray:
        return delta_tokens.weights(delta_tokens.delta_groups(learner, model, looked_at, cfg, config.seed))

    return Task(
        steps=cfg.epochs * epoch if cfg.context else 0, epoch=epoch,
        batches=prompt_batches(seen, items, config.seed, cfg.batch, viewer(size, choice.view, choice.crop_area), paired=cfg.paired),
        create=create, tx=sgd(cfg, rate), rate=rate, frozen=Frozen(model, texts, features),
        loss=functools.partial(prompt_loss, cfg=cfg),
        evaluate=lambda learner: evaluate(learner, model, tokenizer, whole, targets, config),
        images=fingerprint_of(*content), tokenizer=tokenizer,
        manifest=[describe(s) for s in (whole, *targets)],
        choose=choose if cfg.sampling == "weighted" and cfg.paired else None,
        choice=np.full(len(cfg.augmentations), 1 / len(cfg.augmentations), np.float32),
    )  # fmt: skip


def _with_train(images: ImageSet, items: Any) -> ImageSet:
    return ImageSet(**{**vars(images), "splits": {**images.splits, "train": items}})


def texts_for(model: CLIP, tokenizer: Any, images: ImageSet, cfg: Prompts) -> ClassTexts:
    """The frozen part of prompts for a set's classes: placeholders, name, full stop."""
    names = [name.replace("_", " ") for name in images.classes]
    tokens = tokenizer.tokenize([" ".join(["X"] * cfg.context + [f"{name}."]) for name in names], model.cfg.context)
    return class_texts(model, tokens, [len(tokenizer.encode(name)) for name in names], cfg)


def context_words(model: CLIP, tokenizer: Any, cfg: Prompts) -> jax.Array | None:
    """Embeddings of the words that the context begins as."""
    if not cfg.context_init:
        return None
    ids = tokenizer.encode(cfg.context_init)
    require(
        len(ids) == cfg.context,
        f"prompts.context_init = {cfg.context_init!r} has {len(ids)} tokens, prompts.context = {cfg.context}",
    )
    return model.text.embed(jnp.array([ids]))[0]


# --------------------------------------------------------------------------------------------------------- the step


def epoch_schedule(cfg: Prompts, epoch: int) -> Any:
    """step -> learning rate as Dassl sets it, by epoch: a constant first one, then half a cosine that does not reach its end."""

    def rate(step: Any) -> Any:
        number = jnp.asarray(step) // epoch
        left = (cfg.epochs + 1 - number) / max(cfg.epochs, 1)
        fall = cfg.learning_rate * jnp.square(jnp.sin(0.5 * jnp.pi * left))  # half of 1 + cos, precise at its end too
        return jnp.where(number == 0, cfg.warmup_rate, fall)

    return rate


def sgd(cfg: Prompts, rate: Any) -> optax.GradientTransformation:
    """Momentum 0.9; weight decay on everything, in front of the momentum."""
    return optax.chain(optax.add_decayed_weights(cfg.weight_decay), optax.trace(0.9), optax.scale_by_learning_rate(rate))


def draw_types(key: jax.Array, weights: jax.Array, count: int) -> jax.Array:
    """int32[count, 2]: pairs of different types, as two draws by weight that are repeated until they differ."""
    both = jnp.log(weights)[:, None] + jnp.log(weights)[None]
    both = jnp.where(jnp.eye(len(weights), dtype=bool), -jnp.inf, both)
    drawn = jax.random.categorical(key, both.reshape(-1), shape=(count,))
    return jnp.stack([drawn // len(weights), drawn % len(weights)], axis=1)


def prompt_loss(
    learner: Learner, frozen: Frozen, batch: dict[str, jax.Array], choice: jax.Array, key: jax.Array, *, cfg: Prompts
) -> Losses:
    """Cross-entropy of the first view, and AAPL's triplets of both views under two augmentations, which are the same for both."""
    model = frozen.model
    images = normalise(batch["pixels"], model.cfg)  # [B, views, size, size, 3]
    keys, metrics, triplets = jax.random.split(key, 4), {}, 0.0
    if cfg.paired:
        plain, tokens, deltas = delta_of_views(learner, model, images, draw_types(keys[1], choice, len(images)), keys[2], cfg)
        triplets = ad_triplet(deltas if cfg.triplet_of == "delta" else tokens, cfg.margin, cfg.constraints)
        metrics = {"ad_triplet": triplets, "delta_norm": jnp.mean(jnp.linalg.norm(deltas, axis=-1))}
    if cfg.augment:
        first = unit(model.encode_image(_sometimes(images[:, 0], keys[0], choice, cfg, model.cfg)))
    elif cfg.paired:
        first = plain[:, 0]
    else:
        first = frozen.features[batch["index"]] if len(frozen.features) else unit(model.encode_image(images[:, 0]))
    moved = {"none": lambda: None, "meta": lambda: learner.meta_net(first), "delta": lambda: deltas[0, 0]}[cfg.condition]()
    logits = prompt_logits(model, frozen.texts, first, learner.contexts(moved))
    ce = cross_entropy(logits, batch["label"])
    return cfg.beta * ce + cfg.alpha * triplets, {"ce": ce, **metrics}


def delta_of_views(
    learner: Learner, model: CLIP, images: jax.Array, types: jax.Array, key: jax.Array, cfg: Prompts
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(unit features of the images as they are [B, view, features], meta tokens of the augmented images [view, type, B, width], delta
    tokens likewise) of images [B, 2, H, W, 3] and types [B, 2]."""
    count, size = len(images), images.shape[-3:]
    both = jnp.broadcast_to(images[:, :, None], (count, 2, 2, *size)).reshape(-1, *size)
    kinds = jnp.broadcast_to(types[:, None], (count, 2, 2)).reshape(-1)
    one = functools.partial(augment, clip=model.cfg, names=cfg.augmentations, space=cfg.space)
    changed = jax.lax.map(lambda x: one(*x), (both, kinds, jax.random.split(key, len(both))))
    features = unit(model.encode_image(jnp.concatenate([images.reshape(-1, *size), changed])))
    tokens = learner.meta_net(features)
    plain, moved = tokens[: 2 * count].reshape(count, 2, 1, -1), tokens[2 * count :].reshape(count, 2, 2, -1)
    return features[: 2 * count].reshape(count, 2, -1), jnp.moveaxis(moved, 0, 2), jnp.moveaxis(moved - plain, 0, 2)


def _sometimes(images: jax.Array, key: jax.Array, weights: jax.Array, cfg: Prompts, clip: Clip) -> jax.Array:
    """Each image under one augmentation with probability `cfg.augment`."""
    keys = jax.random.split(key, 3)
    types = jax.random.categorical(keys[0], jnp.log(weights), shape=(len(images),))
    one = functools.partial(augment, clip=clip, names=cfg.augmentations, space=cfg.space)
    changed = jax.lax.map(lambda x: one(*x), (images, types, jax.random.split(keys[1], len(images))))
    chosen = jax.random.bernoulli(keys[2], cfg.augment, (len(images), 1, 1, 1))
    return jnp.where(chosen, changed, images)


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    learner: Learner, model: CLIP, tokenizer: Any, whole: ImageSet, targets: list[ImageSet], config: ImageConfig
) -> dict[str, Any]:
    """Accuracy of the classes that were trained on, of new ones apart from them, and of other sets; delta tokens of a meta-net."""
    cfg, images, results = config.prompts, config.images, {}
    parts = {name: part_of_classes(whole, name) for name in (("base", "new") if images.classes == "base" else ("all",))}
    for name, one in {**parts, **{target.spec: target for target in targets}}.items():
        templates = ((images.template or one.template),) if not images.ensemble else (*SELECTED, one.template)
        if cfg.context:
            results[name] = test(learner, model, texts_for(model, tokenizer, one, cfg), one, cfg, config.seed)
        else:
            results[name] = zero_shot(model, tokenizer, one, templates)
    if targets:
        results["targets"] = float(np.mean([results[target.spec]["accuracy"] for target in targets]))
    if images.classes == "base":
        results["harmonic"] = harmonic(results["base"]["accuracy"], results["new"]["accuracy"])
    if cfg.condition != "none":
        first = next(iter(parts.values()))
        pixels, labels = test_pixels(first, model.cfg.image_size)
        results["delta"] = delta_tokens.analyse(learner, model, pixels[:PROFILED], labels[:PROFILED], cfg, config.seed)
    return results


def test(learner: Learner, model: CLIP, texts: ClassTexts, images: ImageSet, cfg: Prompts, seed: int) -> dict[str, float]:
    """Accuracy of a learner on a set's test images, whose features are computed once."""
    pixels, labels = test_pixels(images, model.cfg.image_size)
    features = encode_images(model, pixels)
    moved = None
    if cfg.condition == "meta":
        moved = learner.meta_net(features)
    elif cfg.condition == "delta":
        moved = jnp.mean(delta_tokens.delta_groups(learner, model, pixels, cfg, seed)[1], axis=0)
    if moved is None:
        weights = _one_context(learner, model, texts)
        return accuracy(lambda x: model.logits(x, weights), features, labels)
    both = jnp.concatenate([features, moved], axis=1)
    width = features.shape[1]
    return accuracy(lambda x: _own_contexts(learner, model, texts, x[:, :width], x[:, width:]), both, labels, TEST_AT_ONCE)


@jax.jit
def _one_context(learner: Learner, model: CLIP, texts: ClassTexts) -> jax.Array:
    return prompt_features(model, texts, learner.contexts(None))[0]


@jax.jit
def _own_contexts(learner: Learner, model: CLIP, texts: ClassTexts, features: jax.Array, moved: jax.Array) -> jax.Array:
    return prompt_logits(model, texts, features, learner.contexts(moved))
