"""GPT-2 and Llama directories: names, shapes and orientation, round trips of runs, named refusals, and memory use of a load."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from metajax.cli.main import main
from metajax.config import Config, Data, Hybrid, MetaTokens, Model
from metajax.core.errors import UserError
from metajax.data.tokenizers import Bytes
from metajax.interop import layouts, llama
from metajax.interop.exports import export_run
from metajax.interop.families import FAMILIES
from metajax.interop.files import Values, open_directory, write_tensors
from metajax.interop.imports import import_directory
from metajax.interop.layouts import load_model
from metajax.models.lm import named_params
from metajax.models.presets import gpt2
from metajax.models.presets import llama as llama_shape
from metajax.runs.directory import find_run
from metajax.training.opened import OpenedRun, open_run
from metajax.training.program import abstract_model, build_model

ROOT = Path(__file__).parents[2]
GOLDEN = np.load(ROOT / "tests/goldens/hfgpt2_a.npz")
SMALL = {
    "gpt2": gpt2(2, 2, 16, bias=True, activation="gelu_tanh"),
    "llama": llama_shape(3, 4, 16, kv_heads=2, mlp_width=24, rope_theta=50_000.0),
}


def a_run(model, folder, **parts):
    """An opened run whose parameters all differ."""
    config = Config(name="made", data=Data(tokenizer="byte", sequence_length=32), model=model, **parts)
    draw, tokenizer = np.random.default_rng(0), Bytes()
    made = build_model(config, tokenizer.vocabulary.size, jax.random.key(0))
    made = jax.tree.map(lambda leaf: leaf + jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), made)
    return OpenedRun(config, folder, tokenizer, None, made)


def logits(model, ids):
    return model(ids, positions=jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), segment_ids=jnp.ones_like(ids))


def equal(a, b):
    a, b = named_params(a), named_params(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name][...], b[name][...]) for name in a)


# ------------------------------------------------------------------------------------------------- there and back


def test_import_and_export_restore_hugging_faces_gpt2(tmp_path, capsys):
    """By the command line: the golden as a hub folder whose names lack "transformer.", as in published files; the export has the full names."""
    places = ["--runs-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache")]
    hub, state = tmp_path / "hub", {k.removeprefix("sd/"): GOLDEN[k] for k in GOLDEN.files if k.startswith("sd/")}
    hub.mkdir()
    (hub / "config.json").write_text(str(GOLDEN["config_json"]))
    save_file({name.removeprefix("transformer."): value for name, value in state.items()}, hub / "model.safetensors")
    assert main(["import", "gpt2", str(hub), "--tokenizer", "byte", *places]) == 0
    opened = open_run(find_run("imported/hub", tmp_path / "runs"))
    found = logits(opened.model, jnp.asarray(GOLDEN["ids"]))[..., :70]
    np.testing.assert_allclose(found, GOLDEN["logits"], atol=3e-5, rtol=0)
    assert main(["export", "gpt2", "imported/hub", str(tmp_path / "out"), *places]) == 0
    back, config = load_file(tmp_path / "out/model.safetensors"), json.loads((tmp_path / "out/config.json").read_text())
    assert back.keys() == state.keys() and all(np.array_equal(back[name], state[name]) for name in state)
    known = json.loads(str(GOLDEN["config_json"]))
    explicit = {"n_inner": 128, "n_ctx": 32, "torch_dtype": "float32", "architectures": ["GPT2LMHeadModel"]}
    assert config == {name: known.get(name) for name in config} | explicit
    assert main(["export", "llama", "imported/hub", str(tmp_path / "other"), *places]) == 2
    assert "error: model.activation is 'gelu_tanh', but Llama has 'swiglu' alone" in capsys.readouterr().err
    shutil.copytree(tmp_path / "out", tmp_path / "runs" / "out")
    assert main(["runs", *places]) == 0, "an exported folder is not a run"
    said = capsys.readouterr()
    assert "imported/hub" in said.out and "out is not a run: its config.json is another program's" in said.err


@pytest.mark.parametrize("changes", [{}, {"tied": True, "bias": True}], ids=["own head", "tied, biases"])
def test_import_and_export_restore_a_llama(tmp_path, changes):
    """Hugging Face's names and shapes, transposed linear maps; every number, the tokenizer and the config are restored."""
    opened = a_run(replace(SMALL["llama"], **changes), tmp_path)
    export_run(opened, "llama", tmp_path / "out")
    config, state = json.loads((tmp_path / "out/config.json").read_text()), load_file(tmp_path / "out/model.safetensors")
    words, tied, biased = opened.tokenizer.vocabulary.size, opened.model.cfg.tied, opened.model.cfg.bias
    maps = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16)}
    maps |= {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
    expected = {"model.embed_tokens.weight": (words, 16), "model.norm.weight": (16,)} | (
        {} if tied else {"lm_head.weight": (words, 16)}
    )
    for layer in range(3):
        tensors = {f"{name}.weight": shape for name, shape in maps.items()}
        tensors |= {f"{name}.bias": shape[:1] for name, shape in maps.items()} if biased else {}
        tensors |= {"input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,)}
        expected |= {f"model.layers.{layer}.{name}": shape for name, shape in tensors.items()}
    assert {name: value.shape for name, value in state.items()} == expected
    ours = named_params(opened.model)["blocks.0.0.mixer.attention.key.w"]
    assert np.array_equal(state["model.layers.2.self_attn.k_proj.weight"], ours[2].T)
    assert config["tie_word_embeddings"] is tied and config["attention_bias"] is config["mlp_bias"] is biased
    assert (config["rope_theta"], config["num_key_value_heads"], config["vocab_size"]) == (50_000.0, 2, words)

    again = open_run(import_directory("llama", tmp_path / "out", tmp_path / "runs", ""))
    assert (
        again.config.model == replace(opened.config.model, kv_heads=2)
        and again.tokenizer.vocabulary == opened.tokenizer.vocabulary
    )
    assert equal(again.model, opened.model)


def test_gpt2_without_biases_gets_some_of_zero(tmp_path):
    opened = a_run(gpt2(2, 2, 16), tmp_path)
    export_run(opened, "gpt2", tmp_path / "out", shard_bytes=20_000)
    values, tensors = open_directory(tmp_path / "out", "gpt2")
    model = load_model(tensors, FAMILIES["gpt2"].model_config(values), FAMILIES["gpt2"].layout, max_length=32)
    assert model.cfg.bias and model.cfg.activation == "gelu" and not np.any(tensors["transformer.h.1.mlp.c_fc.bias"][:])
    ids = jnp.arange(8)[None]
    assert np.array_equal(logits(model, ids), logits(opened.model, ids))


def test_half_precision(tmp_path):
    opened = a_run(SMALL["llama"], tmp_path)
    for dtype in ("bfloat16", "float16"):
        export_run(opened, "llama", tmp_path / dtype, dtype)
        values, tensors = open_directory(tmp_path / dtype, "llama")
        model = load_model(tensors, llama.model_config(values), llama.LAYOUT)
        rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), opened.model)  # noqa: B023
        assert values["torch_dtype"] == dtype and equal(model, rounded)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("family", "model", "parts", "message"),
    [
        ("gpt2", replace(SMALL["gpt2"], window=8), {}, r"model\.window is 8, but GPT-2 has None alone"),
        ("gpt2", replace(SMALL["gpt2"], position="rope"), {}, r"model\.position is 'rope', but GPT-2 has 'learned'"),
        ("gpt2", replace(SMALL["gpt2"], kv_heads=1), {}, r"model\.num_kv_heads is 1"),
        ("llama", replace(SMALL["llama"], position="ntk", rope_original_length=8), {}, r"model\.position is 'ntk'"),
        ("llama", replace(SMALL["llama"], norm_position="post"), {}, r"model\.norm_position is 'post'"),
        (
            "llama",
            replace(SMALL["llama"], hybrid=Hybrid(prefix_tokens=2, state=2)),
            {},
            r"model\.hybrid is set, but Llama has None",
        ),
        ("llama", SMALL["llama"], {"meta_tokens": MetaTokens()}, r"meta_tokens\.attention is 'gathered'"),
        (
            "llama",
            SMALL["llama"],
            {"meta_tokens": MetaTokens(attention="none", zero_position="both")},
            r"meta_tokens\.zero_position",
        ),
        ("hymba", SMALL["llama"], {}, r"model\.hybrid is null"),
    ],
)
def test_fields_without_a_place_in_the_layout_are_named(tmp_path, family, model, parts, message):
    config = Config(name="made", data=Data(tokenizer="byte", sequence_length=32), model=model, **parts)
    opened = OpenedRun(config, tmp_path, Bytes(), None, abstract_model(config, 320))
    with pytest.raises(UserError, match=message):
        export_run(opened, family, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, r"lacks rope_scaling\.factor"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type = 'dynamic'"),
        ("llama", {"head_dim": 32}, "head_dim = 32, but only 4"),
        ("llama", {"hidden_size": None}, "lacks hidden_size"),
        ("gpt2", {"activation_function": "silu"}, "activation_function = 'silu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_unsupported_settings_are_named(family, change, message):
    kind = FAMILIES[family]
    values = kind.hub_config(SMALL[family], 32)
    assert kind.model_config(values) == replace(
        SMALL[family], kv_heads=SMALL[family].kv_heads, max_positions=32 * (family == "gpt2")
    )
    changed = {name: value for name, value in (values | change).items() if value is not None or name not in change}
    with pytest.raises(UserError, match=message):
        kind.model_config(Values(changed))


# --------------------------------------------------------------------------------------------------------- memory

WIDE = Model(
    layers=4, width=128, heads=2, mlp_width=4096, norm="rmsnorm", activation="swiglu", tied=False, position="rope"
)  # linear maps of 2 MiB, stacks of 8


class Ones:
    """A tensor that is made where it is read."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape):
        self.shape = shape

    def __getitem__(self, index):
        return np.ones([len(range(size)[part]) for part, size in zip(index, self.shape, strict=True)], np.float32)


def test_a_load_holds_one_tensor_at_a_time():
    """Memory of NumPy and Python stays below twice the largest tensor, which a whole stack or two tensors read ahead would exceed."""
    config = Config(name="wide", data=Data(tokenizer="byte", sequence_length=32), model=WIDE)
    shapes = {name: tensor.shape for name, tensor in layouts.stored(abstract_model(config, 320), llama.LAYOUT).items()}
    state = {name: Ones(shape) for name, shape in shapes.items()}
    load_model(state, WIDE, llama.LAYOUT)  # compiles, which has memory of its own
    tracemalloc.start()
    model = load_model(state, WIDE, llama.LAYOUT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 4 * 128 * 4096
    assert largest < peak < 2 * largest
    assert all(np.all(param[...] == 1) for param in named_params(model).values())


def test_an_export_holds_one_tensor_at_a_time(tmp_path):
    config = Config(name="wide", data=Data(tokenizer="byte", sequence_length=32), model=WIDE)
    model = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_model(config, 320))
    shapes = {name: tensor.shape for name, tensor in layouts.stored(model, llama.LAYOUT).items()}
    tracemalloc.start()
    write_tensors(tmp_path, shapes, layouts.tensors_of(model, llama.LAYOUT), "float32", 10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 4 * 128 * 4096
    assert largest < peak < 3 * largest, "the transposed tensor and the previous one"
    assert (tmp_path / "model.safetensors").stat().st_size > 8 * largest


def test_a_stack_is_filled_in_its_place():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stack = jnp.zeros((2, 3), device=sharding)
    filled = layouts._put(sharding)(stack, jnp.ones(3), 1)
    assert stack.is_deleted() and np.array_equal(filled, [[0, 0, 0], [1, 1, 1]])


SPREAD = """
import sys
import jax, numpy as np
from pathlib import Path
from metajax.interop import llama
from metajax.interop.files import Values, open_directory, write_tensors
from metajax.interop.layouts import load_model
from metajax.models.lm import named_params
from metajax.distributed.mesh import make_mesh
from metajax.distributed.rules import param_shardings

values, tensors = open_directory(Path(sys.argv[1]), "llama")
mesh, cfg = make_mesh("data=1,fsdp=-1"), llama.model_config(values)
spread = named_params(load_model(tensors, cfg, llama.LAYOUT, vocab_size=384, shardings=lambda model: param_shardings(model, mesh)))
whole = named_params(load_model(tensors, cfg, llama.LAYOUT, vocab_size=384))
local = sum(p[...].addressable_shards[0].data.nbytes for p in spread.values()) / sum(p[...].nbytes for p in spread.values())
assert mesh.shape["fsdp"] == 4 and local < 0.3, local
assert all(np.array_equal(spread[name][...], whole[name][...]) for name in whole)
print("equal")
"""


def test_each_device_gets_its_shard(tmp_path):
    export_run(a_run(SMALL["llama"], tmp_path), "llama", tmp_path / "out")
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SPREAD, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-2000:]
