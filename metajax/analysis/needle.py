"""The needle: retrieval of a named item at any depth of neutral text, by the length of the text and the depth.

Exact match by the length of the text and the depth of the needle. The paper shows its values only in a figure.

Source: Hymba (arXiv 2411.13676), figure 10. Its prompts are not stated; ours are in metajax/data/tasks/prompts.py.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.study import Arrays, Study, open_study
from metajax.core.errors import require
from metajax.evaluation.tasks import impossible
from metajax.models.lm import LM
from metajax.reporting.panels import heat, panels
from metajax.training.losses import token_scores

DEPTHS = 10  # number of equal parts of the text


def is_right(model: LM, batch: Arrays) -> dict[str, Bool[Array, " B"]]:
    """Whether every token of the answer is the most likely one."""
    right = token_scores(model, batch).is_top
    return {"right": jnp.all(right | ~batch["is_body"], axis=1)}


def depth_of(tokens: np.ndarray, asked: int, answer: int) -> float:
    """The position of the answer's token in the prompt, from 0 to 1."""
    return float(np.flatnonzero(tokens[:asked] == answer)[0] / asked)


def _needs(study: Study) -> None:
    tasks = study.corpora.config.tasks
    require(tasks is not None and "needle" in tasks.names, "the run has no task of that name; set tasks.names=needle")


@analysis("needle", title="The needle", fits=lambda study: study.task == "needle" and study.model.meta is None, needs=_needs)
def needle(study: Study) -> dict[str, Any]:
    """{length: {exact, n, depths: [{exact, n}, ...]}} over the test examples of every length that the model can read."""
    tasks, found = study.corpora.config.tasks, {}
    for length in (length for length in tasks.eval_lengths if impossible(study.program.config, length) is None):
        part = open_study(study.program, study.corpora, study.model, task="needle", length=length, prompts=tasks.eval_examples)
        right = part.over_prompts(f"needles in {length} tokens", is_right)["right"]
        prompts = zip(part.rows["tokens"], part.asked.tolist(), part.answers.tolist(), strict=True)
        bins = np.minimum((np.array([depth_of(*prompt) for prompt in prompts]) * DEPTHS).astype(int), DEPTHS - 1)
        parts = [right[bins == depth] for depth in range(DEPTHS)]
        cells = [{"exact": float(cell.mean()) if len(cell) else None, "n": len(cell)} for cell in parts]
        found[str(length)] = {"exact": float(right.mean()), "n": len(right), "depths": cells}
    return found


@needle.headlines
def headlines(numbers: Numbers) -> list[str]:
    return [f"{length} tokens: {n['exact']:.1%} of {n['n']:,} needles found" for length, n in _by_length(numbers).items()]


@needle.figures
def figures(result: Numbers) -> Figures:
    found = _by_length(result)
    values = np.array([[cell["exact"] for cell in n["depths"]] for n in found.values()], float)  # None becomes NaN
    figure, (axes,) = panels(1, 1, 0.9 + 0.45 * len(found))
    heat(figure, axes, values, vmin=0, vmax=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_xticks(range(DEPTHS), [f"{100 * d // DEPTHS} %" for d in range(DEPTHS)], fontsize=8.5)
    axes.set(xlabel="depth of the needle, from", ylabel="tokens")
    return [(figure, "Exact match; a white cell has no example.")]


def _by_length(numbers: Numbers) -> dict[str, Any]:
    return {length: n for length, n in numbers.items() if length.isdigit()}  # a report adds `made_on`
