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

sys.path.append(str(Path(__file__).parents[2]))  # for the command line

from sound_checkpoints import CONFIGS, gguf_bytes, gguf_fields, gguf_tensors, tensors, write_folder

from metajax.core.errors import UserError
from metajax.interop.imports import import_directory, import_gguf
from metajax.models.lm import named_params
from metajax.training.opened import open_run

SECONDS, BYTES = 20, 2 << 30  # that one import may take
JUNK = [None, -1, 0, 1, 3, 7, 10**9, 2**60, 10**30, 2**31, 2**32, 1.5, -0.5, 1e308, math.nan, math.inf, -math.inf, True, False]
JUNK += ["32", "", "nan", "\x1b[2J", "\n", "x" * 5000, [], [1], [-1], [None], [[[1]]], ["h", "x"]]
JUNK += [{}, {"a": 1}, {"rope_type": "linear"}, {"rope_type": ["a"], "factor": "b"}]
NEW_KEYS = """
    logit_scale sliding_window quantization_config rope_scaling rope_parameters head_dim attention_multiplier layer_types
    tie_word_embeddings mlp_bias attention_bias partial_rotary_factor torch_dtype eos_token_id pad_token_id vocab_size
    max_position_embeddings colour n_inner model_type hidden_act activation_function initializer_range rms_norm_eps
""".split()


# ----------------------------------------------------------------------------------------------------------- damage


def _damage_bytes(draw, path):
    """Damage for any kind of file."""
    content = path.read_bytes()
    how = draw.choice("empty cut head middle tail noise folder gone latin more".split())
    at = draw.randrange(max(1, len(content)))
    junk = bytes(draw.randrange(256) for _ in range(8))
    changed = {
        "empty": b"",
        "cut": content[:at],
        "head": junk + content[8:],
        "middle": content[:at] + junk + content[at + 8 :],
        "tail": content[:-8] + junk,
        "noise": bytes(draw.randrange(256) for _ in range(200)),
        "latin": b'{"a": "\xe9\xff"}',
        "more": content + junk,
    }
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
        "drop": lambda: json.dumps({k: v for k, v in config.items() if k != key}),
        "list": lambda: json.dumps([config]),
        "twice": lambda: json.dumps(config)[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}",
        "deep": lambda: "[" * 100_000,
    }.get(how, lambda: json.dumps(config | {key: value}))
    path.write_text(text())
    return f"{name}: {how} {key} = {value!r:.40}"


def _damage_tensors(draw, folder, family):
    config = CONFIGS[family]()
    state = tensors(family, config)
    name = draw.choice([*state])
    value = state[name]
    kinds = [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
    kinds += [np.int32, np.uint8, np.bool_, np.int64]
    poison = value.copy()
    poison.reshape(-1)[draw.randrange(value.size)] = draw.choice([np.nan, np.inf, -np.inf])
    huge = value.astype(np.float64)
    huge.reshape(-1)[0] = 1e300
    ways = "drop extra turned short longer flat scalar none kind kind kind poison poison huge"
    how = draw.choice(ways.split())
    changed = {
        "turned": value.T,
        "short": value[:-1],
        "longer": np.concatenate([value, value]),
        "flat": value.reshape(-1),
        "scalar": value.reshape(-1)[0],
        "none": value[:0],
        "kind": value.astype(draw.choice(kinds)),
        "poison": poison,
        "huge": huge,
    }
    if how == "drop":
        del state[name]
    else:
        state[f"{name}.more" if how == "extra" else name] = np.ascontiguousarray(changed.get(how, value))
    save_file(state, folder / "model.safetensors")
    return f"{name}: {how} {state[name].dtype if how == 'kind' else ''}"


def _damage_header(draw, folder):
    """A safetensors header with false entries."""
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
        "dtype": {"dtype": draw.choice(["F3", "", "F8_E4M3", "F4", "I4"])},
        "shape": {"shape": draw.choice([[0], [], [2**40], ["a"], None])},
        "offsets": {"data_offsets": [0, 4]},
        "huge": {"data_offsets": [0, 2**50]},
        "negative": {"shape": [-1, 3]},
        "twice": {},
        "strange": {"shape": [1.5], "more": 1},
    }[how]
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
    wrong = ["../outside.safetensors", "c.safetensors", "/etc/passwd", "x/../a.safetensors", "config.json"]
    wrong += [3, None, "", ".", "a\0b", "a\nb", ["a"]]
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
    """Damage an intact model directory in one way; returns its description."""
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


_NEW_FIELDS = """
    llama.rope.scale_linear llama.rope.scaling.factor llama.rope.scaling.type llama.logit_scale llama.attention.sliding_window
    llama.rope.dimension_count llama.attention.key_length llama.rope.freq_base llama.expert_count llama.vocab_size llama.colour
    llama.attention.causal llama.attention.scale split.count split.no general.alignment general.type tokenizer.ggml.eot_token_id
""".split()
_FIELD_JUNK = {
    "u32": [0, 1, 3, 2**32 - 1],
    "u64": [2**60],
    "i32": [-1],
    "f32": [math.nan, -1.0, 0.5, math.inf],
    "f64": [1e300],
    "bool": [True],
    "text": ["", "x", "\x1b[2J"],
    "list of u32": [[], [2, 2], [1, 2]],
    "list of text": [["a"]],
}
_TENSOR_LIES = [  # (sizes, kind, offset) from the true ones
    lambda sizes, kind, at: [[], kind, at],
    lambda sizes, kind, at: [[0], kind, at],
    lambda sizes, kind, at: [[2**40] * 2, kind, at],
    lambda sizes, kind, at: [sizes, 99, at],
    lambda sizes, kind, at: [sizes, 26, at],
    lambda sizes, kind, at: [sizes, 8, at],
    lambda sizes, kind, at: [sizes, kind, 2**62],
    lambda sizes, kind, at: [sizes, kind, at + 3],
    lambda sizes, kind, at: [sizes * 5, kind, at],
]


def _lying_gguf(draw, how):
    """(bytes of a GGUF file with one false field, tensor or count, description of the false entry)."""
    fields, arrays, options = gguf_fields(), gguf_tensors(), {}
    key, name = draw.choice(_NEW_FIELDS if how == "new" else [*fields]), draw.choice([*arrays])
    n, m = len(arrays), len(fields)
    match how:
        case "field" | "new":
            fields[key] = draw.choice([(kind, value) for kind, values in _FIELD_JUNK.items() for value in values])
        case "drop":
            del fields[key]
        case "counts":
            options["counts"] = draw.choice([(2**60, m), (n, 2**60), (0, m), (n, 0), (n + 1, m)])
        case "array":
            fields[key] = struct.pack("<IIQ", 9, draw.choice([0, 4, 8, 9, 99]), draw.choice([2**60, 2**63, 10**6])) + b"\0" * 16
        case "tensor":
            lie = draw.choice(_TENSOR_LIES)
            options["info"] = lambda other, entry: lie(*entry) if other == name else entry
        case "poison":
            arrays[name].reshape(-1)[0] = draw.choice([np.nan, np.inf])
        case "lost":
            del arrays[name]
        case "kind":
            options["version"] = draw.choice([0, 1, 2, 4, 3 << 24])
    return gguf_bytes(fields, arrays, **options), f"gguf: {how} {key} {fields.get(key)!r:.60} {name}"


def damage_gguf(draw, path):
    """Damage a GGUF file in one way; returns its description."""
    ways = ["bytes", "flips", *["field"] * 3, *["new"] * 2, "drop", "counts", "array", *["tensor"] * 2, "poison", "lost", "kind"]
    how = draw.choice(ways)
    content, told = _lying_gguf(draw, how)
    path.write_bytes(content)
    if how == "bytes":
        return _damage_bytes(draw, path)
    if how == "flips":
        flipped = bytearray(content)
        for _ in range(draw.randrange(1, 5)):
            flipped[draw.randrange(min(len(flipped), 9000))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
    return told


# --------------------------------------------------------------------------------------------------------------- run


class TooLong(BaseException):
    """An import took longer than it may."""


def _alarm(*_):
    raise TooLong


def verdict(family, source, places):
    """ "refused", "imported", or the problem with the end of the import."""

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


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(folder, count, seed=0, families=("llama", "gpt2", "hymba", "gguf")):
    """Make and import `count` damaged checkpoints below `folder`: ({verdict: count}, [cases with another outcome])."""
    counts, failures = {"refused": 0, "imported": 0}, []
    most = max(BYTES, _peak() + BYTES // 4)  # other tests of this process may have taken more than one import may
    for n in range(seed, seed + count):
        draw, family, place = random.Random(n), families[n % len(families)], folder / f"case{n}"
        place.mkdir(parents=True)
        source = place / ("model.gguf" if family == "gguf" else "model")
        told = damage_gguf(draw, source) if family == "gguf" else damage_folder(draw, source, family)
        started, ended = time.monotonic(), verdict(family, source, place)
        peak = _peak()
        if peak > most:
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
    sys.exit(main())
