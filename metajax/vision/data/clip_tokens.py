"""CLIP's tokenizer: byte-pair encoding of the words of cleaned, lower-case text, with a start and an end token around each text.

The user supplies the vocabulary file: OpenAI's, or the merges.txt of a Hugging Face folder. With `markers`, the texts
<|startoftext|> and <|endoftext|> become those tokens, as in OpenAI's code. Captions and class names are read without `markers`,
because a caption with <|endoftext|> in it would end there.
"""

from __future__ import annotations

import gzip
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path

import ftfy
import regex
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from metajax.core.errors import require
from metajax.vision.data.words import TextTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 48_894
FILES = ("bpe_simple_vocab_16e6.txt.gz", "merges.txt")
_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_REMEDY = f"{FILES[0]} is in the wheel of open-clip-torch==3.3.0: pip download --no-deps it, unzip it, and name the file"
_WORD_END = "</w>"
# English contractions, runs of letters, single digits, runs of anything else; spaces only separate them. The patterns of the
# tokenizers library do not fit: their Unicode tables are older, and they would find the two tokens inside runs too.
_PARTS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_WORDS = regex.compile(_PARTS, regex.IGNORECASE)
_WORDS_AND_MARKERS = regex.compile(rf"<\|startoftext\|>|<\|endoftext\|>|{_PARTS}", regex.IGNORECASE)


class ClipTokenizer(TextTokenizer):
    """A tokenizer of 49,408 ids: bytes, bytes that end a word, merges in order, start and end."""

    def __init__(self, merges: Sequence[tuple[str, str]], markers: bool = True):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*alphabet, *(letter + _WORD_END for letter in alphabet), *(a + b for a, b in merges), START, END]
        ids = {word: i for i, word in enumerate(words)}
        self._words = _WORDS_AND_MARKERS if markers else _WORDS
        self.size, self.start, self.end = len(words), len(words) - 2, len(words) - 1
        self._library = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=list(merges), end_of_word_suffix=_WORD_END))
        self._library.add_special_tokens([AddedToken(word, normalized=False) for word in (START, END)])
        self._library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(_WORD_END, " ")])

    @classmethod
    def open(cls, path: Path, *, markers: bool = True) -> ClipTokenizer:
        """Open one of `FILES`, or the folder that holds one; UserError for a missing or damaged file.

        markers: whether text can spell the start and the end token.
        """
        if path.is_dir():
            path = next((path / name for name in FILES if (path / name).exists()), path / FILES[0])
        require(path.is_file(), f"{path}: no such file; {_REMEDY}")
        content = path.read_bytes()
        if path.suffix == ".gz":
            found = hashlib.sha256(content).hexdigest()
            require(found == _SHA256, f"{path}: sha256 {found[:12]} is not CLIP's {_SHA256[:12]}; {_REMEDY}")
            content = gzip.decompress(content)
        merges = [tuple(line.split()) for line in content.decode().split("\n")[1 : MERGES + 1]]
        whole = len(merges) == MERGES and all(len(pair) == 2 for pair in merges)
        require(whole, f"{path}: not CLIP's {MERGES} merges after one line; {_REMEDY}")
        return cls(merges, markers)

    def fingerprint(self) -> str:
        """Constant, because CLIP has one vocabulary, whichever file it was read from."""
        return _SHA256

    def encode(self, text: str) -> list[int]:
        return self._library.encode(self._words.findall(clean(text)), is_pretokenized=True, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text with a space after every word, as in OpenAI's code; bytes that are not UTF-8 become U+FFFD."""
        return self._library.decode(list(ids), skip_special_tokens=False)


def clean(text: str) -> str:
    """Repair the encoding, decode HTML entities (twice, for nested entities), join spaces, and convert to lower case."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
