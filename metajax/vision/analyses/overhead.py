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
from metajax.analysis.common.timing import against_first, ratio_panel, step_seconds, step_words
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


def compiled_steps(study: ImageStudy) -> tuple[dict[str, Any], dict[str, Any]]:
    """({twin: its train step, state -> state}, {twin: its first state}) on images in memory."""
    bare = replace(study.config.prompts, condition="none", alpha=0.0, augment=0.0, batch=1, class_position="end")
    config = replace(study.config, prompts=bare, images=replace(study.config.images, view="crop"))
    frozen, classes = Frozen.of(config, study.model, study.texts, None), len(study.texts.end)
    steps, states = {}, {}
    with progress("compiling train steps", total=len(TWINS)) as advance:
        for name, changes in TWINS.items():
            twin = override(config, changes)
            program = prompt_program(twin, study.model.cfg, frozen, classes, 1)
            states[name], held = program.create_state(), program.put_everywhere(frozen)
            batch = {"index": np.zeros(1, np.int32), "label": np.zeros(1, np.int32)}
            batch = program.put(batch | {"pixels": study.pixels[None, : 1 + twin.prompts.paired]})
            step = program.compile_step(states[name], batch)
            steps[name] = lambda state, step=step, batch=batch, held=held: step(state, batch, held)[0]
            advance(1)
    return steps, states


def _needs(study: ImageStudy) -> None:
    require(study.texts is not None, "compares prompt learners; this run trains none")


@image_analysis("overhead", title="Time of a step", fits=lambda study: study.texts is not None, needs=_needs, on_prompts=False)
def overhead(study: ImageStudy) -> dict[str, Any]:
    """For each of TWINS: step, as from `against_first`."""
    classes, tokens, _ = study.texts.embedded.shape
    steps = against_first(step_seconds(*compiled_steps(study), ROUNDS))
    found = {"rounds": ROUNDS, "classes": classes, "tokens": tokens, "device": jax.devices()[0].device_kind}
    return found | {name: {"step": step} for name, step in steps.items()}


@overhead.headlines
def headlines(numbers: Numbers) -> list[str]:
    shape = f"{numbers['classes']} classes of {numbers['tokens']} tokens on {numbers['device']}"
    return [
        f"{shape}; medians of {numbers['rounds']} rounds",
        *(f"{words}: {step_words(numbers[name]['step'])}" for name, words in WORDS.items()),
    ]


@overhead.figures
def figures(result: Numbers) -> Figures:
    figure, (axes,) = panels(1, 1, 1.9)
    ratio_panel(axes, result, WORDS, "time of a train step, x of CoCoOp's")
    caption = f"Medians of {result['rounds']} rounds with one step of every learner; whiskers are quartiles."
    return [(figure, caption)]
