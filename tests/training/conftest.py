"""Tiny runs of three kinds, for tests that hold for each: six steps, with the last checkpoint at the sixth."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from metajax.core.fields import override
from metajax.experiment import open_task, run_experiment
from metajax.runs.directory import default_workdir
from metajax.training.replay import replay
from tests.small_images import CLIP, learner


class Family(NamedTuple):
    """name; config(**changes) of a run; explodes: changes after which a step is soon not finite."""

    name: str
    config: Callable[..., Any]
    explodes: dict[str, Any]

    def replay(self, bundle, config, paths):
        """The recomputed step of a bundle."""
        return replay(bundle, open_task(config, paths).program)


LEARNER = {
    "images.shots": 2,
    "prompts.augment": 0.5,
    "prompts.augmentations": ("crop", "grayscale", "horizontal_flip"),
    "prompts.batch": 5,
    "prompts.warmup_rate": 0.01,
}


@pytest.fixture(scope="session")
def clip_run(paths):
    """The folder of a CLIP that prompt learners start from."""
    config = override(CLIP, {"training.steps": 1})
    workdir = default_workdir(config, paths.runs)
    run_experiment(config, workdir, paths)
    return workdir


@pytest.fixture(params=["text", "contrastive", "prompts"])
def family(request, tiny_config, monkeypatch):
    """Each family of runs in turn, without report.html, which takes longer than these runs."""
    monkeypatch.setattr("metajax.experiment.write_report", lambda workdir: None)
    if request.param == "text":
        return Family("text", tiny_config, {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0})
    from metajax.vision import prompt_learning

    monkeypatch.setattr(prompt_learning, "PROFILED", 6)  # silhouettes and t-SNE of few images are quick
    monkeypatch.setattr("metajax.vision.task.ImageTask._analyses", lambda task, run: {})
    if request.param == "contrastive":
        made, explodes = CLIP, {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0}
    else:
        made = learner(request.getfixturevalue("clip_run"), **LEARNER)
        explodes = {"prompts.learning_rate": 1e30, "prompts.warmup_rate": 1e30}
    return Family(request.param, lambda **changes: override(made, changes), explodes)
