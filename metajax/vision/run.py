"""A run on images from start to finish: open what it needs, train or resume, evaluate, report."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from metajax.config import ImageConfig, config_hash
from metajax.core.errors import require
from metajax.core.fields import to_dict
from metajax.core.progress import say
from metajax.data.pipeline import Paths
from metajax.runs.directory import RunDirectory
from metajax.runs.files import mark_of, read_lines
from metajax.runs.pace import Phases
from metajax.vision.analyses import image_analysis
from metajax.vision.contrastive import contrastive_task
from metajax.vision.loop import train
from metajax.vision.prompt_learning import prompt_task
from metajax.vision.study import open_image_study
from metajax.vision.task import DETAILS, Task


def make(config: ImageConfig, run: RunDirectory, paths: Paths, phases: Phases) -> dict[str, Any]:
    """Train what is left to train, evaluate, and return the report."""
    require(
        jax.process_count() == 1, f"{config.name} is a run on images, which is made by one process; start it without --processes"
    )
    with phases.time("data"):
        task = (contrastive_task if config.prompts is None else prompt_task)(config, paths)
        run.begin(task.images, task.tokenizer.fingerprint())
        if config.prompts is None:
            task.tokenizer.save(run.path)
    trained = train(task, config, run, phases)
    say(f"evaluating {config.name}")
    began = time.monotonic()
    results = task.evaluate(trained.state.model)
    clock = trained.time | {"evaluate_seconds": time.monotonic() - began, "total_seconds": time.monotonic() - phases.started}
    study = open_image_study(run.path, config, paths)
    maps = dict(image_analysis.run(study, [name for name in image_analysis.fitting(study) if name == "attention"], run.path))
    details = results.get("delta", {}).pop("details", None)
    if details is not None:
        run.write(DETAILS, details)
    return {
        "name": config.name,
        "scale": config.scale,
        "seed": config.seed,
        "hash": config_hash(config),
        "steps": task.steps,
        "parameters": count(trained.state.model, config),
        "flops_per_token": {},
        "counts": {"images": trained.state.step.item() * len(task.batches[0]["pixels"])},
        "eval": results,
        "training": course(run, task),
        "analyses": maps,
        "sample": None,
        "startup": dict(phases.seconds),
        "time": clock,
        "metrics": mark_of((run.path / "metrics.jsonl").read_bytes()),
        "restarted_from": trained.restarted_from,
        "parent": config.init.from_ or None,
        "warnings": run.warnings,
        "corpora": task.manifest,
        "config": to_dict(config),
    }


def count(model: Any, config: ImageConfig) -> dict[str, int]:
    """Trained parameters by part and "total"; none where nothing is trained."""
    if config.prompts is not None and not config.prompts.context:
        return {"total": 0}
    parts = {name: part for name, part in vars(model).items() if not name.startswith("_") and name != "cfg" and part is not None}
    parts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in parts.items()}
    return {**parts, "total": sum(x.size for x in jax.tree.leaves(model))}


def course(run: RunDirectory, task: Task) -> dict[str, dict[str, float]]:
    """Means of losses over the first and the last epoch; a run of one long epoch has its first and last tenth."""
    lines = read_lines(run.path / "metrics.jsonl")
    span = task.epoch if task.epoch < task.steps else max(1, task.steps // 10)
    names = [name for name in ("loss", "ce", "ad_triplet") if lines and name in lines[0]]
    return {
        name: {"first": float(np.mean([x[name] for x in lines[:span]])), "last": float(np.mean([x[name] for x in lines[-span:]]))}
        for name in names
    }
