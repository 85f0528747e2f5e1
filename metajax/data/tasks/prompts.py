"""The synthetic tasks in words: every prompt string of this project, and how an example is drawn.

List recall:       Fruits: orange peach plum / Tools: hammer wrench level _PAUSE_ / Q: item 3 of Tools? A: level
Segment counting:  Tools: saw _PAUSE_ hammer wrench hammer _PAUSE_ hammer / Q: how many hammer between pauses? A: 2
Parity:            Bits: 1 0 1 1 _PAUSE_ 0 1 0 / Q: xor before pause? A: 1
Copying:           Text: alpha beta [_PAUSE_ gamma delta _PAUSE_] epsilon / Q: copy the span. A: gamma delta

Needle:            Text: alpha beta / Fruits: orange / Text: gamma delta / Q: item 1 of Fruits? A: orange

Each / is a new line. The first four are those of Language Modeling with Learned Meta-Tokens (arXiv 2509.16278, section 4); its prompt
strings are not known, these are ours. The needle is for Hymba (arXiv 2411.13676, figure 10). Lists that do not fill an example's length leave the rest to lines of neutral text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from metajax.config import Tasks

PAUSE = "_PAUSE_"  # a piece that becomes the meta-token
MARK = " |"  # stands at the spots that a question speaks of where no pause does

LISTS = {
    "Fruits": ("orange", "peach", "banana", "plum", "cherry", "grape", "lemon", "mango"),
    "Tools": ("hammer", "wrench", "level", "pliers", "drill", "chisel", "shovel", "ruler"),
    "Animals": ("tiger", "horse", "rabbit", "otter", "eagle", "whale", "zebra", "camel"),
    "Colors": ("crimson", "purple", "yellow", "green", "violet", "amber", "indigo", "scarlet"),
    "Metals": ("copper", "silver", "iron", "nickel", "cobalt", "bronze", "titanium", "zinc"),
    "Trees": ("maple", "willow", "cedar", "birch", "spruce", "poplar", "walnut", "juniper"),
}
TEXT = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "iota",
    "kappa", "lambda", "sigma", "omega", "omicron", "upsilon", "aleph", "gimel",
)  # fmt: skip
NAMES = tuple(LISTS)
TEXT_LINE = 12  # words of a line of neutral text, at most
OUTSIDE = 0.25  # chance of the counted item at each place of its list outside the pauses

_ITEMS = {name: tuple(f" {word}" for word in words) for name, words in LISTS.items()}
_WORDS = tuple(f" {word}" for word in TEXT)
_BITS = (" 0", " 1")
_TEXT_HEAD, _BITS_HEAD, _OPEN, _CLOSE, _LINE = "Text:", "Bits:", " [", "]", "\n"
_RECALL, _COUNT, _BETWEEN, _ASK = "\nQ: item", "\nQ: how many", " between pauses? A:", "? A:"
_PARITY, _COPY = "\nQ: xor before pause? A:", "\nQ: copy the span. A:"

# Pieces that a tokenizer of the kind bpe:N+tasks holds as one token each.
RESERVED_PIECES = (
    *(f"{name}:" for name in NAMES), *(f" of {name}" for name in NAMES), *(word for name in NAMES for word in _ITEMS[name]), *_WORDS,
    *(f" {digit}" for digit in range(10)), _TEXT_HEAD, _BITS_HEAD, _OPEN, _RECALL, _COUNT, _BETWEEN, _ASK, _PARITY, _COPY, MARK,
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One example as pieces: strings that are tokenised one by one, so that an example costs the sum of its pieces."""

    lines: tuple[tuple[str, ...], ...]
    question: tuple[str, ...]
    answer: tuple[str, ...]

    @property
    def prompt(self) -> tuple[str, ...]:
        """Lines and question, the line ends included."""
        first, *rest = self.lines
        return (*first, *(piece for line in rest for piece in (_LINE, *line)), *self.question)

    @property
    def text(self) -> str:
        """Prompt and answer as a person reads them."""
        return "".join(f" {PAUSE}" if piece == PAUSE else piece for piece in (*self.prompt, *self.answer))


def chance(task: str, tasks: Tasks) -> float:
    """Exact-match accuracy of the best guess that ignores everything but the question."""
    words = len(next(iter(LISTS.values())))
    return {
        "list_recall": 1 / words,
        "segment_counting": 1 / tasks.classes,
        "parity": 1 / 2,
        "copying": 1 / (tasks.span * len(TEXT)),
        "needle": 1 / words,
        "mqar": 0.0,  # all values of a row at once
    }[task]


@dataclass(frozen=True)
class Writer:
    """Draws examples that cost at most so many tokens.

    cost: tokens of a piece, the PAUSE included. What fits is decided from the dearest word of each kind, so that it depends on the
    room alone and never on what is drawn.
    """

    tasks: Tasks
    cost: Callable[[str], int]

    def write(self, task: str, rng: np.random.Generator, room: int) -> Example | None:
        """What an example of `task` is about, of at most `room` tokens, or None where not even the smallest fits.

        `fill` makes it as long as the room is.
        """
        return getattr(self, task)(rng, room)

    def fill(self, example: Example, rng: np.random.Generator, room: int) -> Example:
        """The example with lines of neutral text between its own, up to `room` tokens."""
        left = room - self._all(*example.prompt, *example.answer)
        head, lines = self._all(_TEXT_HEAD, _LINE), list(example.lines)
        while words := self._words(rng, left - head, TEXT_LINE):
            lines.insert(int(rng.integers(len(lines) + 1)), (_TEXT_HEAD, *words))
            left -= head + self._all(*words)
        return replace(example, lines=tuple(lines))

    def list_recall(self, rng: np.random.Generator, room: int) -> Example | None:
        """Item j of one of several named lists; the pause stands behind the list that is asked about."""
        dearest = self._dearest
        fixed = self._all(_RECALL, _ASK, PAUSE) + dearest["number"] + dearest["of"] + dearest["item"]
        lists = self._lists(rng, room - fixed, 2)
        if lists is None:
            return None
        name, items = lists[int(rng.integers(len(lists)))]
        at = int(rng.integers(len(items)))
        lines = [(f"{n}:", *words, *([PAUSE] if n == name else [])) for n, words in lists]
        return Example(tuple(lines), (_RECALL, f" {at + 1}", f" of {name}", _ASK), (items[at],))

    def segment_counting(self, rng: np.random.Generator, room: int) -> Example | None:
        """How often an item stands between the two pauses of its list; it stands outside of them too."""
        classes, least = self.tasks.classes, max(2, self.tasks.classes - 1)
        fixed = self._all(_COUNT, _BETWEEN, PAUSE, PAUSE) + self._dearest["item"] + self._dearest["number"]
        lists = self._lists(rng, room - fixed, least)
        if lists is None:
            return None
        chosen = int(rng.integers(len(lists)))
        name, size = lists[chosen][0], len(lists[chosen][1])
        count = int(rng.integers(classes))
        length = int(rng.integers(least, size + 1))
        start = int(rng.integers(size - length + 1))
        item, *others = rng.permutation(_ITEMS[name]).tolist()
        inside = [item] * count + self._draw(rng, others, length - count)
        outside = [item if u < OUTSIDE else word for u, word in zip(rng.random(size), self._draw(rng, others, size), strict=True)]
        segment = [inside[i] for i in rng.permutation(length)]
        line = (f"{name}:", *outside[:start], PAUSE, *segment, PAUSE, *outside[start + length :])
        lines = [line if i == chosen else (f"{n}:", *words) for i, (n, words) in enumerate(lists)]
        return Example(tuple(lines), (_COUNT, item, _BETWEEN), (f" {count}",))

    def parity(self, rng: np.random.Generator, room: int) -> Example | None:
        """The exclusive or of all bits before the pause; bits behind it take the rest of the room.

        With few bits behind the pause a model could learn the training lines by heart, and would.
        """
        bit = self._dearest["bit"]
        free = (room - self._all(_BITS_HEAD, PAUSE, _PARITY) - bit) // bit
        if free < 1:
            return None
        before = int(rng.integers(1, min(self.tasks.bits, free) + 1))
        bits = rng.integers(2, size=free).tolist()
        shown = [_BITS[b] for b in bits]
        line = (_BITS_HEAD, *shown[:before], PAUSE, *shown[before:])
        return Example((line,), (_PARITY,), (_BITS[sum(bits[:before]) % 2],))

    def copying(self, rng: np.random.Generator, room: int) -> Example | None:
        """The words between two pauses and brackets, inside a text."""
        left = room - self._all(_TEXT_HEAD, _OPEN, PAUSE, PAUSE, _CLOSE, _COPY)
        free = left // (2 * self._dearest["word"])  # a word stands in the text and in the answer
        if free < 1:
            return None
        span = self._draw(rng, _WORDS, int(rng.integers(1, min(self.tasks.span, free) + 1)))
        text = self._words(rng, left - 2 * self._all(*span), room)
        at = int(rng.integers(len(text) + 1))
        line = (_TEXT_HEAD, *text[:at], _OPEN, PAUSE, *span, PAUSE, _CLOSE, *text[at:])
        return Example((line,), (_COPY,), tuple(span))

    def needle(self, rng: np.random.Generator, room: int) -> Example | None:
        """A list of one item; `fill` puts it at any depth of the neutral text."""
        name = NAMES[int(rng.integers(len(NAMES)))]
        item = _ITEMS[name][int(rng.integers(len(_ITEMS[name])))]
        dearest = self._dearest
        if room < self._all(_RECALL, _ASK, " 1") + dearest["head"] + dearest["of"] + 2 * dearest["item"]:
            return None
        return Example(((f"{name}:", item),), (_RECALL, " 1", f" of {name}", _ASK), (item,))

    # ------------------------------------------------------------------------------------------------------ parts

    def _all(self, *pieces: str) -> int:
        return sum(map(self.cost, pieces))

    @cached_property
    def _dearest(self) -> dict[str, int]:
        """Tokens of the dearest piece of each kind."""
        kinds = {
            "head": [f"{name}:" for name in NAMES],
            "of": [f" of {name}" for name in NAMES],
            "item": [item for items in _ITEMS.values() for item in items],
            "number": [f" {j}" for j in range(max(self.tasks.items + 1, self.tasks.classes))],
            "bit": _BITS,
            "word": _WORDS,
        }
        return {kind: max(map(self.cost, pieces)) for kind, pieces in kinds.items()}

    def _draw(self, rng: np.random.Generator, pieces: Sequence[str], count: int) -> list[str]:
        return [pieces[i] for i in rng.integers(len(pieces), size=count).tolist()]

    def _lists(self, rng: np.random.Generator, room: int, least: int) -> list[tuple[str, list[str]]] | None:
        """Named lists of at least `least` items that cost at most `room` with their line ends; None where not even one fits.

        A list repeats an item only when it is longer than its category.
        """
        head, item = self._dearest["head"] + self.cost(_LINE), self._dearest["item"]
        most = min(self.tasks.lists, len(NAMES), room // (head + least * item))
        if most < 1:
            return None
        count = int(rng.integers(1, most + 1))
        longest = min(self.tasks.items, (room // count - head) // item)
        sizes = rng.integers(least, longest + 1, size=count).tolist()
        names = [NAMES[i] for i in rng.permutation(len(NAMES))[:count].tolist()]
        return [(name, self._repeat(rng, _ITEMS[name], size)) for name, size in zip(names, sizes, strict=True)]

    def _repeat(self, rng: np.random.Generator, pieces: Sequence[str], count: int) -> list[str]:
        rounds = [rng.permutation(len(pieces)) for _ in range(-(-count // len(pieces)))]
        return [pieces[i] for i in np.concatenate(rounds)[:count].tolist()]

    def _words(self, rng: np.random.Generator, room: int, most: int) -> list[str]:
        """Words of neutral text that cost at most `room`, as many as fit up to `most`."""
        drawn = rng.integers(len(_WORDS), size=min(most, max(0, room)))
        fits = int(np.searchsorted(self._word_costs[drawn].cumsum(), room, side="right"))
        return [_WORDS[i] for i in drawn[:fits].tolist()]

    @cached_property
    def _word_costs(self) -> np.ndarray:
        return np.array([self.cost(word) for word in _WORDS])
