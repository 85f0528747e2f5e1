"""The frozen CLIP of a prompt learner, from a run or from a published folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from metajax.core.errors import require
from metajax.data.pipeline import Paths
from metajax.distributed.mesh import make_mesh
from metajax.runs.directory import check_data, find_run, read_config
from metajax.training.checkpoints import read_parameters
from metajax.vision.clip.model import CLIP
from metajax.vision.config import ImageConfig
from metajax.vision.data.clip_tokens import ClipTokenizer
from metajax.vision.data.words import WordTokenizer
from metajax.vision.weights import load_clip


def whole(config: ImageConfig) -> Sharding:
    """The replicated sharding over all devices of the run; with several processes, one device of each process."""
    if jax.process_count() > 1:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(make_mesh(config.runtime.mesh), PartitionSpec())


def open_clip(config: ImageConfig, paths: Paths) -> tuple[CLIP, Any]:
    """(model, tokenizer) of a prompt learner; UserError if they cannot be found."""
    here = whole(config)
    if config.weights:
        place = Path(str(paths.data)) / config.weights if paths.data is not None else Path(config.weights)
        vocabulary = place.parent if place.suffix == ".pt" else place
        model = load_clip(place, config.runtime, config.prompts.compute_dtype or "float32")
        return jax.device_put(model, here), ClipTokenizer.open(vocabulary, markers=False)
    parent = find_run(config.init.from_, paths.runs)
    theirs = read_config(parent)
    a_clip = isinstance(theirs, ImageConfig) and theirs.clip is not None and theirs.prompts is None
    require(a_clip, f"init.from = {config.init.from_}: not the run of a CLIP")
    clip = replace(theirs.clip, compute_dtype=config.prompts.compute_dtype or theirs.clip.compute_dtype)
    words = WordTokenizer.load(parent)
    check_data(parent, tokenizer=words.fingerprint())
    return clip_of_run(parent, replace(theirs, clip=clip, runtime=config.runtime), here), words


def clip_of_run(workdir: Path, config: ImageConfig, sharding: Sharding) -> CLIP:
    """The CLIP in the newest checkpoint of a run."""
    model = jax.eval_shape(lambda: CLIP(config.clip, runtime=config.runtime, key=jax.random.key(0)))
    return read_parameters(workdir, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), model))
