"""Accuracy on the synthetic tasks, by task and length bin, from one teacher-forced pass over each example."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import Config
from metajax.core.errors import require
from metajax.core.progress import progress
from metajax.data.pipeline import Corpora, task_examples
from metajax.data.rows import Row, batches
from metajax.data.tasks import task as registered
from metajax.data.tasks.examples import PAUSES, assemble
from metajax.distributed.mesh import row_shards
from metajax.evaluation.statistics import share_interval
from metajax.evaluation.validation import totals
from metajax.training.losses import token_scores
from metajax.training.program import Program

Right = Callable[[Any, dict[str, jax.Array]], jax.Array]  # (model, batch) -> whether each target is the most likely id [B, T]
Results = dict[str, dict[str, dict[str, Any]]]


def is_top(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Whether each target is the most likely id."""
    return token_scores(model, batch).is_top


def evaluate_tasks(program: Program, corpora: Corpora, model: Any, is_right: Right = is_top) -> Results:
    """{task: {length: numbers}} over the test examples of every bin of `tasks.eval_lengths`; see `summarise` for the numbers.

    A bin that is too long for the model's learned position table has `exact` None and a `reason`.

    Args:
      is_right: which targets a model finds; an intervention passes its own. Jitted once for each function and shape.
    """
    tasks, results = corpora.config.tasks, {}
    with progress(f"evaluating {', '.join(tasks.names)}", total=len(tasks.names) * len(tasks.eval_lengths)) as advance:
        for task in tasks.names:
            chance, results[task] = registered.find(task, "tasks.names").chance(tasks), {}
            for length in tasks.eval_lengths:
                reason = impossible(program.config, length)
                scored = {"exact": None, "token": None, "n": 0, "reason": reason}
                if reason is None:
                    batches = task_batches(corpora, task, length, row_shards(program.mesh))
                    scored = summarise(totals(program, batches, partial(_sums, model, is_right=is_right)))
                results[task][str(length)] = scored | {"chance": chance}
                advance(1)
    return results


def task_batches(corpora: Corpora, task: str, length: int, shards: int) -> list[Row]:
    """The test examples of one bin, one per row of `length` positions, in batches of equal shape; the same for every run.

    A batch is no larger than a training micro-batch, but a multiple of `shards` rows. Padding rows fill the last one.
    """
    config, examples = corpora.config, task_examples(corpora)
    positions = config.data.batch_size * config.row_positions // config.training.accumulation_steps
    size = max(1, positions // length // shards) * shards
    pauses = PAUSES if config.meta_tokens is not None else None
    tests = [examples.test(task, length, n) for n in range(examples.tasks.eval_examples)]
    rows = [assemble([example], length, corpora.tokenizer, pauses) for example in tests]
    return batches(rows, size, corpora.tokenizer.vocabulary.pad)


def impossible(config: Config, length: int) -> str | None:
    """Why the model of a config cannot read rows of `length` positions, or None."""
    table = max(config.row_positions, config.model.max_positions)
    if config.model.position == "learned" and length > table:
        return f"the position table has {table} rows; raise model.max_positions before training"
    return None


def check_bins(config: Config) -> None:
    """UserError before training if the model can read none of `tasks.eval_lengths`, so that there would be no mean."""
    tasks, evaluation = config.tasks, config.evaluation
    if tasks is not None and (evaluation.every or not evaluation.documents):
        readable = any(impossible(config, length) is None for length in tasks.eval_lengths)
        require(readable, f"tasks.eval_lengths = {tasks.eval_lengths}: the model can read none of them")


def mean_exact(results: Results) -> float:
    """Exact-match accuracy averaged over all tasks and bins that could be evaluated."""
    exact = [scored["exact"] for bins in results.values() for scored in bins.values()]
    return float(np.mean([value for value in exact if value is not None]))


def summarise(sums: dict[str, int]) -> dict[str, Any]:
    """Accuracies in [0, 1] with Wilson 95 % intervals.

    exact: every answer token and the end token after them are right. This equals the accuracy of greedy decoding: up to the
    first mistake both read the same tokens. token: the share of answer tokens that are right given the right ones before.
    Tokens of one answer are not independent, so both intervals count examples (n), not tokens.
    """
    n, token = sums["examples"], sums["right_tokens"] / sums["tokens"]
    out: dict[str, Any] = {"exact": sums["exact"] / n, "token": token, "n": n, "tokens": sums["tokens"]}
    for name, right in (("exact", sums["exact"]), ("token", round(token * n))):
        out[f"{name}_low"], out[f"{name}_high"] = share_interval(right, n)
    return out


@partial(jax.jit, static_argnames="is_right")
def _sums(model: Any, batch: dict[str, jax.Array], *, is_right: Right) -> dict[str, jax.Array]:
    """Counts over a batch whose rows hold one example each; padding rows are not counted."""
    right = is_right(model, batch)
    asked, answer = batch["loss_weights"] > 0, batch["is_body"]
    return {
        "examples": jnp.sum(jnp.any(answer, axis=1)),
        "exact": jnp.sum(jnp.all(right | ~asked, axis=1) & jnp.any(answer, axis=1)),
        "tokens": jnp.sum(answer),
        "right_tokens": jnp.sum(right & answer),
    }
