"""Prompt learning on a frozen CLIP: the step of CoOp, CoCoOp and AAPL, and evaluation on base, new and other classes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from metajax.core.errors import require
from metajax.data.pipeline import Paths
from metajax.distributed.mesh import make_mesh
from metajax.training.objectives import Batch, Means, objective, objectives
from metajax.training.program import Program, everywhere
from metajax.vision import delta_tokens
from metajax.vision.clip import prompts
from metajax.vision.clip.config import Clip
from metajax.vision.clip.model import CLIP, unit
from metajax.vision.clip.prompts import ClassTexts, Learner
from metajax.vision.clips import open_clip
from metajax.vision.config import ImageConfig, Prompts
from metajax.vision.contrastive import accuracy, encode_images, harmonic, zero_shot
from metajax.vision.data.augmentations import augment
from metajax.vision.data.batches import prompt_batches, test_pixels, viewer
from metajax.vision.data.preprocessing import centre, normalise
from metajax.vision.data.sets import ImageSet, check_set, content_of, few_shot, fingerprint_of, part_of_classes
from metajax.vision.data.sources import open_images
from metajax.vision.data.templates import ensemble
from metajax.vision.flops import image_step_flops
from metajax.vision.task import ImageTask

PROFILED = 100  # images whose delta tokens are analysed
TEST_AT_ONCE = 100


@struct.dataclass
class Frozen:
    """Inputs of a step besides the learner.

    features: features of the training images if these never change, else None. choice: probabilities of the augmentations.
    key: random key of the run, as from `jax.random.key_data`.
    """

    model: CLIP
    texts: ClassTexts | None
    features: jax.Array | None
    choice: jax.Array
    key: jax.Array

    @classmethod
    def of(cls, config: ImageConfig, model: CLIP, texts: ClassTexts | None, features: jax.Array | None) -> Frozen:
        """Build the inputs with uniform probabilities and the key of the config's seed."""
        count = len(config.prompts.augmentations)
        choice, key = np.full(count, 1 / count, np.float32), jax.random.key(config.seed)
        return cls(model, texts, features, choice, np.asarray(jax.random.key_data(key)))


class PromptTask(ImageTask):
    """Train a learner on all or the base half of the source's classes; without context, only evaluate zero-shot."""

    def __init__(self, config: ImageConfig, paths: Paths, devices: list[jax.Device] | None = None):
        self.config, self.paths, cfg, choice = config, paths, config.prompts, config.images
        self.model, self.tokenizer = open_clip(config, paths)
        self.sets = [open_images(spec, paths.cache, paths.data) for spec in (choice.sources[0], *choice.targets)]
        model, (whole, *targets) = self.model, self.sets
        check_set(whole, "train")
        for images in self.sets:
            check_set(images, "test")
        shots = few_shot(whole.splits["train"], choice.shots, config.seed)
        chosen = replace(whole, splits={**whole.splits, "train": shots})
        seen = part_of_classes(chosen, choice.classes)
        items, size = seen.splits["train"], model.cfg.image_size
        self.data = fingerprint_of(content_of(chosen, "train", "test"), *(content_of(target, "test") for target in targets))
        texts = texts_for(model, self.tokenizer, seen, cfg) if cfg.context else None
        centres = np.stack([centre(seen.read(item.key), size) for item in items])
        self._looked_at = centres[:PROFILED]
        features = encode_images(model, centres) if config.still else None
        self.epoch = max(1, len(items) // cfg.batch)
        self.steps = cfg.epochs * self.epoch if cfg.context else 0
        self._frozen = Frozen.of(config, model, texts, features)
        batch_size, words = min(cfg.batch, len(items)), context_words(model, self.tokenizer, cfg)
        sizes = (len(seen.classes), batch_size)
        self.program = prompt_program(config, model.cfg, self._frozen, *sizes, devices, epoch=self.epoch, words=words)
        see = viewer(size, choice.view, choice.crop_area)
        self.batches = prompt_batches(seen, items, config.seed, cfg.batch, see, self.program.rows, paired=cfg.paired)
        self.step_flops = image_step_flops(config, model.cfg, *texts.embedded.shape[:2]) if texts is not None else 0

    def save_inputs(self, folder: Path) -> None:
        """Save nothing, because the CLIP's run or folder keeps the tokenizer."""

    def start(self, model: Learner, meta: Mapping[str, Any] | None) -> tuple[Learner, tuple[Any, ...]]:
        if meta is not None:
            self._frozen = self._frozen.replace(choice=np.array(meta["choice"], np.float32))
        return model, (self.program.put_everywhere(self._frozen),)

    def meta(self) -> dict[str, Any]:
        return {"choice": self._frozen.choice.tolist()}

    def ends_epoch(self, step: int) -> bool:
        cfg = self.config.prompts
        return cfg.sampling == "weighted" and cfg.paired and step % self.epoch == 0 and step < self.steps

    def next_epoch(self, model: Learner, frozen: tuple[Any, ...]) -> tuple[Any, ...]:
        """Choose augmentations by the separation of their deltas; keep the choice if a delta is not finite."""
        cfg, learner = self.config.prompts, self.program.whole(model)
        groups = delta_tokens.delta_groups(learner, self.model, self._looked_at, cfg, self.config.seed)
        if not np.all(np.isfinite(groups[1])):
            return frozen
        self._frozen = self._frozen.replace(choice=delta_tokens.weights(groups))
        return (frozen[0].replace(choice=self.program.put_everywhere(self._frozen.choice)),)

    def record(self, step: int, values: dict[str, float]) -> dict[str, float]:
        alive, remedy = values.get("delta_norm", 1.0) > 0, "lower prompts.learning_rate or raise prompts.bottleneck"
        require(alive, f"step {step}: every delta token is 0, so the meta-net is dead; {remedy}")
        return values

    def evaluate(self, model: Learner) -> dict[str, Any]:
        """Accuracy on the training classes, separately on new classes, and on other sets; delta tokens of a meta-net."""
        cfg, images, results, (whole, *targets) = self.config.prompts, self.config.images, {}, self.sets
        parts = {name: part_of_classes(whole, name) for name in (("base", "new") if images.classes == "base" else ("all",))}
        for name, one in {**parts, **{target.spec: target for target in targets}}.items():
            if cfg.context:
                texts = texts_for(self.model, self.tokenizer, one, cfg)
                results[name] = test(model, self.model, texts, one, cfg, self.config.seed)
            else:
                templates = ensemble(one.spec, one.template) if images.ensemble else ((images.template or one.template),)
                results[name] = zero_shot(self.model, self.tokenizer, one, templates)
        if targets:
            results["targets"] = float(np.mean([results[target.spec]["accuracy"] for target in targets]))
        if images.classes == "base":
            results["harmonic"] = harmonic(results["base"]["accuracy"], results["new"]["accuracy"])
        if cfg.condition != "none":
            pixels, labels = test_pixels(next(iter(parts.values())), self.model.cfg.image_size)
            some = pixels[:PROFILED], labels[:PROFILED]
            results["delta"] = delta_tokens.analyse(model, self.model, *some, cfg, self.config.seed)
        return results


def prompt_program(
    config: ImageConfig,
    clip: Clip,
    frozen: Frozen,
    classes: int,
    batch_size: int,
    devices: list[jax.Device] | None = None,
    *,
    epoch: int = 1,
    words: np.ndarray | None = None,
) -> Program:
    """The program of a prompt learner; parameters are replicated.

    Args:
      frozen: arrays or shapes.
      epoch: steps of one epoch, for the learning rate.
      words: embeddings that initialise the context; None: random.
    """
    cfg, rate = config.prompts, epoch_schedule(config.prompts, epoch)

    def create(key: jax.Array) -> Learner:
        return Learner(cfg, clip, classes, key, None if words is None else jnp.asarray(words))

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)
    mesh, found = make_mesh(config.runtime.mesh, devices), objectives["prompt_learning"]
    return Program(config, mesh, create, sgd(cfg, rate), rate, found, batch_size, (shapes,), everywhere)


def texts_for(model: CLIP, tokenizer: Any, images: ImageSet, cfg: Prompts) -> ClassTexts:
    """The frozen part of prompts for a set's classes: placeholders, name, full stop."""
    names = [name.replace("_", " ") for name in images.classes]
    tokens = tokenizer.tokenize([" ".join(["X"] * cfg.context + [f"{name}."]) for name in names], model.cfg.context)
    return prompts.class_texts(model, tokens, [len(tokenizer.encode(name)) for name in names], cfg)


def context_words(model: CLIP, tokenizer: Any, cfg: Prompts) -> np.ndarray | None:
    """Embeddings of the words that initialise the context."""
    if not cfg.context_init:
        return None
    ids = tokenizer.encode(cfg.context_init)
    sizes = f"{len(ids)} tokens, prompts.context = {cfg.context}"
    require(len(ids) == cfg.context, f"prompts.context_init = {cfg.context_init!r} has {sizes}")
    return np.asarray(model.text.embed(jnp.array([ids]))[0])


# --------------------------------------------------------------------------------------------------------- the step


def epoch_schedule(cfg: Prompts, epoch: int) -> Any:
    """step -> learning rate by epoch, as in Dassl: a constant first epoch, then half a cosine that does not reach its end."""

    def rate(step: Any) -> Any:
        number = jnp.asarray(step) // epoch
        left = (cfg.epochs + 1 - number) / max(cfg.epochs, 1)
        fall = cfg.learning_rate * jnp.square(jnp.sin(0.5 * jnp.pi * left))  # half of 1 + cos, precise at its end too
        return jnp.where(number == 0, cfg.warmup_rate, fall)

    return rate


def sgd(cfg: Prompts, rate: Any) -> optax.GradientTransformation:
    """SGD with momentum 0.9, and weight decay of all parameters before the momentum."""
    return optax.chain(optax.add_decayed_weights(cfg.weight_decay), optax.trace(0.9), optax.scale_by_learning_rate(rate))


def draw_types(key: jax.Array, weights: jax.Array, count: int) -> jax.Array:
    """int32[count, 2]: pairs of different types, distributed as two weighted draws that are repeated until they differ."""
    both = jnp.log(weights)[:, None] + jnp.log(weights)[None]
    both = jnp.where(jnp.eye(len(weights), dtype=bool), -jnp.inf, both)
    drawn = jax.random.categorical(key, both.reshape(-1), shape=(count,))
    return jnp.stack([drawn // len(weights), drawn % len(weights)], axis=1)


def draw(config: ImageConfig, batch: Batch, step: jax.Array, frozen: Frozen) -> Batch:
    """The batch with the random draws of a step, "draws": the augmentations of each image and their keys."""
    cfg, count = config.prompts, len(batch["pixels"])
    keys, draws = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(frozen.key), step), 4), {}
    if cfg.paired:
        draws["types"] = draw_types(keys[1], frozen.choice, count)
        draws["keys"] = jax.random.split(keys[2], 4 * count).reshape(count, 2, 2)
    if cfg.augment:
        first, second, third = jax.random.split(keys[0], 3)
        draws["type"] = jax.random.categorical(first, jnp.log(frozen.choice), shape=(count,))
        draws["key"] = jax.random.split(second, count)
        draws["augmented"] = jax.random.bernoulli(third, cfg.augment, (count, 1, 1, 1))
    return {**batch, "draws": draws}


@objective("prompt_learning", prepare=draw)
def prompt_learning(config: ImageConfig, learner: Learner, batch: Batch, frozen: Frozen) -> Means:
    """Cross-entropy of the first view, and AAPL's triplet loss of both views under the same two augmentations."""
    cfg, model, draws = config.prompts, frozen.model, batch["draws"]
    images = normalise(batch["pixels"], model.cfg)  # [B, views, size, size, 3]
    metrics, triplets = {}, 0.0
    if cfg.paired:
        plain, tokens, deltas = delta_of_views(learner, model, images, draws["types"], draws["keys"], cfg)
        triplets = prompts.ad_triplet(deltas if cfg.triplet_of == "delta" else tokens, cfg.margin, cfg.constraints)
        metrics = {"ad_triplet": triplets, "delta_norm": jnp.mean(jnp.linalg.norm(deltas, axis=-1))}
    if cfg.augment:
        changed = augmented(images[:, 0], draws["type"], draws["key"], cfg, model.cfg)
        first = unit(model.encode_image(jnp.where(draws["augmented"], changed, images[:, 0])))
    elif cfg.paired:
        first = plain[:, 0]
    else:
        first = frozen.features[batch["index"]] if frozen.features is not None else unit(model.encode_image(images[:, 0]))
    moved = {"none": lambda: None, "meta": lambda: learner.meta_net(first), "delta": lambda: deltas[0, 0]}[cfg.condition]()
    logits = prompts.prompt_logits(model, frozen.texts, first, learner.contexts(moved))
    ce = prompts.cross_entropy(logits, batch["label"])
    metrics |= {"loss": cfg.beta * ce + cfg.alpha * triplets, "ce": ce}
    return {name: (value, jnp.float32(1)) for name, value in metrics.items()}


def augmented(images: jax.Array, types: jax.Array, keys: jax.Array, cfg: Prompts, clip: Clip) -> jax.Array:
    """Each image after the augmentation of its type."""
    one = functools.partial(augment, clip=clip, names=cfg.augmentations, space=cfg.space)
    return jax.lax.map(lambda x: one(*x), (images, types, keys))


def delta_of_views(
    learner: Learner, model: CLIP, images: jax.Array, types: jax.Array, keys: jax.Array, cfg: Prompts
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(unit features of the plain images [B, view, features], instance tokens of the augmented images [view, type, B, width],
    delta tokens likewise) of images [B, 2, H, W, 3], types [B, 2] and keys [B, view, type]."""
    count, size = len(images), images.shape[-3:]
    both = jnp.broadcast_to(images[:, :, None], (count, 2, 2, *size)).reshape(-1, *size)
    kinds = jnp.broadcast_to(types[:, None], (count, 2, 2)).reshape(-1)
    changed = augmented(both, kinds, keys.reshape(-1), cfg, model.cfg)
    features = unit(model.encode_image(jnp.concatenate([images.reshape(-1, *size), changed])))
    tokens = learner.meta_net(features)
    plain, moved = tokens[: 2 * count].reshape(count, 2, 1, -1), tokens[2 * count :].reshape(count, 2, 2, -1)
    return features[: 2 * count].reshape(count, 2, -1), jnp.moveaxis(moved, 0, 2), jnp.moveaxis(moved - plain, 0, 2)


# ------------------------------------------------------------------------------------------------------- evaluation


def test(learner: Learner, model: CLIP, texts: ClassTexts, images: ImageSet, cfg: Prompts, seed: int) -> dict[str, float]:
    """Accuracy of a learner on a set's test images, whose features are computed once."""
    pixels, labels = test_pixels(images, model.cfg.image_size)
    features = encode_images(model, pixels)
    if cfg.condition == "none":
        weights = _one_context(learner, model, texts)
        return accuracy(lambda x: model.logits(x, weights), features, labels)
    if cfg.condition == "meta":
        moved = learner.meta_net(features)
    else:
        moved = jnp.mean(delta_tokens.delta_groups(learner, model, pixels, cfg, seed)[1], axis=0)
    both, width = jnp.concatenate([features, moved], axis=1), features.shape[1]
    return accuracy(lambda x: _own_contexts(learner, model, texts, x[:, :width], x[:, width:]), both, labels, TEST_AT_ONCE)


@jax.jit
def _one_context(learner: Learner, model: CLIP, texts: ClassTexts) -> jax.Array:
    return prompts.prompt_features(model, texts, learner.contexts(None))[0]


@jax.jit
def _own_contexts(learner: Learner, model: CLIP, texts: ClassTexts, features: jax.Array, moved: jax.Array) -> jax.Array:
    return prompts.prompt_logits(model, texts, features, learner.contexts(moved))
