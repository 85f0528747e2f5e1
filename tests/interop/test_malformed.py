"""Damaged and strange checkpoints: valid forms load; others are refused before allocation, with one line that names the error."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from mutations import run as run_mutations
from safetensors.numpy import save_file
from sound_checkpoints import (
    ROWS,
    byte_tokenizer,
    gguf_bytes,
    gguf_fields,
    gguf_tensors,
    hymba_config,
    llama_config,
    ours,
    run,
    tensors,
    write_folder,
)

from metajax.cli.main import main
from metajax.core.errors import UserError
from metajax.interop.families import FAMILIES
from metajax.interop.files import open_directory
from metajax.interop.gguf_files import open_gguf, write_gguf_tokenizer
from metajax.interop.imports import import_directory
from metajax.interop.layouts import load_model
from metajax.models.lm import named_params

CONFIG = llama_config()
STATE = tensors("llama", CONFIG)
UP = "model.layers.1.mlp.up_proj.weight"


def loaded(folder, family="llama"):
    values, found = open_directory(folder, family)
    return load_model(found, FAMILIES[family].model_config(values), FAMILIES[family].layout)


@pytest.mark.fault(6)
@pytest.mark.fault(33)
def test_damaged_checkpoints_are_refused_in_one_line_or_imported(tmp_path):
    """A sample of the cases of `python tests/interop/mutations.py`."""
    counts, failures = run_mutations(tmp_path, count=80, seed=7)
    assert not failures and counts["refused"] > 50 and counts["imported"] > 3, (counts, failures)


# --------------------------------------------------------------------------------------------------------------- tensors


def poisoned(value, number):
    value = value.copy()
    value.reshape(-1)[7] = number
    return value


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({UP: None, "model.norm.weight": None}, [UP, "model.norm.weight", "lacks"]),
        ({"model.layers.1.odd": STATE[UP]}, ["model.layers.1.odd", "configuration does not"]),
        (
            {UP: STATE[UP].T.copy(), "model.norm.weight": STATE[UP]},
            [f"{UP} has shape (16, 24), but (24, 16)", "model.norm.weight has shape"],
        ),
        ({UP: STATE[UP].astype(np.int32)}, [UP, "I32"]),
        ({UP: STATE[UP].astype(np.uint8), "model.norm.weight": None}, [UP, "U8", "lacks model.norm.weight"]),
        ({UP: STATE[UP].astype(ml_dtypes.float8_e4m3fn)}, [UP, "F8_E4M3"]),
        ({UP: STATE[UP].astype(ml_dtypes.float8_e5m2)}, [UP, "F8_E5M2"]),
        ({UP: poisoned(STATE[UP], np.nan)}, [UP, "NaN"]),
        ({"model.norm.weight": poisoned(STATE["model.norm.weight"], -np.inf)}, ["model.norm.weight", "infinite"]),
        ({"lm_head.weight": poisoned(STATE["lm_head.weight"], np.nan).astype(np.float16)}, ["lm_head.weight", "NaN"]),
        ({UP: np.full(STATE[UP].shape, 1e300)}, [UP, "infinite in float32"]),
        (
            {"model.embed_tokens.weight": STATE["model.embed_tokens.weight"].reshape(-1)},
            ["model.embed_tokens.weight has shape (4160,)"],
        ),
        ({"model.embed_tokens.weight": np.zeros((0, 16), np.float32)}, ["model.embed_tokens.weight has shape (0, 16)"]),
    ],
)
def test_every_tensor_that_does_not_fit_is_named(tmp_path, changes, named):
    state = {name: value for name, value in (STATE | changes).items() if value is not None}
    write_folder(tmp_path / "model", "llama", CONFIG, state)
    with pytest.raises(UserError) as caught:
        loaded(tmp_path / "model")
    assert all(name in str(caught.value) for name in named) and str(caught.value).isprintable(), caught.value


@pytest.mark.fault(33)
@pytest.mark.parametrize("kind", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_floating_point_numbers_of_every_width_load(tmp_path, kind):
    state = {name: value.astype(kind) for name, value in STATE.items()}
    model = loaded(write_folder(tmp_path / "model", "llama", CONFIG, state))
    assert np.array_equal(model.embedding[...], state["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.fault(33)
def test_sizes_are_checked_before_anything_is_allocated(tmp_path):
    """A config that needs petabytes is refused at once."""
    folder, most = write_folder(tmp_path / "model", "llama", CONFIG, STATE), 10**8
    for change in (
        {"num_hidden_layers": 10_000},
        {"num_hidden_layers": 10**9},
        {"hidden_size": most, "head_dim": most // 4},
        {"intermediate_size": most},
        {"hidden_size": 2**62},
        {"vocab_size": most},
        {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 2},
    ):
        (folder / "config.json").write_text(json.dumps(CONFIG | change))
        tracemalloc.start()
        with pytest.raises(UserError):
            import_directory("llama", folder, tmp_path / "runs", "")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50e6, (change, peak)
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault(33)
def test_a_table_with_rows_to_spare_loads(tmp_path):
    """384 rows for 260 tokens: the model has all of them, as in transformers."""
    config = llama_config(vocab_size=384)
    folder, state = tmp_path / "pad384", tensors("llama", config)
    workdir = import_directory("llama", write_folder(folder, "llama", config, state), tmp_path / "runs", "")
    assert json.loads((workdir / "imported.json").read_text())["rows"] == 384
    with pytest.raises(UserError, match=r"vocab_size = 260, but model\.embed_tokens\.weight has 384 rows"):
        import_directory("llama", write_folder(tmp_path / "other", "llama", CONFIG, state), tmp_path / "runs", "")


@pytest.mark.fault(33)
def test_a_tokenizer_of_another_size_allocates_nothing(tmp_path):
    folder = write_folder(tmp_path / "model", "llama", CONFIG, STATE)
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["vocab"]["zz"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError):
        import_directory("llama", folder, tmp_path / "runs", "")


# ----------------------------------------------------------------------------------------------------------------- files


@pytest.mark.fault(33)
def test_an_index_outside_the_folder_is_refused(tmp_path):
    folder, index = tmp_path / "model", tmp_path / "model/model.safetensors.index.json"
    write_folder(folder, "llama", CONFIG, STATE)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    save_file(STATE, folder / "a.safetensors")
    weights = dict.fromkeys(STATE, "a.safetensors")
    for place in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "b.safetensors",
        "",
        None,
        3,
        "a\0b",
        "a\nb",
        ["a"],
    ):
        index.write_text(json.dumps({"weight_map": weights | {UP: place}}))
        with pytest.raises(UserError) as caught:
            open_directory(folder, "llama")
        assert str(caught.value).isprintable()
    index.write_text(
        json.dumps(
            {
                "metadata": {"total_size": 1},
                "weight_map": weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": "a.safetensors"},
            }
        )
    )
    assert open_directory(folder, "llama", (".inv_freq",))[1].keys() == STATE.keys()


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe{}", b"[" * 200_000, b'{"model_type": "llama", "model_type": "gpt2"}', b"[1]", b"{" + b"9" * 5000, None],
)
def test_a_false_config_is_named(tmp_path, content, capsys):
    folder = write_folder(tmp_path / "model", "llama", CONFIG, STATE)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir() if content is None else (folder / "config.json").write_bytes(content)
    assert main(["import", "llama", str(folder), "--runs-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "config.json" in said


@pytest.mark.fault(33)
def test_a_gguf_with_false_lengths_is_refused_at_once(tmp_path):
    import struct

    fields, arrays = gguf_fields(), gguf_tensors()
    path, array = tmp_path / "model.gguf", lambda of, count: struct.pack("<IIQ", 9, of, count) + b"\0" * 8
    lies = [
        gguf_bytes(fields | {"tokenizer.ggml.scores": array(of, count)}) for of in (0, 6, 8, 9, 99) for count in (2**60, 2**63)
    ]
    lies += [gguf_bytes(counts=counts) for counts in ((2**60, len(fields)), (len(arrays), 2**60), (2**63, 0))]
    for sizes in ([2**40, 2**40], [0], [], [2**63]):
        lies.append(
            gguf_bytes(info=lambda name, entry, sizes=sizes: [sizes, *entry[1:]] if name == "output_norm.weight" else entry)
        )
    lies += [gguf_bytes(fields | {"general.alignment": ("u32", n)}) for n in (0, 3, 2**31)]
    for lie in lies:
        path.write_bytes(lie)
        with pytest.raises(UserError) as caught:
            open_gguf(path)
        assert str(caught.value).isprintable()


@pytest.mark.fault(33)
def test_a_vocabulary_of_a_gguf_that_does_not_fit_is_refused(tmp_path):
    sound = {name: value for name, (_, value) in gguf_fields().items()}
    for change in (
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.tokens": 3},
        {"tokenizer.ggml.tokens": ["a", "a"]},
        {"tokenizer.ggml.merges": ["q"]},
        {"tokenizer.ggml.merges": ["never seen"]},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.pre": ["a"]},
    ):
        with pytest.raises(UserError):
            write_gguf_tokenizer(sound | change, tmp_path / "words")


# ----------------------------------------------------------------------------------------------------------------- Hymba


@pytest.mark.fault(33)
def test_width_of_the_convolution_is_read(tmp_path):
    """A width of 3 is one of 4 whose first tap is zero, in training, and with a cache."""
    three, four = hymba_config(mamba_d_conv=3), hymba_config()
    state = tensors("hymba", four)
    for name in [name for name in state if name.endswith("conv1d.weight")]:
        state[name][..., 0] = 0
    narrow = {name: value[..., 1:].copy() if name.endswith("conv1d.weight") else value for name, value in state.items()}
    wide = ours(write_folder(tmp_path / "four", "hymba", four, state), "hymba")
    np.testing.assert_allclose(ours(write_folder(tmp_path / "three", "hymba", three, narrow), "hymba"), wide, atol=1e-6, rtol=0)
    write_folder(tmp_path / "wrong", "hymba", three, state)
    with pytest.raises(UserError, match=r"conv1d\.weight has shape \(32, 1, 4\), but \(32, 1, 3\)"):
        loaded(tmp_path / "wrong", "hymba")


@pytest.mark.fault(33)
def test_heads_are_read_as_the_configuration_says(tmp_path):
    """An untied head or a copy of the embedding; by default the released code has an untied head."""
    config = hymba_config(tie_word_embeddings=False)
    state = tensors("hymba", config)
    own = loaded(write_folder(tmp_path / "own", "hymba", config, state), "hymba")
    assert np.array_equal(own.unembedding[...], state["lm_head.weight"]) and "unembedding" in named_params(own)
    silent = {name: value for name, value in config.items() if name != "tie_word_embeddings"}
    assert FAMILIES["hymba"].model_config(silent).tied is False
    tied = {name: value for name, value in state.items() if name != "lm_head.weight"}
    copied = tied | {"lm_head.weight": tied["model.embed_tokens.weight"]}
    one = loaded(write_folder(tmp_path / "tied", "hymba", hymba_config(), tied), "hymba")
    two = loaded(write_folder(tmp_path / "copied", "hymba", hymba_config(), copied), "hymba")
    assert one.unembedding is None and np.array_equal(run(one), run(two))
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        loaded(write_folder(tmp_path / "lacks", "hymba", config, tied), "hymba")
    with pytest.raises(UserError, match="differs from"):
        loaded(write_folder(tmp_path / "differs", "hymba", hymba_config(), state), "hymba")


def test_a_sound_folder_has_as_many_rows_as_its_tokenizer():
    assert byte_tokenizer().get_vocab_size() == ROWS
