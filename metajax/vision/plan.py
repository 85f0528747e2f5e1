"""The step of a run on images as a plan compiles it: shapes in place of its images and weights."""

from __future__ import annotations

import jax
from jax.sharding import NamedSharding, PartitionSpec

from metajax.config import ImageConfig
from metajax.distributed.mesh import make_mesh
from metajax.planning.plan import Planned
from metajax.vision.flops import image_step_flops
from metajax.vision.loop import compile_step
from metajax.vision.sketch import Shapes, sketch


def image_step(config: ImageConfig, devices: list[jax.Device], *, shapes: Shapes) -> Planned:
    """The step of a CLIP or of a prompt learner; texts are as long as `shapes` says."""
    mesh = make_mesh(config.runtime.mesh, devices)
    task, (*held, batch) = sketch(config, shapes)
    key, here = jax.eval_shape(jax.random.key, 0), NamedSharding(mesh, PartitionSpec())
    state, frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), held)
    count = image_step_flops(config, shapes.clip, shapes.classes, shapes.length)
    return Planned(
        mesh, state, frozen, lambda: compile_step(task, mesh, state, frozen, batch, task.choice, key), count,
        (len(batch["pixels"]), "images"),
    )  # fmt: skip
