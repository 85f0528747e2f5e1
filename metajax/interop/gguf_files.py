"""A Llama in a GGUF file, as Hugging Face's config.json and tensors would have it; the gguf library reads and dequantises.

The file keeps the rows of a query or key head as rotary pairs beside each other (0, D/2, 1, D/2 + 1, ...), as llama.cpp rotates them.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from metajax.config import UserError, require
from metajax.core.sealed import sealed_folder
from metajax.interop.layouts import HEAD, Tensor

_WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of tokens
# How each named rule cuts a text before merging, where the tokenizers library has it as it is.
_BYTE_LEVEL = {"add_prefix_space": False, "use_regex": True}
_CUTS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(**_BYTE_LEVEL),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(**_BYTE_LEVEL)]
    ),
}


class _Quantised:
    """A tensor of the file, dequantised where it is indexed; `rows` are those of the file in Hugging Face's order (None: as they are)."""

    def __init__(self, tensor: Any, rows: np.ndarray | None):
        self._tensor, self._rows = tensor, rows
        self.shape = tuple(int(size) for size in reversed(tensor.shape))

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        from gguf.quants import dequantize

        rows, *others = index
        data = self._tensor.data[rows if self._rows is None else self._rows[rows]]
        return dequantize(data, self._tensor.tensor_type).astype(np.float32, copy=False)[(slice(None), *others)]


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """(config.json's values, {name: tensor still in its file}, the file's own fields) of a Llama. UserError for any other file."""
    require(find_spec("gguf") is not None, "GGUF files need the gguf library: pip install gguf==0.19.0")
    from gguf import GGUFReader

    require(path.is_file(), f"{path}: no such file; name a .gguf file")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:  # what the library runs into in a file that is cut off
        raise UserError(f"{path} is not a whole GGUF file ({str(error).splitlines()[0]}); fetch it again") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    values = _values(fields)
    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2:][0])
        rows = _unpaired(int(tensor.shape[-1]), values[heads]) if heads else None
        tensors[name] = _Quantised(tensor, rows)
    return values | {"tie_word_embeddings": HEAD not in tensors}, tensors, fields


def _values(fields: dict[str, Any]) -> dict[str, Any]:
    kind = fields.get("general.architecture")
    require(kind == "llama", f"the file's general.architecture is {kind!r}, but only 'llama' is supported")
    scaling, experts = fields.get("llama.rope.scaling.type", "none"), fields.get("llama.expert_count", 0)
    require(scaling == "none", f"the file's llama.rope.scaling.type is {scaling!r}, but only 'none' is supported")
    require(experts == 0, f"the file's llama.expert_count is {experts}, but only dense models are supported")
    sizes = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    needed = (*sizes, "attention.layer_norm_rms_epsilon")
    missing = [f"llama.{name}" for name in needed if f"llama.{name}" not in fields]
    require(not missing, f"the file lacks {', '.join(missing)}: not a whole Llama")
    layers, length, width, mlp_width, heads = (int(fields[f"llama.{name}"]) for name in sizes)
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        found = fields.get(f"llama.{name}", width // heads)
        require(
            found == width // heads, f"the file's llama.{name} is {found}, but only {width // heads}, width / heads, is supported"
        )
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp_width,
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)), "max_position_embeddings": length,
        "rms_norm_eps": _decimal(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _decimal(fields.get("llama.rope.freq_base", 10_000.0)),
        **{f"{end}_token_id": int(fields[name]) for end in ("bos", "eos") if (name := f"tokenizer.ggml.{end}_token_id") in fields},
    }  # fmt: skip


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the same float32, which the file keeps: 1e-05 rather than 9.99999974e-06."""
    return float(str(np.float32(value)))


def _name(name: str) -> str:
    """Hugging Face's name of a tensor; one that it does not know stays, and is then named as one too many."""
    if name in _WHOLE or not name.startswith("blk."):
        return _WHOLE.get(name, name)
    _, layer, part, *end = name.split(".")
    return ".".join(("model.layers", layer, _LAYER.get(part, part), *end))


def _unpaired(rows: int, heads: int) -> np.ndarray:
    """For each row of a query or key map in Hugging Face's order (halves of a head behind each other), its row in the file."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


# --------------------------------------------------------------------------------------------------- tokenizer


def write_gguf_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """The file's byte-level tokenizer as tokenizer.json and tokenizer_config.json in a folder; UserError for a kind that is not known."""
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    require(
        kind == "gpt2" and cut in _CUTS,
        f"the file's tokenizer is {kind!r} with the rule {cut!r}, which cannot be read (only 'gpt2' with {', '.join(_CUTS)}); "
        "name the model's own tokenizer with --tokenizer hf:tokenizer.json",
    )
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    library = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    library.pre_tokenizer, library.decoder = _CUTS[cut](), decoders.ByteLevel()
    added = {token: of for token, of in zip(tokens, kinds, strict=True) if of in (_CONTROL, _USER_DEFINED)}
    library.add_tokens([AddedToken(token, normalized=False, special=of == _CONTROL) for token, of in added.items()])
    ends = {
        f"{end}_token": tokens[fields[name]] for end in ("bos", "eos") if (name := f"tokenizer.ggml.{end}_token_id") in fields
    }
    with sealed_folder(folder) as work:
        library.save(str(work / "tokenizer.json"))
        (work / "tokenizer_config.json").write_text(json.dumps(ends))
