"""Config of the training data: sources, metadata, packing and synthetic tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from metajax.core.errors import require
from metajax.core.fields import Count, CountOrZero, NotNegative, Part, Range, Share, Size

Length = Annotated[int, Range(2, 2**20)]


@dataclass(frozen=True)
class Switch(Part, path="data.switch"):
    """A change of the data from a given step on (annealing, cooldown); parameters, optimiser state and schedule continue."""

    step: Count
    weights: tuple[NotNegative, ...] = ()  # of the sources; empty: as before
    metadata: Literal["same", "none"] = "same"  # none: documents without metadata from here on (MeCo)
    # Share of the training documents that are read only from this step on; 0: all are read before and after it.
    unseen: Annotated[float, Range(0, below=1)] = 0.0

    @property
    def fresh(self) -> bool:
        """Whether rows change at the step: other documents, or the same documents without metadata."""
        return self.unseen > 0 or self.metadata == "none"


RENAMED = {"row_length": "sequence_length", "batch_rows": "batch_size", "held_out": "validation_share"}


@dataclass(frozen=True)
class Data(Part, path="data", renamed=RENAMED):
    """The sources and how their documents become rows. A source is `KIND[:PATH][?text=COLUMN&origin=COLUMN]`."""

    sources: tuple[str, ...] = ("pydocs",)
    weights: tuple[NotNegative, ...] = ()  # one per source; empty: equal
    switch: Switch | None = None
    tokenizer: str = "bpe:2048"
    sequence_length: Annotated[int, Range(8, 2**20)] = 256
    batch_size: Size = 8  # rows of the global batch, whatever the number of hosts
    packing: Literal["concat", "best_fit", "new_document"] = "concat"  # metajax/data/packing.py
    attend_across_documents: bool = False
    validation_share: Annotated[float, Range(above=0, below=1)] = 0.05  # share of origins kept for evaluation
    min_bytes: CountOrZero = 0  # shorter documents are left out of training and evaluation
    on_bad_record: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources is empty; name at least one, such as pydocs")
        count = len(self.sources)
        for name, weights in (("data.weights", self.weights), ("data.switch.weights", self.switch and self.switch.weights)):
            if weights:
                agree = f"data.sources has {count} entries but {name} has {len(weights)}; they must agree"
                require(len(weights) == count, agree)
                require(sum(weights) > 0, f"{name} = {weights}: one of them has to be above 0")


REMOVED = {"train_examples": (90_000, "a task has 90,000"), "classes": (4, "segment counting has the answers 0 to 3")}


@dataclass(frozen=True)
class Tasks(Part, path="tasks", removed=REMOVED):
    """Synthetic tasks instead of documents as training text (Language Modeling with Learned Meta-Tokens, section 4, appendix D;
    needle and mqar for Hymba).

    A length counts every position of an example: BOS, prompt and answer. Each task is a file in metajax/data/tasks.
    Neutral text fills the positions that remain.
    """

    names: tuple[str, ...] = ("list_recall", "segment_counting", "parity", "copying")  # tasks in metajax/data/tasks, or your own
    train_length: Size = 128  # longest training example; the paper uses 128, 256, 512 and more
    # Curriculum: equal parts of the training steps. Each number is the phase's longest example as a share of train_length.
    # The paper has five phases and does not state their bounds; halving is inferred from the names of its splits.
    phases: tuple[Share, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    eval_lengths: tuple[Length, ...] = (64, 128, 256)  # upper ends of the bins; a bin reaches down to half of it
    eval_examples: Count = 1_000  # in every bin; the paper has 10,000 test examples per task over all bins
    # Positions of an example's meta-tokens: the places its question refers to, as many random places, or none.
    # Without "deliberate" an ordinary token marks the places. The paper uses "deliberate".
    placement: Literal["deliberate", "random", "none"] = "deliberate"
    lists: Size = 6  # most named lists in an example; this size and those below are not stated in the paper
    items: Size = 8  # most items of a list
    bits: Size = 6  # most bits before the pause (parity)
    span: Size = 6  # most words to copy
    pairs: Size = 64  # most key-value pairs (mqar), and at most a quarter of a row's positions

    def __post_init__(self) -> None:
        require(len(self.names) > 0, "tasks.names is empty; name at least one, such as parity")
        require(len(self.phases) > 0, "tasks.phases is empty: a share of tasks.train_length for each phase")
        lengths = self.eval_lengths
        require(len(set(lengths)) == len(lengths), f"tasks.eval_lengths = {lengths}: different lengths")
        require(self.items >= 3, f"tasks.items = {self.items}: at least 3, so that a list holds what is asked for")

    def pauses(self, sequence_length: int) -> int:
        """The largest number of meta-tokens in a training row, with or without meta-attention."""
        return sequence_length // 8
