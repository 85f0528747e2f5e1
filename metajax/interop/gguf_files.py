"""Reads a Llama from a GGUF file as Hugging Face config.json values and tensors; the gguf library dequantises.

The file interleaves the rows of a query or key head by rotary pairs (0, D/2, 1, D/2 + 1, ...), as llama.cpp rotates them.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from metajax.core.errors import UserError, require
from metajax.core.sealed import sealed_folder
from metajax.interop.files import joined
from metajax.interop.gguf_header import Packed, read_header
from metajax.interop.layouts import HEAD, Tensor
from metajax.interop.settings import MOST_LAYERS, Settings, few, shown

_WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
_LAYER |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
_LAYER |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of tokens
# How each named rule splits a text before merging, for rules that the tokenizers library supports directly.
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_CUTS = {"gpt-2": _BYTE_LEVEL, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL])}
# Fields of a Llama that do not affect any result.
_HARMLESS = """
    llama.rope.scaling.finetuned llama.rope.scaling.original_context_length llama.tensor_data_layout
    llama.attention.layer_norm_epsilon
""".split()
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class _Quantised:
    """A tensor of the file, dequantised when indexed. `rows`: the file's rows in Hugging Face's order (None: the same order)."""

    def __init__(self, packed: Packed, rows: np.ndarray | None):
        self._packed, self._rows, self.shape = packed, rows, packed.shape
        self.dtype = packed.kind.name if packed.kind.name[0] in "IF" and packed.kind.name[:2] != "IQ" else "float32"

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        from gguf.quants import dequantize

        rows, *others = index if len(self.shape) > 1 else (slice(None), *index)
        data, kind = self._packed.data.reshape(-1, self._packed.data.shape[-1]), self._packed.kind
        data = data[rows if self._rows is None else self._rows[rows]]
        try:
            values = data.view(np.float64) if kind.name == "F64" else dequantize(data, kind)
        except NotImplementedError:
            raise UserError(
                f"numbers of the kind {kind.name} cannot be read; quantise the model again, for example as Q8_0"
            ) from None
        values = values[(slice(None), *others)]
        return values if len(self.shape) > 1 else values[0]


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """(values of config.json, {name: tensor, not yet read}, fields of the file) of a Llama, including all parts of a split file.

    Raises UserError for any other file.
    """
    require(find_spec("gguf") is not None, "GGUF files need the gguf library: pip install gguf==0.19.0")
    require(path.exists(), f"{path}: no such file; name a .gguf file")
    fields, packed = read_header(path)
    for part in _other_parts(path, fields):
        packed = joined(packed, read_header(part)[1], part)
    values = _values(fields, path)
    tensors: dict[str, Tensor] = {}
    for stored_name, tensor in packed.items():
        name = _name(stored_name)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2:][0])
        rows = None
        if heads:
            count, size = values[heads], tensor.shape[0]
            require(size % (2 * count) == 0, f"{path}: {shown(stored_name)} has {size} rows, no multiple of 2 x {count} heads")
            # For each row in Hugging Face's order (the two halves of a head in sequence), its row in the file.
            rows = np.arange(size).reshape(count, -1, 2).swapaxes(1, 2).reshape(-1)
        tensors[name] = _Quantised(tensor, rows)
    return values | {"tie_word_embeddings": HEAD not in tensors}, tensors, fields


def _other_parts(path: Path, fields: dict[str, Any]) -> list[Path]:
    """The other files of a split file, given its first part."""
    count, number = fields.get("split.count", 1), fields.get("split.no", 0)
    if count in (0, 1):
        return []
    named = _PART.fullmatch(path.name)
    first = named is not None and type(count) is int and number == 0 and int(named[2]) == 1 and int(named[3]) == count
    place = f"part {shown(repr(number))} of {shown(repr(count))} of a split file"
    require(first, f"{path} is {place}; name the first part, NAME-00001-of-NNNNN.gguf")
    parts = [path.with_name(f"{named[1]}-{n:05}-of-{count:05}.gguf") for n in range(2, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    require(not missing, f"{path} is one of {count} parts, but its folder lacks {few(missing)}; fetch all of them")
    return parts


def _values(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """The equivalent values of config.json. UserError lists every field that this model does not support."""
    read = Settings(fields, str(path))
    read.choice("general.architecture", "none", ("llama",))
    read.fixed("general.type", "model")
    about_files = ("general", "tokenizer", "split", "quantize", "GGUF")
    own = {name: _same_in_all(value) for name, value in fields.items() if name.split(".")[0] not in about_files}
    own = Settings(own, str(path), problems=read.problems)
    layers, heads = own.size("llama.block_count", most=MOST_LAYERS), own.size("llama.attention.head_count")
    width, mlp_width = own.size("llama.embedding_length"), own.size("llama.feed_forward_length")
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        own.fixed(f"llama.{name}", width // heads)
    for name, nothing in {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}.items():
        own.fixed(f"llama.{name}", nothing)
    values = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": own.size("llama.attention.head_count_kv", heads),
        "intermediate_size": mlp_width,
        "max_position_embeddings": own.size("llama.context_length"),
        "rms_norm_eps": _decimal(own.number("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(own.number("llama.rope.freq_base", 10_000.0)),
        "rope_scaling": _scaling(own),
    }
    if own.get("llama.vocab_size") is not None:
        values["vocab_size"] = own.size("llama.vocab_size")
    values |= _ids(read)
    own.refuse_rest(_HARMLESS)
    return read.build(dict, **values)


def _same_in_all(value: Any) -> Any:
    """The common value of a per-layer list, or the list if the layers differ."""
    return value[0] if isinstance(value, list) and value and all(one == value[0] for one in value) else value


def _scaling(own: Settings) -> dict[str, Any] | None:
    """Rotary scaling as llama.cpp reads it: linear if there is a factor but no type."""
    older = own.number("llama.rope.scale_linear", 1.0) if own.get("llama.rope.scale_linear") != 0 else 1.0
    factor = own.number("llama.rope.scaling.factor", older) if own.get("llama.rope.scaling.factor") != 0 else 1.0
    kind = own.choice("llama.rope.scaling.type", "linear", ("none", "linear"))
    return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None


def _ids(read: Settings) -> dict[str, Any]:
    """Special token ids; a text ends at `eos` and at the end of a turn or message."""
    found = {end: read.size(f"tokenizer.ggml.{end}_token_id", -1, least=-1) for end in ("bos", "eos", "eot", "eom", "padding")}
    ends = list(dict.fromkeys(found[end] for end in ("eos", "eot", "eom") if found[end] >= 0))
    eos = ends if len(ends) > 1 else (ends or [-1])[0]
    ids = {"bos_token_id": found["bos"], "pad_token_id": found["padding"], "eos_token_id": eos}
    return {name: i for name, i in ids.items() if i != -1}


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the file's float32: 1e-05 rather than 9.99999974e-06."""
    return float(str(np.float32(value)))


def _name(name: str) -> str:
    """Hugging Face's name of a tensor. An unknown name is kept and is later reported as an extra tensor."""
    if name in _WHOLE or not re.fullmatch(r"blk\.\d+\.\w+\.\w+", name):
        return _WHOLE.get(name, name)
    _, layer, part, *end = name.split(".")
    return ".".join(("model.layers", layer, _LAYER.get(part, part), *end))


def write_gguf_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write the file's byte-level tokenizer as tokenizer.json and tokenizer_config.json; UserError for an unknown kind."""
    own = "name the model's own tokenizer with --tokenizer hf:tokenizer.json"
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    known = f"only 'gpt2' with {', '.join(_CUTS)} can be read"
    rule = f"{shown(repr(kind))} with the rule {shown(repr(cut))}"
    require(kind == "gpt2" and cut in [*_CUTS], f"the file's tokenizer is {rule}, but {known}; {own}")
    tokens, merges = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.merges", [])
    for name, value in (("tokens", tokens), ("merges", merges)):
        texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
        require(texts, f"the file's tokenizer.ggml.{name} is not a list of texts; {own}")
    kinds = fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    paired = isinstance(kinds, list) and len(kinds) == len(tokens) == len(set(tokens))
    require(paired, f"the file's tokenizer.ggml.tokens repeats a token or does not fit token_type; {own}")
    vocab, pairs = {token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges]
    wrong = next((pair for pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys()), None)
    require(
        wrong is None, f"the file's tokenizer.ggml.merges has {shown(repr(wrong))}, which do not make one of its tokens; {own}"
    )
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    library.pre_tokenizer, library.decoder = _CUTS[cut], decoders.ByteLevel()
    added = {token: of for token, of in zip(tokens, kinds, strict=True) if of in (_CONTROL, _USER_DEFINED)}
    library.add_tokens([AddedToken(token, normalized=False, special=of == _CONTROL) for token, of in added.items()])
    with sealed_folder(folder) as work:
        library.save(str(work / "tokenizer.json"))
        (work / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(fields, tokens)))


def _tokenizer_config(fields: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """The values of tokenizer_config.json: the special tokens and the chat template."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {end: fields.get(f"tokenizer.ggml.{name}_token_id") for end, name in names.items()}
    found = {f"{end}_token": tokens[i] for end, i in ids.items() if type(i) is int and i < len(tokens)}
    others = {name: f"tokenizer.ggml.{name}" for name in ("add_bos_token", "add_eos_token")}
    others["chat_template"] = "tokenizer.chat_template"
    return found | {name: fields[field] for name, field in others.items() if field in fields}
