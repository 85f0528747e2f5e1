"""Analyses of a run on images: where its image tower looks, and what a step of AAPL costs beside one of CoCoOp."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import ImageConfig
from metajax.core.errors import require
from metajax.core.fields import override
from metajax.core.progress import progress
from metajax.data.pipeline import Paths
from metajax.runs.files import write_json
from metajax.vision.clip.model import CLIP
from metajax.vision.clip.prompts import ClassTexts
from metajax.vision.clips import clip_of_run, open_clip, whole
from metajax.vision.data.batches import test_pixels
from metajax.vision.data.preprocessing import normalise
from metajax.vision.data.sets import part_of_classes
from metajax.vision.data.sources import open_images
from metajax.vision.prompt_learning import Frozen, prompt_program, texts_for

SHOWN = 6  # test images
ROUNDS = 40  # of steps, each twin having its turn in each
TWINS = {  # of one image a step, as CoCoOp and AAPL are published; the others are compared with the first
    "cocoop": {"prompts.condition": "meta"},
    "coop": {"prompts.condition": "none"},
    "cocoop_augmented": {"prompts.condition": "meta", "prompts.augment": 1.0},
    "aapl": {"prompts.condition": "meta", "prompts.alpha": 0.2},
}


@dataclass(frozen=True)
class ImageStudy:
    """A run's CLIP, some test images of its first source with classes, and the texts of a learner's classes (None without one)."""

    config: ImageConfig
    model: CLIP
    pixels: np.ndarray  # uint8[SHOWN, size, size, 3]
    names: tuple[str, ...]  # of their classes
    attribution: str
    texts: ClassTexts | None


def open_image_study(workdir: Path, config: ImageConfig, paths: Paths) -> ImageStudy:
    """Of a complete run."""
    sources = (open_images(spec, paths.cache, paths.data) for spec in config.images.sources)
    images, texts = next(source for source in sources if source.classes), None
    if config.prompts is None:
        model = clip_of_run(workdir, config, whole(config))
    else:
        model, tokenizer = open_clip(config, paths)
        if config.prompts.context:
            texts = texts_for(model, tokenizer, part_of_classes(images, config.images.classes), config.prompts)
    pixels, labels = test_pixels(images, model.cfg.image_size)
    chosen = np.linspace(0, len(labels) - 1, SHOWN).astype(int)
    names = tuple(images.classes[label] for label in labels[chosen])
    return ImageStudy(config, model, pixels[chosen], names, images.attribution, texts)


def attention(study: ImageStudy) -> dict[str, Any]:
    """What the class token weighs the patches with: in the last block (mean over heads), and over all blocks, each of whose maps is
    averaged with what passes it by (rollout, Abnar and Zuidema, arXiv 2005.00928); float[SHOWN, side, side] each."""
    require(bool(study.model.cfg.patch), "attention: a ResNet has no class token that looks at patches")
    maps = np.asarray(_probabilities(study.model, study.pixels)).mean(axis=2)  # [L, N, query, key]
    rolled = np.eye(maps.shape[-1])
    for block in maps:
        rolled = (block + np.eye(maps.shape[-1])) / 2 @ rolled
    side = study.model.cfg.image_size // study.model.cfg.patch
    last, rollout = (found[:, 0, 1:].reshape(-1, side, side) for found in (maps[-1], rolled))
    return {
        "itself": float(maps[-1][:, 0, 0].mean()),
        "details": {
            "pixels": study.pixels.tolist(), "names": study.names, "attribution": study.attribution,
            "last": last.round(4).tolist(), "rollout": rollout.round(4).tolist(),
        },
    }  # fmt: skip


@jax.jit
def _probabilities(model: CLIP, pixels: jax.Array) -> jax.Array:
    return model.visual(normalise(jnp.asarray(pixels), model.cfg), ("attention_probabilities",))[1]["attention_probabilities"]


def overhead(study: ImageStudy) -> dict[str, Any]:
    """For each of TWINS: step {ms, ratio, ratio_low, ratio_high}, medians and quartiles over ROUNDS of its time over the first twin's of the
    same round. Images are there already: reading them is not in it."""
    require(study.texts is not None, "overhead: compares prompt learners; this run trains none")
    seconds, first = step_seconds(study), next(iter(TWINS))
    classes, tokens, _ = study.texts.embedded.shape
    found: dict[str, Any] = {"rounds": ROUNDS, "classes": classes, "tokens": tokens, "device": jax.devices()[0].device_kind}
    for name, taken in seconds.items():
        low, ratio, high = np.quantile(taken / seconds[first], (0.25, 0.5, 0.75)).tolist()
        found[name] = {"step": {"ms": 1e3 * float(np.median(taken)), "ratio": ratio, "ratio_low": low, "ratio_high": high}}
    return found


def step_seconds(study: ImageStudy) -> dict[str, np.ndarray]:
    """Seconds of a train step, [ROUNDS] for each of TWINS, taken in turns after one step of each that is left out."""
    bare = replace(study.config.prompts, condition="none", alpha=0.0, augment=0.0, batch=1, class_position="end")
    config = replace(study.config, prompts=bare, images=replace(study.config.images, view="crop"))
    frozen = Frozen.of(config, study.model, study.texts, None)
    classes, ready = len(study.texts.end), {}
    with progress("compiling train steps", total=len(TWINS)) as advance:
        for name, changes in TWINS.items():
            twin = override(config, changes)
            program = prompt_program(twin, study.model.cfg, frozen, classes, 1)
            state, held = program.create_state(), program.put_everywhere(frozen)
            batch = {"index": np.zeros(1, np.int32), "label": np.zeros(1, np.int32)}
            batch = program.put(batch | {"pixels": study.pixels[None, : 1 + twin.prompts.paired]})
            ready[name] = (program.compile_step(state, batch), state, (batch, held))
            advance(1)
    taken: dict[str, list[float]] = {name: [] for name in TWINS}
    for _ in range(ROUNDS + 1):
        for name, (step, state, arguments) in ready.items():
            began = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, *arguments))
            taken[name].append(time.perf_counter() - began)
            ready[name] = (step, state, arguments)
    return {name: np.array(seconds[1:]) for name, seconds in taken.items()}


ANALYSES = {function.__name__: function for function in (attention, overhead)}


def fitting(study: ImageStudy) -> tuple[str, ...]:
    """The analyses that this run is meant for."""
    wanted = {"attention": bool(study.model.cfg.patch), "overhead": study.texts is not None}
    return tuple(name for name, is_meant in wanted.items() if is_meant)


def run_image_analyses(study: ImageStudy, names: Sequence[str], workdir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make the analyses one by one, write each to WORKDIR/analysis/NAME.json, and yield (name, its numbers without `details`)."""
    for name in names:
        require(name in ANALYSES, f"{name}: not of runs on images; these are {', '.join(ANALYSES)}")
        result = ANALYSES[name](study)
        write_json(workdir / "analysis" / f"{name}.json", {"name": name, "result": result})
        yield name, {key: value for key, value in result.items() if key != "details"}
