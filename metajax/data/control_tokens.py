"""Control tokens: finds them in a tokenizer's files, and makes vocabularies that never read, or always read, their spellings.

Text never becomes a control token. If a library finds one in a text, the text is encoded again with a vocabulary in which no
control token can be spelled. Other tokens then encode the same characters.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from metajax.core import json_lines
from metajax.core.errors import UserError, require

# An added token of this form is a control token, whatever its file says: <|im_start|>, [INST], <tool_call>. HTML elements and
# single bytes are excluded, because some vocabularies have them as ordinary tokens.
_MARKER = re.compile(r"▁?(<+[^<>\s]+>+|\[/?\w*[A-Z]\w*\])")
_ORDINARY = re.compile(
    r"</?(table|caption|t(head|body|foot|r|h|d)|h[1-6]|blockquote|strong|em|b|i|u|su[bp]|code|p|br|hr|li|ul|ol|div|span|a|img|pre)>"
    r"|<0x[0-9A-Fa-f]{2}>"
)
# An undeclared piece of a vocabulary is a control token only if its name is one that every library uses.
_CONVENTIONAL = re.compile(r"</?s>|<(pad|unk|bos|eos|mask|sep|cls)>|\[(PAD|UNK|BOS|EOS|MASK|SEP|CLS)\]|<\|[^|\s]+\|>")


def is_marker(name: str) -> bool:
    """Whether an added token is a control token by its form."""
    return bool(_MARKER.fullmatch(name)) and not _ORDINARY.fullmatch(name)


class Declared:
    """The control tokens that the files beside a tokenizer declare. Raises UserError for a file that is not a JSON object.

    roles: {role such as eos_token: spelling}. names: spellings with a role. ids: numbers with a role such as eos_token_id.
    template: the text of the chat templates.
    """

    def __init__(self, folder: Path):
        told = [_read_object(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
        self.roles = {key: _spelling(value) for values in told for key, value in values.items() if key.endswith("_token")}
        spellings = [*self.roles.values(), *(name for values in told for name in _listed(values))]
        self.names = {name for name in spellings if name}
        numbers = [_read_object(folder / name) for name in ("config.json", "generation_config.json")]
        self.ids = {n for values in numbers for n in _token_ids(values)}
        files = [folder / name for name in ("chat_template.jinja", "chat_template.json")]
        texts = [path.read_text("utf-8", "replace") for path in files if path.is_file()]
        self.template = "\n".join([*texts, *(json.dumps(v.get("chat_template", ""), ensure_ascii=False) for v in told)])

    def control(self, ids: Mapping[str, int], added: Collection[str]) -> set[str]:
        """The tokens of a vocabulary that the files declare as control tokens.

        A single character stays ordinary whatever its role, because text needs it. A token that has its role only by number also
        stays ordinary (a line feed may end an answer), unless it is an added token or has the form of a marker.
        """
        shown = {name for name in added if name in self.template and name.strip() and not name.isalnum()}
        by_template = {name for name in shown if not _ORDINARY.fullmatch(name)}
        by_number = {name for name, i in ids.items() if i in self.ids and (name in added or is_marker(name))}
        return {name for name in (self.names & ids.keys()) | by_template | by_number if len(name) > 1}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json_lines.parse(path.read_bytes()) if path.exists() else {}
        require(isinstance(found, dict), f"{path}: a JSON {type(found).__name__} instead of an object; correct it or remove it")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a JSON file that can be read ({error}); correct it or remove it") from None
    return found


def _listed(values: dict[str, Any]) -> Iterator[str | None]:
    """The spellings in lists such as additional_special_tokens, and those of special added tokens."""
    for key, listed in values.items():
        if key.endswith("special_tokens") and isinstance(listed, list | dict):
            yield from map(_spelling, listed.values() if isinstance(listed, dict) else listed)
    decoder = values.get("added_tokens_decoder")
    for token in decoder.values() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and token.get("special"):
            yield _spelling(token)


def _spelling(token: Any) -> str | None:
    """The spelling of a token, given as a string or as an object with `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _token_ids(values: dict[str, Any]) -> Iterator[int]:
    """Every number under a key such as eos_token_id, at any depth, single or in a list."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif key.endswith(("_token_id", "_token_ids")):
            yield from (n for n in (value if isinstance(value, list) else [value]) if type(n) is int)


def control_of(library: tokenizers.Tokenizer, ids: Mapping[str, int], named: Iterable[str]) -> dict[str, int]:
    """The control tokens of a `tokenizer.json`: special ones, added ones in marker form, conventional names, and `named` ones."""
    added = library.get_added_tokens_decoder().values()
    found = {t.content for t in added if t.special or is_marker(t.content)} | {*named, unknown_name(library) or ""}
    if not isinstance(library.model, tokenizers.models.BPE):  # pieces of BPE are made by merges, so they occur in text
        found |= {name for name in ids if name[:1] in ("<", "[") and _CONVENTIONAL.fullmatch(name)}
    return {name: ids[name] for name in sorted(found) if name in ids and len(name) > 1}


def unknown_name(library: tokenizers.Tokenizer) -> str | None:
    """The token for characters that the vocabulary lacks."""
    if not isinstance(library.model, tokenizers.models.Unigram):
        return library.model.unk_token
    number = json.loads(library.to_str())["model"]["unk_id"]
    return None if number is None else library.id_to_token(number)


def as_markers(library: tokenizers.Tokenizer, declared: Iterable[str]) -> tokenizers.Tokenizer:
    """A copy that reads spellings of its added tokens and of `declared` ones as control tokens, as transformers does."""
    copy = tokenizers.Tokenizer.from_str(library.to_str())
    copy.encode_special_tokens = False
    added = {token.content for token in copy.get_added_tokens_decoder().values()}
    copy.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in declared if name not in added])
    return copy


def without_spellings(library: tokenizers.Tokenizer, control: Collection[str]) -> tokenizers.Tokenizer:
    """A copy with the same ids in which no text spells a control token's name and no merge produces one."""
    whole = json.loads(library.to_str())
    model, hidden = whole["model"], {name: f"\ufdd0 no text spells this \ufdd1{name}\ufdd0" for name in control}
    for token in whole["added_tokens"]:  # renamed, not removed: a removal would change other ids
        token["content"] = hidden.get(token["content"], token["content"])
    whole["post_processor"] = None
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(name, name): i for name, i in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = model["continuing_subword_prefix"] or ""
        model["merges"] = [(a, b) for a, b in model["merges"] if not {a, b, a + b.removeprefix(prefix)} & hidden.keys()]
    copy = tokenizers.Tokenizer.from_str(json.dumps(whole))
    copy.encode_special_tokens = True
    return copy


CONTROL, USER_DEFINED = 3, 4  # types of a piece in a SentencePiece model
_TYPE, _PIECE = 0x18, 0x0A  # protobuf tags: of a piece's type, and of a piece in a model, which begins with its pieces
# A piece: its text (tag 0x0A, length, bytes), its score (tag 0x15, four bytes) and its type, each of which may be absent.


def piece_types(model: bytes) -> list[int]:
    """The type of every piece of a SentencePiece model, in order; 1, an ordinary piece, if it states none."""
    types = []
    for piece in _pieces(model)[0]:
        size, start = _varint(piece, 1)
        rest = piece[start + size :]
        rest = rest[5:] if rest[:1] == b"\x15" else rest
        types.append(rest[1] if rest[:1] == bytes([_TYPE]) else 1)
    return types


def retyped(model: bytes, ids: Collection[int], kind: int) -> bytes:
    """The model with another type for some pieces. The type is appended, because the last one of a message counts."""
    pieces, rest = _pieces(model)
    pieces = [piece + bytes([_TYPE, kind]) if i in ids else piece for i, piece in enumerate(pieces)]
    return b"".join(bytes([_PIECE]) + _as_varint(len(piece)) + piece for piece in pieces) + rest


def _pieces(model: bytes) -> tuple[list[bytes], bytes]:
    """(the messages of the pieces, the bytes after them)."""
    pieces, at = [], 0
    while at < len(model) and model[at] == _PIECE:
        size, start = _varint(model, at + 1)
        at = start + size
        pieces.append(model[start:at])
    return pieces, model[at:]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number at `at`, where it ends)."""
    end = next(n for n in itertools.count(at) if data[n] < 0x80) + 1
    return sum((byte & 0x7F) << 7 * n for n, byte in enumerate(data[at:end])), end


def _as_varint(value: int) -> bytes:
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
