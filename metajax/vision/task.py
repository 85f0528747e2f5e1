"""Runs on images as tasks: code that CLIP training and prompt learning share, and the report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from metajax.core.progress import say
from metajax.data.pipeline import Paths
from metajax.runs.directory import RunDirectory
from metajax.runs.files import read_lines
from metajax.training.task import Task
from metajax.training.trainer import Trained
from metajax.vision.config import ImageConfig
from metajax.vision.data.sets import ImageSet

DETAILS = "analysis/delta_tokens.json"  # in a run's folder: data of the figures of its delta tokens


def image_task(config: ImageConfig, paths: Paths, devices: list[jax.Device] | None = None) -> ImageTask:
    """The task of a run on images: a CLIP trained from scratch, or a prompt learner on a frozen CLIP."""
    if config.prompts is None:
        from metajax.vision.contrastive import ContrastiveTask

        return ContrastiveTask(config, paths, devices)
    from metajax.vision.prompt_learning import PromptTask

    return PromptTask(config, paths, devices)


class ImageTask(Task):
    """A run on images; see its two subclasses."""

    config: ImageConfig
    paths: Paths
    epoch: int  # steps of one epoch
    sets: list[ImageSet]  # all image sets of the run
    step_flops: float  # FLOPs of a step on all hosts
    unit = counted = "images"

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Results for "eval" in the report; arrays for figures are in "details" of "delta"."""
        raise NotImplementedError

    def count(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {"images": len(batch["pixels"]), "flops": self.step_flops / self.program.rows.count}

    def report(self, trained: Trained, run: RunDirectory) -> dict[str, Any]:
        say(f"evaluating {self.config.name}")
        began, model = time.monotonic(), self.program.whole(trained.state.model)
        results = self.evaluate(model)
        if details := results.get("delta", {}).pop("details", None):
            run.write(DETAILS, details)
        # The first step also waits for the start of the pipeline and is left out.
        here, seconds = trained.time["steps_here"], trained.time["train_seconds"]
        step = (seconds - trained.startup["first_step"]) / (here - 1) if here > 1 else None
        speed = {"step_seconds": step, "images_per_second": step and self.program.batch_size / step}
        return {
            "parameters": count_parameters(model, self.config),
            "flops_per_token": {},
            "counts": {"images": 0, **trained.counts},
            "eval": results,
            "training": self._course(run),
            "time": speed | {"evaluate_seconds": time.monotonic() - began},
            "analyses": self._analyses(run),
            "sample": None,
            "corpora": [describe(images) for images in self.sets],
        }

    def _course(self, run: RunDirectory) -> dict[str, dict[str, float]]:
        """Mean losses over the first and the last epoch; over the first and last tenth of a run of one long epoch."""
        lines = [line for line in read_lines(run.path / "metrics.jsonl") if "loss" in line]
        span = self.epoch if self.epoch < self.steps else max(1, self.steps // 10)
        names = [name for name in ("loss", "ce", "ad_triplet") if lines and name in lines[0]]
        mean = lambda name, part: float(np.mean([line[name] for line in part]))  # noqa: E731
        return {name: {"first": mean(name, lines[:span]), "last": mean(name, lines[-span:])} for name in names}

    def _analyses(self, run: RunDirectory) -> dict[str, Any]:
        """The attention of the class token. With several processes this is left to `analyze`, which runs in one process."""
        from metajax.vision.analyses import image_analysis
        from metajax.vision.study import open_image_study

        if jax.process_count() > 1:
            return {}
        study = open_image_study(run.path, self.config, self.paths)
        return dict(image_analysis.run(study, [name for name in image_analysis.fitting(study) if name == "attention"], run.path))


def count_parameters(model: Any, config: ImageConfig) -> dict[str, int]:
    """Trained parameters by part and "total"; none where nothing is trained."""
    if config.prompts is not None and not config.prompts.context:
        return {"total": 0}
    own = {name: part for name, part in vars(model).items() if not name.startswith("_") and name != "cfg" and part is not None}
    return {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in (own | {"total": model}).items()}


def describe(images: ImageSet) -> dict[str, Any]:
    """The description of a set in reports."""
    splits = {name: len(items) for name, items in images.splits.items()}
    return {"spec": images.spec, "classes": len(images.classes), "splits": splits, "attribution": images.attribution}
