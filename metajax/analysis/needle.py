"""The needle: a named item at any depth of neutral text, by the length of the text and the depth.

Source: Hymba (arXiv 2411.13676), figure 10; its prompts are not known, those here are in metajax/data/tasks/prompts.py.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from metajax.analysis.study import Batch, Study, open_study
from metajax.core.errors import require
from metajax.evaluation.tasks import impossible
from metajax.models.lm import LM
from metajax.training.step import apply_model

DEPTHS = 10  # equal parts of the text


def is_right(model: LM, batch: Batch) -> dict[str, Bool[Array, " B"]]:
    """Whether every token of the answer is the likeliest."""
    right = jnp.argmax(apply_model(model, batch), axis=-1) == batch["targets"]
    return {"right": jnp.all(right | ~batch["is_body"], axis=1)}


def depth_of(tokens: np.ndarray, asked: int, answer: int) -> float:
    """Where in the prompt, from 0 to 1, the token of the answer stands."""
    return float(np.flatnonzero(tokens[:asked] == answer)[0] / asked)


def needle(study: Study) -> dict[str, Any]:
    """{length: {exact, n, depths: [{exact, n}, ...]}} over the test examples of every length that the model can read."""
    tasks = study.corpora.config.tasks
    require(tasks is not None and "needle" in tasks.names, "needle: the run has no task of that name; set tasks.names=needle")
    found = {}
    for length in tasks.eval_lengths:
        if impossible(study.program.config, length) is not None:
            continue
        part = open_study(study.program, study.corpora, study.model, task="needle", length=length, prompts=tasks.eval_examples)
        right = part.over_prompts(f"needles in {length} tokens", is_right, part.model)["right"]
        answers = part.rows["targets"][np.arange(part.count), part.asked]
        depths = [depth_of(*row) for row in zip(part.rows["tokens"], part.asked.tolist(), answers.tolist(), strict=True)]
        bins = np.minimum((np.array(depths) * DEPTHS).astype(int), DEPTHS - 1)
        cells = [
            {"exact": float(right[bins == d].mean()) if (bins == d).any() else None, "n": int((bins == d).sum())}
            for d in range(DEPTHS)
        ]
        found[str(length)] = {"exact": float(right.mean()), "n": len(right), "depths": cells}
    return found
