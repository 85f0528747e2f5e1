"""Writes our tokenizers as `tokenizer.json` or `tokenizer.model`, and `tokenizer_config.json`, for other programs."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from metajax.core.errors import UserError, require
from metajax.data.encoding import RESERVED, Tokenizer
from metajax.data.tokenizers import Bytes, Gpt2, HuggingFace, SentencePiece


def write_tokenizer(tokenizer: Tokenizer, folder: Path, rows: int, length: int) -> None:
    """Write the tokenizer of a model with `rows` vocabulary rows and sequences of `length` tokens.

    If the model has the reserved ids, they become special tokens of the file. Such a model was trained here with BOS before every
    document, so the file adds BOS too. A SentencePiece model cannot hold special tokens.
    """
    words = tokenizer.vocabulary
    config = {"clean_up_tokenization_spaces": False, "model_max_length": length}
    if isinstance(tokenizer, SentencePiece):
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
        config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    else:
        library = as_library(tokenizer)
        if rows >= words.base + len(RESERVED):
            _reserve(library, words.base)
            bos = library.id_to_token(words.bos)
            if library.post_processor is None:
                pair = f"{bos} $A {bos} $B"
                library.post_processor = processors.TemplateProcessing(f"{bos} $A", pair, [(bos, words.bos)])
        library.save(str(folder / "tokenizer.json"))
        ends = {"bos_token": library.id_to_token(words.bos), "eos_token": library.id_to_token(words.eos)}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"} | {name: token for name, token in ends.items() if token}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def as_library(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer of the tokenizers library with the same ids for every text; UserError for a kind that it does not support."""
    match tokenizer:
        case HuggingFace():
            text, *_ = json.loads(tokenizer.content())
            return tokenizers.Tokenizer.from_str(text)
        case Gpt2():
            ranks = {base64.b64decode(line): rank for rank, line in enumerate(tokenizer.content().split("\n"))}
            library = _byte_level(ranks, merges_of(ranks), words=True)
            library.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
            return library
        case Bytes():
            return _byte_level({bytes([byte]): byte for byte in range(256)}, [], words=False)
        case _:
            raise UserError(f"tokenizer {tokenizer.spec} cannot be written as a tokenizer.json")


def byte_characters() -> list[str]:
    """The printable character of each byte in GPT-2's vocabulary: the byte's own, or the next from U+0100."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    return [chr(byte) if byte in own else chr(0x100 + others.index(byte)) for byte in range(256)]


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge of each token of several bytes: the two pieces that remain after merging with lower ranks."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(pieces)]
            at = pairs.index(min(pairs))
            require(pairs[at] < rank, f"token {token!r} is not made of two others: not a byte-pair encoding")
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        if len(pieces) == 2:
            merges.append((pieces[0], pieces[1]))
    return merges


def _byte_level(ids: dict[bytes, int], merges: list[tuple[bytes, bytes]], *, words: bool) -> tokenizers.Tokenizer:
    """Byte-pair encoding of UTF-8; `words`: merge only inside GPT-2's words."""
    characters = byte_characters()
    text = lambda token: "".join(characters[byte] for byte in token)  # noqa: E731
    vocab = {text(token): i for token, i in ids.items()}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(text(a), text(b)) for a, b in merges]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    library.decoder = decoders.ByteLevel()
    return library


def _reserve(library: tokenizers.Tokenizer, base: int) -> None:
    """Add special tokens up to the last reserved id. Ids below `base` that the library lacks become unused tokens."""
    size = library.get_vocab_size(with_added_tokens=True)
    names = [*(f"<|unused{i}|>" for i in range(size, base)), *RESERVED]
    library.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    found = [library.token_to_id(name) for name in RESERVED]
    wanted = list(range(base, base + len(RESERVED)))
    require(found == wanted, f"the tokenizer's ids below {base} have gaps: it cannot be exported")
