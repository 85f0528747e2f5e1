"""Tokenizers of texts for a CLIP, and the one for a small CLIP trained here: the words of its captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import regex

from metajax.core.atomic import write_text
from metajax.core.errors import require
from metajax.runs.files import find_json

FILE = "words.json"  # in a run's folder
_WORDS = regex.compile(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]")
_SPECIAL = ("<pad>", "<unknown>", "<start>", "<end>")


class TextTokenizer:
    """A tokenizer of texts between a start and an end token."""

    start: int
    end: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end."""
        raise NotImplementedError

    def tokenize(self, texts: Sequence[str], length: int = 77, *, cut: bool = False) -> np.ndarray:
        """int32[texts, length]: start, ids, end, zeros. A text that is too long is cut before its end, or refused (UserError)."""
        rows = np.zeros((len(texts), length), np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.start, *self.encode(text), self.end]
            fits = cut or len(ids) <= length
            require(fits, f"{text[:60]!r} has {len(ids)} tokens, but a text has {length}; shorten it, or raise clip.context")
            if len(ids) > length:
                ids = [*ids[: length - 1], self.end]
            row[: len(ids)] = ids
        return rows


class WordTokenizer(TextTokenizer):
    """Ids of whole words, lower-cased: pad 0, unknown 1, the words, start, and end with the largest id."""

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.size, self.start, self.end = len(words) + 4, len(words) + 2, len(words) + 3
        self._ids = {word: i for i, word in enumerate(words, 2)}

    @classmethod
    def of(cls, texts: Iterable[str]) -> WordTokenizer:
        """Build the tokenizer from all words in these texts, the placeholder of prompts, and the full stop."""
        return cls(sorted({"x", ".", *(word for text in texts for word in _WORDS.findall(text.lower()))}))

    @classmethod
    def load(cls, folder: Path) -> WordTokenizer:
        """Load the tokenizer of a folder; UserError if there is none."""
        saved = find_json(folder / FILE)
        require(saved is not None, f"{folder} has no {FILE}: it is not the run of a CLIP")
        return cls(saved["words"])

    def save(self, folder: Path) -> None:
        write_text(folder / FILE, json.dumps(self.words))

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.words).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, 1) for word in _WORDS.findall(text.lower())]

    def decode(self, ids: Sequence[int]) -> str:
        """The words of ids; for special ids their names."""
        return " ".join((*_SPECIAL[:2], *self.words, *_SPECIAL[2:])[i] for i in ids)
