"""The base of all tokenizers: text to ids and back, and the ids that text never has.

A tokenizer's table has its own ids first, then sixteen reserved ones, then padding to a multiple of 64. Text never becomes
a reserved id or a control token, whatever it spells: a document that says "<|meta|>" or "</s>" is encoded as those
characters. `marked` gives the same tokenizer for text with control tokens in it, such as a chat.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np

from metajax.core.atomic import write_text
from metajax.core.errors import require
from metajax.data.documents import BadRecord

FILE = "tokenizer.json"
_NAMED = ("eot", "pad", "meta", "context_begin", "context_end", *(f"s{i}" for i in range(1, 6)))
RESERVED = tuple(f"<|{name}|>" for name in (*_NAMED, *(f"spare{i}" for i in range(1, 7))))
BLOCK = 64  # padded sizes are multiples of this
Reading = Literal["text", "apart", "markers"]  # library default, control tokens kept out, control tokens read


@dataclass(frozen=True)
class Vocabulary:
    """Sizes and reserved ids. The tokenizer itself has `base` ids; the model's embedding table has `size` rows."""

    base: int
    size: int
    bos: int
    eos: int
    pad: int
    meta: int
    context_begin: int
    context_end: int
    spare: tuple[int, ...]

    @classmethod
    def above(cls, base: int, bos: int | None = None, eos: int | None = None) -> Vocabulary:
        """The reserved ids start at `base`; bos and eos are <|eot|> unless the tokenizer has its own."""
        eot, pad, meta, begin, end, *spare = range(base, base + len(RESERVED))
        size = -(-(base + len(RESERVED)) // BLOCK) * BLOCK
        return cls(base, size, eot if bos is None else bos, eot if eos is None else eos, pad, meta, begin, end, tuple(spare))


class Tokenizer:
    """Text to ids and back. A subclass wraps a library by `_encode`, `_decode`, `content` and `from_content`.

    control: spelling and id of each token that text never becomes. unknown: the id for characters that are not in the
    vocabulary; its spelling does not become it either. markers: whether spellings of control tokens are read as control tokens.
    """

    kind: ClassVar[str]
    spec: str
    vocabulary: Vocabulary
    control: Mapping[str, int] = MappingProxyType({})
    unknown: int | None = None
    markers = False

    def content(self) -> str:
        """Everything that defines the ids, as text."""
        raise NotImplementedError

    @classmethod
    def from_content(cls, spec: str, content: str) -> Tokenizer:
        raise NotImplementedError

    def _encode(self, texts: list[str], reading: Reading) -> list[list[int]]:
        """The library's ids of each text; raises the library's errors."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids below `vocabulary.base`; no bos or eos is added. Raises BadRecord for a text that cannot be encoded."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in threads if the library has them."""
        if self.markers:
            return self._read(texts, "markers")
        found = self._read(texts, "text")
        wrong = self._with_control(found)
        if wrong:
            again = self._read([texts[n] for n in wrong], "apart")
            if self._with_control(again, self.unknown):
                raise BadRecord(f"tokenizer {self.spec} has no other tokens for a control token that the text spells")
            for n, ids in zip(wrong, again, strict=True):
                found[n] = ids
        return found

    def encode_each(self, texts: list[str]) -> list[list[int] | BadRecord]:
        """`encode_batch`, but a text that cannot be encoded gives its error instead of ids."""
        return _each(self.encode_batch, texts)

    def marked(self) -> Tokenizer:
        """The same tokenizer with markers read as control tokens, as in transformers; raises UserError if it has none."""
        require(bool(self.control), f"tokenizer {self.spec} has no control tokens, so no text is a marker; leave out markers")
        return _restored(type(self), self.spec, self.content(), True)

    def _read(self, texts: list[str], reading: Reading) -> list[list[int]]:
        try:
            return self._encode(texts, reading)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a Rust library is not an Exception
            longest, reason = max(map(len, texts)), (str(error).splitlines() or [""])[0]
            of = f"a text of {longest:,} characters" if len(texts) == 1 else f"one of {len(texts)} texts"
            raise BadRecord(f"tokenizer {self.spec} cannot encode {of} ({type(error).__name__}: {reason})") from error

    def _with_control(self, found: Sequence[Sequence[int]], allowed: int | None = None) -> list[int]:
        """Indices of the lists that hold a reserved id or a control token other than `allowed`."""
        ends = np.cumsum([len(ids) for ids in found])
        flat = np.fromiter(chain.from_iterable(found), np.int64)
        hits = np.flatnonzero(self._never[flat] & (flat != (-1 if allowed is None else allowed)))
        return np.unique(np.searchsorted(ends, hits, side="right")).tolist()

    @cached_property
    def _never(self) -> np.ndarray:
        """bool [size]: ids that text never becomes."""
        never = np.arange(self.vocabulary.size) >= self.vocabulary.base
        never[list(self.control.values())] = True
        return never

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Reserved ids appear by name, invalid UTF-8 as U+FFFD. Raises UserError for ids outside the table."""
        base, size = self.vocabulary.base, self.vocabulary.size
        ids = [int(i) for i in ids]
        outside = next((i for i in ids if not 0 <= i < size), None)
        require(outside is None, f"tokenizer {self.spec}: id {outside} is outside its table of {size}; another tokenizer made it")
        names = (*RESERVED, *(f"<|unused{n}|>" for n in range(len(RESERVED), size - base)))
        runs = ((own, list(run)) for own, run in groupby(ids, lambda i: i < base))
        return "".join(self._decode(run) if own else "".join(names[i - base] for i in run) for own, run in runs)

    def fingerprint(self) -> str:
        """sha256 of the content that defines the ids."""
        return hashlib.sha256(f"{self.kind}\n{self.content()}".encode()).hexdigest()

    @cached_property
    def text_key(self) -> str:
        """The name of caches of encoded text: the fingerprint, unless control tokens are read or have to be kept out."""
        names = list(self.control)
        library = _each(lambda texts: self._read(texts, "text"), names)
        other = [name for name, theirs, ours in zip(names, library, self.encode_each(names), strict=True) if theirs != ours]
        if not other and not self.markers:
            return self.fingerprint()
        return hashlib.sha256(json.dumps([self.fingerprint(), other, self.markers]).encode()).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write `tokenizer.json` into a folder, for `load`, and return its path."""
        path = Path(folder) / FILE
        whole = {"kind": self.kind, "spec": self.spec, "fingerprint": self.fingerprint(), "content": self.content()}
        write_text(path, json.dumps(whole))
        return path

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.spec, self.content(), self.markers)


def _restored(kind: type[Tokenizer], spec: str, content: str, markers: bool) -> Tokenizer:
    tokenizer = kind.from_content(spec, content)
    tokenizer.markers = markers
    return tokenizer


def _each(encode: Callable[[list[str]], list[list[int]]], texts: list[str]) -> list[list[int] | BadRecord]:
    """The ids of each text, or its error. A batch that fails is split in halves, which are tried again."""
    try:
        return [*encode(texts)]
    except BadRecord as error:
        half = len(texts) // 2
        return [*_each(encode, texts[:half]), *_each(encode, texts[half:])] if half else [error]
