"""An export contains the files of the imported folder: templates, token roles, generation settings, keys of config.json."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from sound_checkpoints import LLAMA3, gguf_bytes, gguf_fields, llama_config, ours, sound, tensors, theirs, write_folder

from metajax.core.fields import override
from metajax.interop.exports import export_run
from metajax.interop.imports import import_directory, import_gguf
from metajax.training.opened import OpenedRun, open_run

TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
TOKENS = {
    "chat_template": TEMPLATE,
    "pad_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "add_bos_token": False,
    "padding_side": "left",
    "extra": [1],
}
FILES = {
    "tokenizer_config.json": json.dumps(TOKENS),
    "generation_config.json": json.dumps({"eos_token_id": [259, 66], "temperature": 0.6}),
    "special_tokens_map.json": json.dumps({"pad_token": "<|endoftext|>"}),
    "added_tokens.json": json.dumps({"<|endoftext|>": 259}),
    "chat_template.jinja": TEMPLATE,
    "LICENSE": "free\r\n",
    "modeling_own.py": "pass\n",
    "README.md": "a model\n",
}


def chat(folder, family, config, state):
    """A folder with all files of a published chat model."""
    write_folder(folder, family, config, state)
    for name, text in FILES.items():
        (folder / name).write_bytes(text.encode())
    (folder / "vocab.model").write_bytes(b"\x00\xff\xfe binary")
    (folder / "optimizer.bin").write_bytes(b"weights")
    return folder


CASES = {
    "llama": (
        "llama",
        {
            "pretraining_tp": 1,
            "eos_token_id": [259, 66],
            "pad_token_id": 259,
            "colour": "red",
            "_name_or_path": "x",
            "torch_dtype": "float32",
        },
    ),
    "llama3": ("llama", {"rope_scaling": LLAMA3, "dtype": "float32"}),
    "new form": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "rope_theta": None}),
    "attention_bias": ("llama", {"attention_bias": True}),
    "gpt2": ("gpt2", {"summary_type": "cls_index", "task_specific_params": {"a": 1}, "tie_word_embeddings": False}),
    "hymba": ("hymba", {"mamba_d_conv": 3, "tie_word_embeddings": False, "mamba_dt_rank": "auto"}),
}


@pytest.mark.fault(19)
@pytest.mark.parametrize("name", CASES)
def test_every_file_of_an_imported_folder_is_exported(tmp_path, name):
    """Also if the folder has been deleted: every other file byte for byte, every key, every tensor."""
    family, changes = CASES[name]
    config, state = sound(family, {key: value for key, value in changes.items() if value is not None})
    folder = chat(tmp_path / "chat", family, config, state)
    before, told = ours(folder, family), (folder / "tokenizer.json").read_bytes()
    opened = open_run(import_directory(family, folder, tmp_path / "runs", ""))
    shutil.rmtree(folder)
    export_run(opened, family, tmp_path / "out")
    for file, text in FILES.items():
        assert (tmp_path / "out" / file).read_bytes() == text.encode(), file
    assert (tmp_path / "out/vocab.model").read_bytes() == b"\x00\xff\xfe binary" and (
        tmp_path / "out/tokenizer.json"
    ).read_bytes() == told
    assert not (tmp_path / "out/optimizer.bin").exists()
    back = json.loads((tmp_path / "out/config.json").read_text())
    for key in config.keys() - {"mamba_dt_rank", *({"rope_theta"} & changes.keys())}:
        assert back[key] == config[key], key
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == state.keys() and all(np.array_equal(found[key], state[key]) for key in state)
    np.testing.assert_array_equal(ours(tmp_path / "out", family), before)


@pytest.mark.fault(19)
@pytest.mark.peers
@pytest.mark.parametrize("name", [name for name in CASES if name != "hymba"])
def test_transformers_reads_the_export(tmp_path, name):
    family, changes = CASES[name]
    config, state = sound(family, {key: value for key, value in changes.items() if value is not None})
    folder = chat(tmp_path / "chat", family, config, state)
    export_run(open_run(import_directory(family, folder, tmp_path / "runs", "")), family, tmp_path / "out")
    np.testing.assert_array_equal(theirs(tmp_path / "out"), theirs(folder))
    transformers = pytest.importorskip("transformers")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.chat_template == TEMPLATE and words.pad_token == "<|endoftext|>" and words.padding_side == "left"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [259, 66]


@pytest.mark.fault(19)
def test_a_run_started_from_an_import_exports_its_files(tmp_path):
    """Also through runs in between. With another tokenizer nothing is exported."""
    config = llama_config()
    folder = chat(tmp_path / "chat", "llama", config, tensors("llama", config))
    parent = import_directory("llama", folder, tmp_path / "runs", "")
    imported = open_run(parent)
    origin = parent.relative_to(tmp_path / "runs").as_posix()
    for name, start in (("first", origin), ("second", "first/cpu/x-s0")):
        child = tmp_path / "runs" / name / "cpu/x-s0"
        child.mkdir(parents=True)
        settings = override(imported.config, {"name": name, "init.from": start})
        (child / "config.json").write_text(
            json.dumps({"config": json.loads((parent / "config.json").read_text())["config"] | {"init": {"from_": start}}})
        )
        imported.tokenizer.save(child)
        export_run(OpenedRun(settings, child, imported.tokenizer, imported.program, imported.model), "llama", tmp_path / name)
        assert json.loads((tmp_path / name / "tokenizer_config.json").read_text()) == TOKENS
    shutil.rmtree(parent)
    export_run(OpenedRun(settings, child, imported.tokenizer, imported.program, imported.model), "llama", tmp_path / "orphan")
    assert "chat_template" not in json.loads((tmp_path / "orphan/tokenizer_config.json").read_text())


@pytest.mark.fault(19)
def test_the_template_of_a_gguf_is_exported(tmp_path):
    fields = gguf_fields(**{"tokenizer.chat_template": ("text", TEMPLATE), "tokenizer.ggml.padding_token_id": ("u32", 259)})
    (tmp_path / "small.gguf").write_bytes(gguf_bytes(fields))
    opened = open_run(import_gguf(tmp_path / "small.gguf", tmp_path / "runs", tmp_path / "cache", ""))
    shutil.rmtree(tmp_path / "cache")
    export_run(opened, "llama", tmp_path / "out")
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert config["chat_template"] == TEMPLATE and config["pad_token"] == "<|endoftext|>"
