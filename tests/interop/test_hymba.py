"""Hymba directories: shards, the tied head, named refusals, slices for each device, and round trips of runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from metajax.config import Config, Data, Runtime
from metajax.core.errors import UserError
from metajax.data.tokenizers import Bytes
from metajax.interop.exports import export_run
from metajax.interop.files import open_directory
from metajax.interop.hymba import LAYOUT, hub_config, model_config
from metajax.interop.imports import import_directory
from metajax.interop.layouts import load_model, read_part, stored, tensors_of
from metajax.models.lm import LM, named_params
from metajax.models.presets import hymba_1_5b, hymba_cpu
from metajax.training.opened import OpenedRun, open_run
from metajax.training.program import abstract_model

GOLDENS = Path(__file__).parents[1] / "goldens"
HUB = GOLDENS / "hymba_b_hf"
CONFIG = json.loads((HUB / "config.json").read_text())
STATE = load_file(HUB / "model.safetensors")
MODEL = model_config(CONFIG)
EMBEDDING = "model.embed_tokens.weight"


def equal(a, b):
    return all(np.array_equal(x[...], named_params(b)[name][...]) for name, x in named_params(a).items())


def test_the_released_tensors_have_their_names_and_shapes():
    """Names and shapes of the 1.5B model in the released code."""
    manifest = json.loads((GOLDENS / "hymba_manifest.json").read_text())
    model = jax.eval_shape(
        lambda: LM(hymba_1_5b(), vocab_size=32001, max_length=1, meta=None, runtime=Runtime(), key=jax.random.key(0))
    )
    assert {name: list(tensor.shape) for name, tensor in stored(model, LAYOUT).items()} == manifest


def test_import_and_export_restore_weights():
    back = dict(tensors_of(load_model(STATE, MODEL, LAYOUT), LAYOUT))
    assert back.keys() == STATE.keys() and all(np.array_equal(back[name], STATE[name]) for name in STATE)


def test_shards_and_a_tied_head(tmp_path):
    shutil.copy(HUB / "config.json", tmp_path)
    names, weight_map = sorted(STATE), {}
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        head = {"lm_head.weight": STATE[EMBEDDING]} if file == "a.safetensors" else {}
        save_file({name: STATE[name] for name in held} | head, tmp_path / file)
        weight_map |= dict.fromkeys([*held, *head], file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert equal(load_model(open_directory(tmp_path, "hymba")[1], MODEL, LAYOUT), load_model(STATE, MODEL, LAYOUT))
    index.write_text(json.dumps({"weight_map": weight_map | {"lost": "a.safetensors"}}))
    with pytest.raises(UserError, match=r"a\.safetensors lacks lost"):
        open_directory(tmp_path, "hymba")
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks the shard b\.safetensors"):
        open_directory(tmp_path, "hymba")


class Watched:
    """A tensor that remembers how much of it was read at a time."""

    def __init__(self, value, read):
        self.value, self.shape, self.dtype, self.read = value, value.shape, value.dtype, read

    def __getitem__(self, index):
        part = self.value[index]
        self.read.append(part.size)
        return part


@pytest.mark.parametrize("axis", [0, -1])
def test_each_device_reads_its_own_part(axis):
    """Two halves of a layer's parameter together equal the parameter, and each is read without the other."""
    whole = load_model(STATE, MODEL, LAYOUT)
    params = named_params(whole)
    for name, tensor in stored(whole, LAYOUT).items():
        for part in tensor.parts:
            ours = np.asarray(params[part.path][...] if part.layer is None else params[part.path][...][part.layer])
            size, halves = ours.shape[axis], []
            for half in (slice(0, size // 2), slice(size // 2, size)):
                read: list[int] = []
                index = [slice(0, along) for along in ours.shape]
                index[axis] = half
                halves.append(read_part({name: Watched(STATE[name], read)}, LAYOUT, name, part, tuple(index)))
                assert sum(read) == halves[-1].size, name
            assert np.array_equal(np.concatenate(halves, axis), ours), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.2.mamba.D.0": None}, r"lacks model\.layers\.2\.mamba\.D\.0"),
        ({"model.layers.9.mamba.D.0": STATE[EMBEDDING]}, r"does not: model\.layers\.9\.mamba\.D\.0"),
        (
            {"model.layers.1.mamba.A_log.0": STATE[EMBEDDING]},
            r"model\.layers\.1\.mamba\.A_log\.0 has shape \(61, 24\), .* \(48, 4\)",
        ),
        ({"lm_head.weight": STATE[EMBEDDING] + 1}, "differs from"),
        ({"lm_head.weight": STATE[EMBEDDING][1:]}, r"has shape \(60, 24\)"),
        ({EMBEDDING: None}, "not Hymba"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    state = {name: value for name, value in (STATE | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        load_model(state, MODEL, LAYOUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mamba_d_conv": 5}, "mamba_d_conv = 5, but a whole number from 2 to 4"),
        ({"kv_reuse_group": [[1, 3]]}, r"has \[1, 3\]"),
        ({"rope_type": "dynamic_ntk"}, "dynamic_ntk"),
        ({"layer_type": ["a", "h"]}, "layer_type = "),
    ],
)
def test_unsupported_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        model_config(CONFIG | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": "concat"}, "hybrid.fusion is 'concat'"),
        ({"branch_norm": "plain"}, "branch_norm"),
        ({"value_dim": 4}, "value_dim"),
    ],
)
def test_fields_without_a_place_in_hymbas_layout_are_named(change, message):
    with pytest.raises(UserError, match=message):
        hub_config(replace(MODEL, hybrid=replace(MODEL.hybrid, **change)), 128)
    with pytest.raises(UserError, match="rope_factor"):
        hub_config(replace(MODEL, rope_factor=1.9), 128)


def test_rows_of_the_embedding_are_filled_up_with_zeros():
    model = load_model(STATE, MODEL, LAYOUT, vocab_size=64)
    assert np.array_equal(model.embedding[:61], STATE[EMBEDDING]) and not np.any(model.embedding[61:])
    with pytest.raises(UserError, match="61 rows"):
        load_model(STATE, MODEL, LAYOUT, vocab_size=60)


@pytest.mark.parametrize(("hub", "dtype"), [("hymba_b_hf", "float32"), ("hymba_b_hf_bf16", "bfloat16")])
def test_import_and_export_restore_a_directory(tmp_path, hub, dtype):
    """After import and export the tensors are bit-identical and config.json is the same."""
    workdir = import_directory("hymba", GOLDENS / hub, tmp_path / "runs", "byte")
    opened = open_run(workdir)
    assert opened.config.name == f"imported/{hub}" and opened.config.model == MODEL
    export_run(opened, "hymba", tmp_path / "out", dtype)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (GOLDENS / hub, tmp_path / "out")]
    assert configs[0] == configs[1]
    before, after = (load_file(folder / "model.safetensors") for folder in (GOLDENS / hub, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and np.array_equal(value, after[name]), name
    with pytest.raises(UserError, match="already exists"):
        import_directory("hymba", GOLDENS / hub, tmp_path / "runs", "byte")
    with pytest.raises(UserError, match="--tokenizer"):
        import_directory("hymba", GOLDENS / hub, tmp_path / "runs", "")
    with pytest.raises(UserError, match="not empty"):
        export_run(opened, "hymba", tmp_path / "out")


def test_export_and_import_restore_a_hybrid_trained_here(tmp_path):
    """Every kind of layer and all rows of the model's own table, bit for bit."""
    config = Config(name="made", data=Data(tokenizer="byte", sequence_length=32), model=hymba_cpu())
    draw, tokenizer = np.random.default_rng(0), Bytes()
    model = jax.tree.map(
        lambda leaf: np.asarray(draw.normal(size=leaf.shape), np.float32), abstract_model(config, tokenizer.vocabulary.size)
    )
    export_run(OpenedRun(config, tmp_path, tokenizer, None, model), "hymba", tmp_path / "out")
    values, state = open_directory(tmp_path / "out", "hymba")
    assert values.keys() == CONFIG.keys() and values["vocab_size"] == tokenizer.vocabulary.size
    again = model_config(values)
    assert equal(load_model(state, again, LAYOUT), model)
    resolved = replace(hymba_cpu(), hybrid=replace(hymba_cpu().hybrid, dt_rank=hymba_cpu().dt_rank))
    assert again == resolved


def test_a_tied_head_is_exported_as_it_was_imported(tmp_path):
    folder = tmp_path / "with_head"
    folder.mkdir()
    shutil.copy(HUB / "config.json", folder)
    save_file(STATE | {"lm_head.weight": STATE[EMBEDDING]}, folder / "model.safetensors")
    opened = open_run(import_directory("hymba", folder, tmp_path / "runs", "byte"))
    export_run(opened, "hymba", tmp_path / "out", shard_bytes=100_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in STATE.values()) + STATE[EMBEDDING].nbytes
    assert len(set(index["weight_map"].values())) > 2
    files = {file: load_file(tmp_path / "out" / file) for file in set(index["weight_map"].values())}
    assert all(sum(value.nbytes for value in held.values()) <= 100_000 for held in files.values())
    back = {name: files[file][name] for name, file in index["weight_map"].items()}
    assert back.keys() == STATE.keys() | {"lm_head.weight"} and all(np.array_equal(back[name], STATE[name]) for name in STATE)
    assert equal(load_model(open_directory(tmp_path / "out", "hymba")[1], MODEL, LAYOUT), load_model(STATE, MODEL, LAYOUT))
