"""Hymba directories: shards, the tied head, every refusal by name, slices for each device, and a run that can be opened."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from metajax.config import Runtime, UserError
from metajax.experiment import open_run
from metajax.interop.hymba import _read, from_hymba, layout, model_config, open_directory, to_hymba, write_safetensors
from metajax.interop.imports import import_hymba
from metajax.models.lm import LM, named_params
from metajax.models.presets import hymba_1_5b

GOLDENS = Path(__file__).parents[1] / "goldens"
HUB = GOLDENS / "hymba_b_hf"
CONFIG = json.loads((HUB / "config.json").read_text())
STATE = load_file(HUB / "model.safetensors")
MODEL = model_config(CONFIG)
EMBEDDING = "model.embed_tokens.weight"


def equal(a, b):
    return all(np.array_equal(x[...], named_params(b)[name][...]) for name, x in named_params(a).items())


def test_the_released_tensors_have_their_names_and_shapes():
    """Names and shapes of the 1.5B as its own code instantiates them."""
    manifest = json.loads((GOLDENS / "hymba_manifest.json").read_text())
    model = jax.eval_shape(
        lambda: LM(hymba_1_5b(), vocab_size=32001, max_length=1, meta=None, runtime=Runtime(), key=jax.random.key(0))
    )
    assert {name: list(shape) for name, shape in layout(model)[1].items()} == manifest


def test_weights_there_and_back():
    back = to_hymba(from_hymba(STATE, MODEL))
    assert back.keys() == STATE.keys() and all(np.array_equal(back[name], STATE[name]) for name in STATE)


def test_shards_and_a_tied_head(tmp_path):
    shutil.copy(HUB / "config.json", tmp_path)
    names, weight_map = sorted(STATE), {}
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        head = {"lm_head.weight": STATE[EMBEDDING]} if file == "a.safetensors" else {}
        write_safetensors({name: STATE[name] for name in held} | head, tmp_path / file)
        weight_map |= dict.fromkeys([*held, *head], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert equal(from_hymba(open_directory(tmp_path)[1], MODEL), from_hymba(STATE, MODEL))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks the shard b\.safetensors"):
        open_directory(tmp_path)


class Watched:
    """A tensor that remembers how much of it was read at a time."""

    def __init__(self, value, read):
        self.value, self.shape, self.read = value, value.shape, read

    def __getitem__(self, index):
        part = self.value[index]
        self.read.append(part.size)
        return part


@pytest.mark.parametrize("axis", [0, -1])
def test_each_device_reads_its_own_part(axis):
    """Halves of every parameter, side by side, are the parameter; a half is read without the other."""
    whole = from_hymba(STATE, MODEL)
    places, _ = layout(whole)
    for path, param in named_params(whole).items():
        size, halves = param.shape[axis], []
        for part in (slice(0, size // 2), slice(size // 2, None)):
            read: list[int] = []
            index = [slice(None)] * param.ndim
            index[axis] = part
            state = {name: Watched(value, read) for name, value in STATE.items()}
            halves.append(_read(state, path, places[path], param.shape, tuple(index)) if part.stop != 0 else param[...][:0])
            assert sum(read) == halves[-1].size, path
        assert np.array_equal(np.concatenate(halves, axis), param[...]), path


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
        ({EMBEDDING: None}, "not a Hymba"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    state = {name: value for name, value in (STATE | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        from_hymba(state, MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mamba_d_conv": 3}, "mamba_d_conv = 3, but only 4"),
        ({"kv_reuse_group": [[1, 3]]}, r"has \[1, 3\]"),
        ({"rope_type": "dynamic_ntk"}, "dynamic_ntk"),
        ({"layer_type": ["a", "h"]}, "layer_type has a"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(change, message):
    with pytest.raises(UserError, match=message):
        model_config(CONFIG | change)


def test_rows_of_the_embedding_are_filled_up_with_zeros():
    model = from_hymba(STATE, MODEL, vocab_size=64)
    assert np.array_equal(model.embedding[:61], STATE[EMBEDDING]) and not np.any(model.embedding[61:])
    with pytest.raises(UserError, match="61 rows"):
        from_hymba(STATE, MODEL, vocab_size=60)


def test_an_imported_directory_is_a_run(tmp_path):
    workdir = import_hymba(HUB, tmp_path / "runs", "byte")
    opened = open_run(workdir)
    assert opened.config.name == "imported/hymba_b_hf" and opened.config.model == MODEL
    assert equal(opened.model, from_hymba(STATE, MODEL, vocab_size=opened.tokenizer.vocabulary.size))
    with pytest.raises(UserError, match="is there already"):
        import_hymba(HUB, tmp_path / "runs", "byte")
    with pytest.raises(UserError, match="--tokenizer"):
        import_hymba(HUB, tmp_path / "runs", "")
