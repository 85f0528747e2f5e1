"""Evaluation of a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from metajax.core.errors import require
from metajax.core.fields import Count, CountOrZero, Part, Range

# Sampling of tokens.
Temperature = Annotated[float, Range(0, 10**6)]
TopK = CountOrZero
TopP = Annotated[float, Range(above=0, most=1)]
Guidance = Annotated[float, Range(-1000, 1000)]


@dataclass(frozen=True)
class Choice(Part, path="evaluation.choice"):
    """Multiple-choice questions from local files, scored by log-likelihood as the lm-evaluation-harness does."""

    tasks: tuple[str, ...]  # KIND:FILE[?shots_from=FILE], such as arc_easy:arc_easy/test.jsonl
    # Numbers of solved questions before each question. All are evaluated; the first gives the task's result.
    shots: tuple[Annotated[int, Range(0, 10_000)], ...] = (5,)
    # The context before the prompt: nothing, the empty pair of delimiters, or the task's source (MeCo's conditional inference).
    contexts: tuple[Literal["none", "empty", "task"], ...] = ("none",)
    examples: Count = 1000  # of a task, at most

    def __post_init__(self) -> None:
        remedy = "name one, such as arc_easy:FILE, or leave evaluation.choice out"
        require(len(self.tasks) > 0, f"evaluation.choice.tasks is empty; {remedy}")
        require(len(self.shots) > 0, "evaluation.choice.shots is empty; 0 shows no solved question first")
        require(len(self.contexts) > 0, "evaluation.choice.contexts is empty; `none` puts nothing before the questions")


@dataclass(frozen=True)
class Evaluation(Part, path="evaluation"):
    every: CountOrZero = 0  # steps between validation evaluations during training; 0: only at the end
    documents: CountOrZero = 400  # validation documents, in an order fixed by the corpus; 0 skips them if there are tasks
    conditions: tuple[Literal["none", "right", "empty", "shuffled"], ...] = ("none",)  # metadata shown at evaluation
    sample_tokens: CountOrZero = 48  # length of the text sample in the report
    choice: Choice | None = None
    # Metadata templates that probes predict from hidden states; the first is a document's topic.
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(len(self.conditions) > 0, "evaluation.conditions is empty; `none` evaluates without metadata")
