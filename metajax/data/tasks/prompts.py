"""Tasks in words: the strings of their prompts, and their base class.

List recall:       Fruits: orange peach plum / Tools: hammer wrench level _PAUSE_ / Q: item 3 of Tools? A: level
Segment counting:  Tools: saw _PAUSE_ hammer wrench hammer _PAUSE_ hammer / Q: how many hammer between pauses? A: 2
Parity:            Bits: 1 0 1 1 _PAUSE_ 0 1 0 / Q: xor before pause? A: 1
Copying:           Text: alpha beta [_PAUSE_ gamma delta _PAUSE_] epsilon / Q: copy the span. A: gamma delta
Needle:            Text: alpha beta / Fruits: orange / Text: gamma delta / Q: item 1 of Fruits? A: orange

Each / is a new line. The first four tasks are from Language Modeling with Learned Meta-Tokens (arXiv 2509.16278, section 4). Its
prompt strings are not published; these are ours. The needle is for Hymba (arXiv 2411.13676, figure 10). Lines of neutral text
fill the rest of an example's length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from metajax.data.tasks import Encoded, SyntheticTask, is_test

PAUSE = "_PAUSE_"  # a piece that becomes the meta-token
MARK = " |"  # marks the spots that a question refers to, if pauses do not

LISTS = {
    "Fruits": ("orange", "peach", "banana", "plum", "cherry", "grape", "lemon", "mango"),
    "Tools": ("hammer", "wrench", "level", "pliers", "drill", "chisel", "shovel", "ruler"),
    "Animals": ("tiger", "horse", "rabbit", "otter", "eagle", "whale", "zebra", "camel"),
    "Colors": ("crimson", "purple", "yellow", "green", "violet", "amber", "indigo", "scarlet"),
    "Metals": ("copper", "silver", "iron", "nickel", "cobalt", "bronze", "titanium", "zinc"),
    "Trees": ("maple", "willow", "cedar", "birch", "spruce", "poplar", "walnut", "juniper"),
}
TEXT = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "iota")
TEXT += ("kappa", "lambda", "sigma", "omega", "omicron", "upsilon", "aleph", "gimel")
TEXT_LINE = 12  # words per line of neutral text, at most

NAMES = tuple(LISTS)
ITEMS = {name: tuple(f" {word}" for word in words) for name, words in LISTS.items()}
WORDS = tuple(f" {word}" for word in TEXT)
BITS = (" 0", " 1")
TEXT_HEAD, BITS_HEAD, OPEN, CLOSE, LINE = "Text:", "Bits:", " [", "]", "\n"
RECALL, COUNT, BETWEEN, ASK = "\nQ: item", "\nQ: how many", " between pauses? A:", "? A:"
PARITY, COPY = "\nQ: xor before pause? A:", "\nQ: copy the span. A:"

# Pieces that are one token each in a bpe:N+tasks tokenizer. Their order decides the ids.
RESERVED_PIECES = (*(f"{name}:" for name in NAMES), *(f" of {name}" for name in NAMES))
RESERVED_PIECES += (*(item for items in ITEMS.values() for item in items), *WORDS, *(f" {digit}" for digit in range(10)))
RESERVED_PIECES += (TEXT_HEAD, BITS_HEAD, OPEN, RECALL, COUNT, BETWEEN, ASK, PARITY, COPY, MARK)


class Example(NamedTuple):
    """One example as pieces: strings that are tokenised one by one, so that its length is the sum of theirs."""

    lines: tuple[tuple[str, ...], ...]
    question: tuple[str, ...]
    answer: tuple[str, ...]

    @property
    def prompt(self) -> list[str]:
        """Lines and question, including line ends."""
        return [piece for line in self.lines for piece in (LINE, *line)][1:] + list(self.question)

    @property
    def text(self) -> str:
        """Prompt and answer as readable text."""
        return "".join(f" {PAUSE}" if piece == PAUSE else piece for piece in (*self.prompt, *self.answer))


class PromptTask(SyntheticTask):
    """A task in words. A subclass writes the core of an example; neutral text extends it to the requested length.

    What fits is decided by the longest piece of each kind, so it depends only on the room and never on what is drawn.
    """

    splits_by_filler = False  # whether neutral text is part of the core, for tasks with few examples

    @abstractmethod
    def write(self, rng: np.random.Generator, room: int) -> Example | None:
        """An example of at most `room` tokens without neutral text, or None if not even the smallest fits."""

    @cached_property
    def shortest(self) -> int:
        room = 1
        while self.write(np.random.default_rng(0), room) is None:
            room += 1
        return room + 1  # BOS

    def draw(self, rng: np.random.Generator, split: str, lengths: tuple[int, int]) -> Encoded | None:
        low, high = lengths
        room = int(rng.integers(low, high + 1)) - 1  # without BOS
        core = self.write(rng, room)
        if core is not None and self.splits_by_filler:
            core = self.fill(core, rng, room)
        if core is None or is_test(core) != (split == "test"):
            return None
        example, special = self.fill(core, rng, room), self.tokenizer.vocabulary
        ids = [special.bos, *(i for piece in (*self._placed(example, rng), *example.answer) for i in self.ids(piece))]
        if not low <= len(ids) <= high:
            return None
        index, answer = np.arange(len(ids)), self.costs(*example.answer)
        asked = index >= len(ids) - answer - 1  # the last token of the prompt predicts the first of the answer
        targets = np.array([*ids[1:], special.eos], np.int32)
        return Encoded(np.array(ids, np.int32), targets, asked, asked & (index < len(ids) - 1), core, example.text)

    def _placed(self, example: Example, rng: np.random.Generator) -> list[str]:
        """The prompt with pauses placed by `tasks.placement`; random ones are neither first nor last."""
        if self.sizes.placement == "deliberate":
            return example.prompt
        marked = [MARK if piece == PAUSE else piece for piece in example.prompt]
        if self.sizes.placement == "random":
            for at in sorted(rng.integers(1, len(marked), size=example.prompt.count(PAUSE)).tolist(), reverse=True):
                marked.insert(at, PAUSE)
        return marked

    def fill(self, example: Example, rng: np.random.Generator, room: int) -> Example:
        """The example with lines of neutral text among its lines, up to `room` tokens."""
        left = room - self.costs(*example.prompt, *example.answer)
        head, lines = self.costs(TEXT_HEAD, LINE), list(example.lines)
        while words := self.words(rng, left - head, TEXT_LINE):
            lines.insert(int(rng.integers(len(lines) + 1)), (TEXT_HEAD, *words))
            left -= head + self.costs(*words)
        return example._replace(lines=tuple(lines))

    # ------------------------------------------------------------------------------------------------------ tokens

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        return {PAUSE: [self.tokenizer.vocabulary.meta]}

    def ids(self, piece: str) -> list[int]:
        """The ids of a piece."""
        if piece not in self._known:
            self._known[piece] = self.tokenizer.encode(piece)
        return self._known[piece]

    def cost(self, piece: str) -> int:
        """Tokens of a piece, or of what replaces a pause under `tasks.placement`."""
        if piece == PAUSE and self.sizes.placement != "deliberate":
            return len(self.ids(MARK)) + (self.sizes.placement == "random")
        return len(self.ids(piece))

    def costs(self, *pieces: str) -> int:
        """Tokens of all pieces."""
        return sum(map(self.cost, pieces))

    # ------------------------------------------------------------------------------------------------------- parts

    @cached_property
    def costliest(self) -> dict[str, int]:
        """Tokens of the longest piece of each kind."""
        kinds = {
            "head": [f"{name}:" for name in NAMES],
            "of": [f" of {name}" for name in NAMES],
            "item": [item for items in ITEMS.values() for item in items],
            "number": [f" {j}" for j in range(self.sizes.items + 1)],
            "bit": BITS,
            "word": WORDS,
        }
        return {kind: max(map(self.cost, pieces)) for kind, pieces in kinds.items()}

    def pick(self, rng: np.random.Generator, pieces: Sequence[str], count: int) -> list[str]:
        """`count` of the pieces, drawn with replacement."""
        return [pieces[int(i)] for i in rng.integers(len(pieces), size=count)]

    def named_lists(self, rng: np.random.Generator, room: int, least: int) -> list[tuple[str, list[str]]] | None:
        """Named lists of at least `least` items, with at most `room` tokens including line ends; None if not even one fits.

        A list repeats an item only if it is longer than its category.
        """
        head, item = self.costliest["head"] + self.cost(LINE), self.costliest["item"]
        most = min(self.sizes.lists, len(NAMES), room // (head + least * item))
        if most < 1:
            return None
        count = int(rng.integers(1, most + 1))
        longest = min(self.sizes.items, (room // count - head) // item)
        sizes = rng.integers(least, longest + 1, size=count).tolist()
        found = []
        for name, size in zip(rng.permutation(NAMES)[:count].tolist(), sizes, strict=True):
            rounds = [rng.permutation(ITEMS[name]) for _ in range(-(-size // len(ITEMS[name])))]
            found.append((name, np.concatenate(rounds)[:size].tolist()))
        return found

    def words(self, rng: np.random.Generator, room: int, most: int) -> list[str]:
        """Words of neutral text with at most `room` tokens: as many as fit, up to `most`."""
        drawn = rng.integers(len(WORDS), size=min(most, max(0, room)))
        fits = int(np.searchsorted(self._word_costs[drawn].cumsum(), room, side="right"))
        return [WORDS[i] for i in drawn[:fits].tolist()]

    @cached_property
    def _word_costs(self) -> np.ndarray:
        return np.array([self.cost(word) for word in WORDS])
