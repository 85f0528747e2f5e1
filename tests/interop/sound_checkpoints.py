"""Small valid checkpoints of every family, as folders and as GGUF files, with weights drawn from a seed."""

import functools
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from metajax.config import Config, Data, Runtime
from metajax.interop.families import FAMILIES
from metajax.interop.files import open_directory
from metajax.interop.layouts import load_model, stored
from metajax.training.program import abstract_model

WIDTH, HEADS, KV, MLP, LAYERS, ROWS, LENGTH = 16, 4, 2, 24, 2, 260, 32


def byte_tokenizer(end="<|endoftext|>"):
    """256 bytes, three merges and an end token: 260 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "t"), ("Ġt", "h")]
    vocab = {c: i for i, c in enumerate(alphabet)} | {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    library = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens([AddedToken(end, normalized=False)])
    return library


def llama_config(**changes):
    sizes = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    rest = {
        "num_key_value_heads": KV,
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": ROWS,
    }
    ids = {"bos_token_id": 259, "eos_token_id": 259, "tie_word_embeddings": False}
    return {"model_type": "llama"} | sizes | rest | ids | changes


def gpt2_config(**changes):
    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": LENGTH, "vocab_size": ROWS, "eos_token_id": 259}
    return {"model_type": "gpt2"} | sizes | changes


def hymba_config(**changes):
    mamba = {"mamba_d_conv": 4, "mamba_d_state": 4, "mamba_dt_rank": 2, "mamba_expand": 2, "mamba_inner_layernorms": True}
    layers = {
        "global_attn_idx": [0],
        "kv_reuse_group": [[1, 2]],
        "layer_type": ["h"] * 3,
        "sliding_window": 6,
        "num_hidden_layers": 3,
    }
    rest = {"num_memory_tokens": 3, "rope": True, "rope_type": "ntk", "orig_max_position_embeddings": 16, "num_experts": 1}
    tied = {"tie_word_embeddings": True}
    return llama_config(model_type="hymba") | mamba | layers | rest | tied | changes


def tensors(family, config, seed=0):
    """Weights by name for a valid config.json."""

    kind, draw = FAMILIES[family], np.random.default_rng(seed)
    whole = Config(name="made", data=Data(tokenizer="byte", sequence_length=LENGTH), model=kind.model_config(config))
    shapes = {name: tensor.shape for name, tensor in stored(abstract_model(whole, config["vocab_size"]), kind.layout).items()}
    return {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


CONFIGS = {"llama": llama_config, "gpt2": gpt2_config, "hymba": hymba_config}


def write_folder(folder, family, config=None, state=None):
    """Write a valid model directory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[family]() if config is None else config
    state = tensors(family, config) if state is None else state
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}))
    return folder


IDS = np.random.default_rng(0).integers(0, ROWS, (2, LENGTH))
PLAIN = Runtime(unroll=1, implementation="reference")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


def sound(family, changes):
    """(config.json, its weights), one of them with biases in only one part."""
    config = CONFIGS[family](**changes)
    state = tensors(family, config)
    for part, setting in ((".mlp.", "mlp_bias"), (".self_attn.", "attention_bias")):
        if family == "llama" and not config.get(setting):
            state = {name: value for name, value in state.items() if not (part in name and name.endswith(".bias"))}
    return config, state


def ours(folder, family, ids=IDS):
    values, found = open_directory(folder, family)
    kind = FAMILIES[family]
    model = load_model(
        kind.names(found, values),
        kind.model_config(values),
        kind.layout,
        max_length=LENGTH,
        runtime=PLAIN,
    )
    return run(model, ids)


# Compiled without optimisation: models that run once.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _run(model, ids):
    return model(ids, positions=jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), segment_ids=jnp.ones(ids.shape, int))


def run(model, ids=IDS):
    return np.asarray(_run(model, jnp.asarray(ids)))


def theirs(folder):
    """Logits of transformers, in float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


_KINDS = {
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
    "u64": (10, "<Q"),
    "u16": (2, "<H"),
    "f64": (12, "<d"),
}


def _text(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(kind, value):
    if kind == "text":
        return struct.pack("<I", 8) + _text(value)
    if kind.startswith("list of "):
        of = kind.removeprefix("list of ")
        code, items = (
            (8, b"".join(map(_text, value)))
            if of == "text"
            else (_KINDS[of][0], b"".join(struct.pack(_KINDS[of][1], x) for x in value))
        )
        return struct.pack("<IIQ", 9, code, len(value)) + items
    return struct.pack("<I", _KINDS[kind][0]) + struct.pack(_KINDS[kind][1], value)


def gguf_fields(**changes):
    """{name: (kind, value)} of a valid file; a change to None removes a field."""
    library = byte_tokenizer()
    words = [token for token, _ in sorted(library.get_vocab().items(), key=lambda item: item[1])]
    sizes = {"block_count": LAYERS, "context_length": LENGTH, "embedding_length": WIDTH, "feed_forward_length": MLP}
    sizes |= {"attention.head_count": HEADS, "attention.head_count_kv": KV}
    fields = {"general.architecture": ("text", "llama")} | {f"llama.{name}": ("u32", value) for name, value in sizes.items()}
    fields |= {
        "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-6),
        "tokenizer.ggml.model": ("text", "gpt2"),
        "tokenizer.ggml.pre": ("text", "gpt-2"),
    }
    fields |= {"tokenizer.ggml.tokens": ("list of text", words), "tokenizer.ggml.token_type": ("list of i32", [1] * 259 + [3])}
    fields |= {"tokenizer.ggml.merges": ("list of text", ["t h", "Ġ t", "Ġt h"]), "tokenizer.ggml.eos_token_id": ("u32", 259)}
    return {name: field for name, field in (fields | {"tokenizer.ggml.bos_token_id": ("u32", 259)} | changes).items() if field}


_GGUF_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensors(state=None):
    """{name in a file: array}, with the rows of queries and keys interleaved by pairs."""
    found = {}
    for name, value in (state or tensors("llama", llama_config())).items():
        stem = name.removesuffix(".weight")
        if stem not in _GGUF_NAMES:
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV}.get(part)
            value = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape) if heads else value
            stem = f"blk.{layer}.{_GGUF_PARTS[part]}"
        found[f"{_GGUF_NAMES.get(stem, stem)}.weight"] = np.ascontiguousarray(value)
    return found


def gguf_bytes(fields=None, arrays=None, *, version=3, counts=None, info=lambda name, entry: entry):
    """The bytes of a file; `info` may falsify a tensor's [sizes, kind, offset], and `counts` the numbers of fields and tensors."""
    fields, arrays = gguf_fields() if fields is None else fields, gguf_tensors() if arrays is None else arrays
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(arrays), len(fields))))
    head += b"".join(_text(name) + (field if isinstance(field, bytes) else _value(*field)) for name, field in fields.items())
    offset, data = 0, b""
    for name, value in arrays.items():
        sizes, kind, at = info(name, [list(value.shape[::-1]), 0, offset])
        head += (
            _text(name)
            + struct.pack("<I", len(sizes))
            + b"".join(struct.pack("<Q", size) for size in sizes)
            + struct.pack("<IQ", kind, at)
        )
        data += value.tobytes() + b"\0" * (-value.nbytes % 32)
        offset = len(data)
    return head + b"\0" * (-len(head) % 32) + data
