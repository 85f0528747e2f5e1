"""Cost of a train step: AAPL and its relatives beside CoCoOp, in turns in one process.

Train steps of learners of this run's shapes, one image each, in turns in one process. The images are in memory, so reading them
takes no time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from metajax.analysis import Figures, Numbers
from metajax.analysis.common.timing import ratio_panel, step_words, time_steps
from metajax.core.errors import require
from metajax.core.fields import override
from metajax.core.progress import progress
from metajax.reporting.panels import panels
from metajax.vision.analyses import image_analysis
from metajax.vision.prompt_learning import Frozen, prompt_program
from metajax.vision.study import ImageStudy

ROUNDS = 40  # each has one step of every twin
TWINS = {  # one image per step, as published for CoCoOp and AAPL; the others are compared with the first
    "cocoop": {"prompts.condition": "meta"},
    "coop": {"prompts.condition": "none"},
    "cocoop_augmented": {"prompts.condition": "meta", "prompts.augment": 1.0},
    "aapl": {"prompts.condition": "meta", "prompts.alpha": 0.2},
}
WORDS = {"cocoop": "CoCoOp", "coop": "CoOp", "cocoop_augmented": "CoCoOp, augmented", "aapl": "AAPL"}


def compiled_steps(study: ImageStudy) -> dict[str, tuple[Any, ...]]:
    """{twin: (its train step, its first state, its inputs)} on images in memory."""
    bare = replace(study.config.prompts, condition="none", alpha=0.0, augment=0.0, batch=1, class_position="end")
    config = replace(study.config, prompts=bare, images=replace(study.config.images, view="crop"))
    frozen, classes, steps = Frozen.of(config, study.model, study.texts, None), len(study.texts.end), {}
    with progress("compiling train steps", total=len(TWINS)) as advance:
        for name, changes in TWINS.items():
            twin = override(config, changes)
            program = prompt_program(twin, study.model.cfg, frozen, classes, 1)
            state, held = program.create_state(), program.put_everywhere(frozen)
            batch = {"index": np.zeros(1, np.int32), "label": np.zeros(1, np.int32)}
            batch = program.put(batch | {"pixels": study.pixels[None, : 1 + twin.prompts.paired]})
            steps[name] = (program.compile_step(state, batch), state, batch, held)
            advance(1)
    return steps


def _needs(study: ImageStudy) -> None:
    require(study.texts is not None, "compares prompt learners; this run trains none")


@image_analysis("overhead", title="Time of a step", fits=lambda study: study.texts is not None, needs=_needs, on_prompts=False)
def overhead(study: ImageStudy) -> dict[str, Any]:
    """For each of TWINS: step, as from `time_steps`."""
    classes, tokens, _ = study.texts.embedded.shape
    steps = time_steps(compiled_steps(study), ROUNDS)
    found = {"rounds": ROUNDS, "classes": classes, "tokens": tokens, "device": jax.devices()[0].device_kind}
    return found | {name: {"step": step} for name, step in steps.items()}


@overhead.headlines
def headlines(numbers: Numbers) -> list[str]:
    made_on = f"{numbers['classes']} classes of {numbers['tokens']} tokens on {numbers['device']}; medians of {numbers['rounds']} rounds"
    return [made_on, *(f"{words}: {step_words(numbers[name]['step'])}" for name, words in WORDS.items())]


@overhead.figures
def figures(result: Numbers) -> Figures:
    figure, (axes,) = panels(1, 1, 1.9)
    ratio_panel(axes, result, WORDS, "time of a train step, x of CoCoOp's")
    caption = f"Medians of {result['rounds']} rounds with one step of every learner; whiskers are quartiles."
    return [(figure, caption)]
