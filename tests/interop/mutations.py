"""Damaged checkpoints of every family: each is imported as the file says, or refused in one line.

`python tests/interop/mutations.py FOLDER --count 500 --seed 0` makes and imports them below FOLDER and prints what was neither; other suites
call `run`.
"""

import argparse
import json
import math
import random
import resource
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WIDTH, HEADS, KV, MLP, LAYERS, ROWS, LENGTH = 16, 4, 2, 24, 2, 260, 32
SECONDS, BYTES = 20, 2 << 30  # that one import may take
JUNK = [
    None, -1, 0, 1, 3, 7, 10**9, 2**60, 10**30, 1.5, -0.5, 1e308, math.nan, math.inf, -math.inf, "32", "", "nan", "\x1b[2J", "\n", [], [1], [-1],
    {}, {"a": 1}, True, False, [[[1]]], ["h", "x"], "x" * 5000, {"rope_type": "linear"}, {"rope_type": ["a"], "factor": "b"}, [None], 2**31, 2**32,
]  # fmt: skip
NEW_KEYS = (
    "logit_scale", "sliding_window", "quantization_config", "rope_scaling", "rope_parameters", "head_dim", "attention_multiplier", "layer_types",
    "tie_word_embeddings", "mlp_bias", "attention_bias", "partial_rotary_factor", "torch_dtype", "eos_token_id", "pad_token_id", "vocab_size",
    "max_position_embeddings", "colour", "n_inner", "model_type", "hidden_act", "activation_function", "initializer_range", "rms_norm_eps",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ sound


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
    """Weights by name that a sound config.json asks for."""
    from metajax.config import Config, Data
    from metajax.interop.families import FAMILIES
    from metajax.interop.layouts import stored
    from metajax.training.program import abstract_model

    kind, draw = FAMILIES[family], np.random.default_rng(seed)
    whole = Config(name="made", data=Data(tokenizer="byte", row_length=LENGTH), model=kind.model_config(config))
    shapes = {name: tensor.shape for name, tensor in stored(abstract_model(whole, config["vocab_size"]), kind.layout).items()}
    return {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


CONFIGS = {"llama": llama_config, "gpt2": gpt2_config, "hymba": hymba_config}


def write_folder(folder, family, config=None, state=None):
    """A sound model directory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[family]() if config is None else config
    state = tensors(family, config) if state is None else state
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}))
    return folder


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
    """{name: (kind, value)} of a sound file; a change to None takes a field away."""
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
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_tensors(state=None):
    """{name in a file: array}, rows of queries and keys as pairs."""
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
    """A file; info(name, [sizes, kind, offset]) may lie about a tensor, counts about their numbers."""
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


# ----------------------------------------------------------------------------------------------------------- damage


def _damage_bytes(draw, path):
    """Damage that any file can have."""
    content, how = (
        path.read_bytes(),
        draw.choice(["empty", "cut", "head", "middle", "tail", "noise", "folder", "gone", "latin", "more"]),
    )
    at = draw.randrange(max(1, len(content)))
    junk = bytes(draw.randrange(256) for _ in range(8))
    changed = {
        "empty": b"", "cut": content[:at], "head": junk + content[8:], "middle": content[:at] + junk + content[at + 8 :], "tail": content[:-8] + junk,
        "noise": bytes(draw.randrange(256) for _ in range(200)), "latin": b'{"a": "\xe9\xff"}', "more": content + junk,
    }  # fmt: skip
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(changed[how])
    return f"{path.name}: {how}"


def _damage_config(draw, folder, name="config.json"):
    path = folder / name
    config = json.loads(path.read_text()) if path.exists() else {}
    how = draw.choice(["junk", "junk", "junk", "new", "new", "drop", "twice", "list", "deep"])
    key = draw.choice([*config] or ["a"]) if how != "new" else draw.choice(NEW_KEYS)
    value = draw.choice(JUNK)
    text = {
        "drop": lambda: json.dumps({k: v for k, v in config.items() if k != key}), "list": lambda: json.dumps([config]),
        "twice": lambda: json.dumps(config)[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}", "deep": lambda: "[" * 100_000,
    }.get(how, lambda: json.dumps(config | {key: value}))  # fmt: skip
    path.write_text(text())
    return f"{name}: {how} {key} = {value!r:.40}"


def _damage_tensors(draw, folder, family):
    config = CONFIGS[family]()
    state = tensors(family, config)
    name = draw.choice([*state])
    value = state[name]
    kinds = [
        np.float16,
        np.float64,
        ml_dtypes.bfloat16,
        np.int32,
        np.uint8,
        np.bool_,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        np.int64,
    ]
    poison = value.copy()
    poison.reshape(-1)[draw.randrange(value.size)] = draw.choice([np.nan, np.inf, -np.inf])
    huge = value.astype(np.float64)
    huge.reshape(-1)[0] = 1e300
    how = draw.choice(
        [
            "drop",
            "extra",
            "turned",
            "short",
            "longer",
            "flat",
            "scalar",
            "none",
            "kind",
            "kind",
            "kind",
            "poison",
            "poison",
            "huge",
        ]
    )
    changed = {
        "turned": value.T, "short": value[:-1], "longer": np.concatenate([value, value]), "flat": value.reshape(-1), "scalar": value.reshape(-1)[0],
        "none": value[:0], "kind": value.astype(draw.choice(kinds)), "poison": poison, "huge": huge,
    }  # fmt: skip
    if how == "drop":
        del state[name]
    else:
        state[f"{name}.more" if how == "extra" else name] = np.ascontiguousarray(changed.get(how, value))
    save_file(state, folder / "model.safetensors")
    return f"{name}: {how} {state[name].dtype if how == 'kind' else ''}"


def _damage_header(draw, folder):
    """A safetensors header that lies."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    how = draw.choice(["length", "dtype", "shape", "offsets", "huge", "negative", "twice", "strange"])
    if how == "length":
        path.write_bytes(struct.pack("<Q", draw.choice([0, 1, 2**40, 2**63, size - 1, size + 1])) + content[8:])
        return "header: length"
    entry |= {
        "dtype": {"dtype": draw.choice(["F3", "", "F8_E4M3", "F4", "I4"])}, "shape": {"shape": draw.choice([[0], [], [2**40], ["a"], None])},
        "offsets": {"data_offsets": [0, 4]}, "huge": {"data_offsets": [0, 2**50]}, "negative": {"shape": [-1, 3]}, "twice": {},
        "strange": {"shape": [1.5], "more": 1},
    }[how]  # fmt: skip
    text = json.dumps(header)
    text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}" if how == "twice" else text
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + content[8 + size :])
    return f"header: {how} {name}"


def _damage_index(draw, folder, family):
    state = tensors(family, CONFIGS[family]())
    names = [*state]
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, folder / file)
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    weights = {name: file for file, held in parts.items() for name in held}
    one, index = draw.choice(names), {"metadata": {"total_size": 1}, "weight_map": weights}
    wrong = [
        "../outside.safetensors",
        "c.safetensors",
        "/etc/passwd",
        3,
        None,
        "",
        ".",
        "a\0b",
        "a\nb",
        ["a"],
        "x/../a.safetensors",
        "config.json",
    ]
    how = draw.choice(["place", "place", "place", "other", "lost", "head", "more", "none", "list", "text", "moved"])
    match how:
        case "place":
            weights[one] = draw.choice(wrong)
        case "other":
            weights[one] = "b.safetensors" if weights[one] == "a.safetensors" else "a.safetensors"
        case "lost":
            weights["lost.weight"] = "a.safetensors"
        case "head":
            weights |= {"lm_head.weight": "a.safetensors"}
        case "more":
            index |= {"more": [1]}
        case "none":
            del index["weight_map"]
        case "moved":
            (folder / "b.safetensors").unlink()
    index = {"list": [index], "text": {"weight_map": "a"}}.get(how, index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"index: {how} {weights.get(one)!r}"


def _damage_tokenizer(draw, folder):
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    how = draw.choice(["far", "negative", "no model", "list", "merges", "special"])
    match how:
        case "far":
            whole["model"]["vocab"]["zz"] = 2**31
        case "negative":
            whole["model"]["vocab"]["!"] = -1
        case "no model":
            del whole["model"]
        case "list":
            whole = [whole]
        case "merges":
            whole["model"]["merges"] = [["q", "nothing"]]
        case "special":
            whole["added_tokens"] = None
    path.write_text(json.dumps(whole))
    return f"tokenizer.json: {how}"


def damage_folder(draw, folder, family):
    """One kind of damage to a sound model directory; says which."""
    write_folder(folder, family)
    what = draw.choice(["config"] * 6 + ["tensors"] * 4 + ["bytes"] * 2 + ["header", "index", "index", "tokenizer", "tokens"])
    match what:
        case "config":
            return _damage_config(draw, folder)
        case "tensors":
            return _damage_tensors(draw, folder, family)
        case "bytes":
            return _damage_bytes(
                draw, folder / draw.choice(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
            )
        case "header":
            return _damage_header(draw, folder)
        case "index":
            return _damage_index(draw, folder, family)
        case "tokenizer":
            return _damage_tokenizer(draw, folder)
    return _damage_config(draw, folder, draw.choice(["tokenizer_config.json", "generation_config.json"]))


def damage_gguf(draw, path):
    """The same of a GGUF file."""
    how = draw.choice(
        [
            "bytes",
            "flips",
            "field",
            "field",
            "field",
            "new",
            "new",
            "drop",
            "counts",
            "array",
            "tensor",
            "tensor",
            "poison",
            "lost",
            "kind",
        ]
    )
    fields, arrays, options = gguf_fields(), gguf_tensors(), {}
    key, name = draw.choice([*fields]), draw.choice([*arrays])
    junk = [
        ("u32", draw.choice([0, 1, 3, 2**32 - 1])),
        ("f32", draw.choice([math.nan, -1.0, 0.5, math.inf])),
        ("text", draw.choice(["", "x", "\x1b[2J"])),
    ]
    junk += [
        ("list of u32", draw.choice([[], [2] * LAYERS, [1, 2]])),
        ("bool", True),
        ("u64", 2**60),
        ("i32", -1),
        ("list of text", ["a"]),
        ("f64", 1e300),
    ]
    told = f"gguf: {how} {key} {name}"
    match how:
        case "field":
            fields[key] = draw.choice(junk)
            told += f" {fields[key]!r:.60}"
        case "new":
            new = [
                "rope.scale_linear",
                "rope.scaling.factor",
                "rope.scaling.type",
                "logit_scale",
                "attention.sliding_window",
                "rope.dimension_count",
            ]
            new += [
                "attention.key_length",
                "rope.freq_base",
                "expert_count",
                "vocab_size",
                "colour",
                "attention.causal",
                "attention.scale",
            ]
            key = draw.choice(
                [
                    *(f"llama.{end}" for end in new),
                    "split.count",
                    "split.no",
                    "general.alignment",
                    "general.type",
                    "tokenizer.ggml.eot_token_id",
                ]
            )
            fields[key] = draw.choice(junk)
            told = f"gguf: new {key} {fields[key]!r:.60}"
        case "drop":
            del fields[key]
        case "counts":
            options["counts"] = draw.choice(
                [(2**60, len(fields)), (len(arrays), 2**60), (0, len(fields)), (len(arrays), 0), (len(arrays) + 1, len(fields))]
            )
        case "array":
            fields[key] = struct.pack("<IIQ", 9, draw.choice([0, 4, 8, 9, 99]), draw.choice([2**60, 2**63, 10**6])) + b"\0" * 16
        case "tensor":
            lies = [
                lambda e: [[], *e[1:]],
                lambda e: [[0], *e[1:]],
                lambda e: [[2**40, 2**40], *e[1:]],
                lambda e: [e[0], 99, e[2]],
            ]
            lies += [
                lambda e: [e[0], 26, e[2]],
                lambda e: [e[0], 8, e[2]],
                lambda e: [*e[:2], 2**62],
                lambda e: [*e[:2], e[2] + 3],
                lambda e: [e[0] * 5, *e[1:]],
            ]
            lie = draw.choice(lies)
            options["info"] = lambda n, entry: lie(entry) if n == name else entry
        case "poison":
            arrays[name].reshape(-1)[0] = draw.choice([np.nan, np.inf])
        case "lost":
            del arrays[name]
        case "kind":
            options["version"] = draw.choice([0, 1, 2, 4, 3 << 24])
    path.write_bytes(gguf_bytes(fields, arrays, **options))
    if how == "bytes":
        return _damage_bytes(draw, path)
    if how == "flips":
        content = bytearray(path.read_bytes())
        for _ in range(draw.randrange(1, 5)):
            content[draw.randrange(min(len(content), 9000))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    return told


# --------------------------------------------------------------------------------------------------------------- run


class TooLong(BaseException):
    """An import took longer than it may."""


def _alarm(*_):
    raise TooLong


def verdict(family, source, places):
    """ "refused", "imported", or what is wrong with how the import ended."""
    from metajax.config import UserError
    from metajax.experiment import open_run
    from metajax.interop.imports import import_directory, import_gguf
    from metajax.models.lm import named_params

    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    try:
        if family == "gguf":
            workdir = import_gguf(source, places / "runs", places / "cache", "")
        else:
            workdir = import_directory(family, source, places / "runs", "")
        model = open_run(workdir).model
    except UserError as error:
        plain = str(error).isprintable() and len(str(error)) < 2500
        return "refused" if plain else f"no plain line: {str(error)!r:.300}"
    except TooLong:
        return f"more than {SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)
    wrong = [name for name, param in named_params(model).items() if not np.isfinite(np.asarray(param[...])).all()]
    return f"numbers that are none in {wrong}" if wrong else "imported"


def run(folder, count, seed=0, families=("llama", "gpt2", "hymba", "gguf")):
    """Make and import `count` damaged checkpoints below `folder`: ({verdict: how often}, [what was neither refused nor imported])."""
    counts, failures = {"refused": 0, "imported": 0}, []
    for n in range(seed, seed + count):
        draw, family, place = random.Random(n), families[n % len(families)], folder / f"case{n}"
        place.mkdir(parents=True)
        source = place / ("model.gguf" if family == "gguf" else "model")
        told = damage_gguf(draw, source) if family == "gguf" else damage_folder(draw, source, family)
        started, ended = time.monotonic(), verdict(family, source, place)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if peak > BYTES:
            ended = f"{peak:,} bytes"
        if ended in counts:
            counts[ended] += 1
            shutil.rmtree(place)
        else:
            failures.append(f"case {n}, {family}, {told}: {ended} ({time.monotonic() - started:.1f} s, {place})")
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts, failures = run(options.folder, options.count, options.seed)
    print(
        f"{sum(counts.values()) + len(failures)} damaged checkpoints: {counts['refused']} refused in one line, {counts['imported']} imported"
    )
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
