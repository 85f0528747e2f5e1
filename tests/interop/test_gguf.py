"""A Llama in a GGUF file: rotary pairs converted back to halves, quantised numbers, named refusals, and its tokenizer."""

import itertools
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers as library

from metajax.core.errors import UserError
from metajax.data.tokenizers import open_tokenizer, train_bpe
from metajax.interop import llama
from metajax.interop.gguf_files import open_gguf, write_gguf_tokenizer
from metajax.interop.imports import import_gguf
from metajax.interop.layouts import load_model
from metajax.models.lm import named_params
from metajax.training.opened import open_run
from tests.damage import DAMAGES

WIDTH, HEADS, KV, MLP, WORDS = 64, 4, 2, 96, 320
TEXTS = ["Rows of numbers 1234 and 56, then words: don't it's.\n", "mètre 日本  two  spaces\n\nend"]
_NAMES = {"attn_q": (WIDTH, WIDTH), "attn_k": (32, WIDTH), "attn_v": (32, WIDTH), "attn_output": (WIDTH, WIDTH)}
_NAMES |= {
    "ffn_gate": (MLP, WIDTH),
    "ffn_up": (MLP, WIDTH),
    "ffn_down": (WIDTH, MLP),
    "attn_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
}


def tensors(head):
    """Every tensor of a file by its name, rows in Hugging Face's order."""
    draw = np.random.default_rng(0)
    shapes = {"token_embd.weight": (WORDS, WIDTH), "output_norm.weight": (WIDTH,)} | (
        {"output.weight": (WORDS, WIDTH)} if head else {}
    )
    shapes |= {f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in _NAMES.items()}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def paired(rows, heads):
    """As llama.cpp's converter stores a query or key map: row i of a head's first half, then row i of its second half, for every i."""
    heads_of = rows.reshape(heads, -1, rows.shape[-1])
    half = heads_of.shape[1] // 2
    return np.concatenate([[head[i], head[half + i]] for head in heads_of for i in range(half)])


def write(path, head=True, quantised=(), **changes):
    made, writer = tensors(head), gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    fields = {"block_count": 2, "context_length": 48, "embedding_length": WIDTH, "feed_forward_length": MLP}
    fields |= {"attention.head_count": HEADS, "attention.head_count_kv": KV, "rope.dimension_count": WIDTH // HEADS} | changes
    for name, value in fields.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 50_000.0)
    add_tokenizer(writer)
    for name, value in made.items():
        part = name.split(".")[-2]
        value = paired(value, {"attn_q": HEADS, "attn_k": KV}[part]) if part in ("attn_q", "attn_k") else value
        if part in quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def trained():
    """A tokenizer with the pre-tokenizer "smollm" and a control token."""
    text, _, _ = json.loads(train_bpe("bpe:320", TEXTS * 20).content())
    own = library.Tokenizer.from_str(text)
    cut = library.pre_tokenizers
    own.pre_tokenizer = cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)])
    own.add_special_tokens(["<|begin|>"])
    return own


def add_tokenizer(writer):
    own = trained()
    tokens = [token for token, _ in sorted(own.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|begin|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(own.to_str())["model"]["merges"]])
    writer.add_bos_token_id(own.token_to_id("<|begin|>"))


@pytest.mark.parametrize("head", [True, False], ids=["own head", "tied"])
def test_weights_of_a_file(tmp_path, head):
    made = write(tmp_path / "model.gguf", head)
    values, found, _ = open_gguf(tmp_path / "model.gguf")
    model = load_model(found, llama.model_config(values), llama.LAYOUT)
    cfg, ours = model.cfg, named_params(model)
    assert (cfg.layers, cfg.num_kv_heads, cfg.norm_eps, cfg.rope_theta, cfg.tied) == (2, KV, 1e-5, 50_000.0, not head)
    attention = "blocks.0.0.mixer.attention"
    where = {"attn_q": f"{attention}.query.w", "attn_k": f"{attention}.key.w", "attn_v": f"{attention}.value.w"}
    where |= {"ffn_gate": "blocks.0.0.mlp.gate.w", "ffn_up": "blocks.0.0.mlp.up.w", "ffn_down": "blocks.0.0.mlp.down.w"}
    for (name, path), layer in itertools.product(where.items(), range(2)):
        assert np.array_equal(ours[path][layer].T, made[f"blk.{layer}.{name}.weight"]), name
    assert np.array_equal(ours["blocks.0.0.mlp_norm.scale"][1], made["blk.1.ffn_norm.weight"])
    assert head == ("unembedding" in ours) and np.array_equal(ours["embedding"][...], made["token_embd.weight"])


def test_quantised_tensors_equal_the_librarys(tmp_path):
    """Rows are dequantised when read, in order; 8-bit values are within half a step of each block of 32."""
    made = write(tmp_path / "model.gguf", quantised=("attn_q", "ffn_down", "token_embd"))
    _, found, _ = open_gguf(tmp_path / "model.gguf")
    names = {
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }
    for name, other in (names | {"token_embd.weight": "model.embed_tokens.weight"}).items():
        value, read = made[name], np.concatenate([found[other][part, 8:40] for part in (slice(0, 3), slice(3, None))])
        step = np.abs(value).max() / 127
        assert read.shape == (len(value), 32) and 0 < np.abs(read - value[:, 8:40]).max() <= 0.51 * step


def test_the_files_tokenizer(tmp_path):
    write(tmp_path / "model.gguf")
    write_gguf_tokenizer(open_gguf(tmp_path / "model.gguf")[2], tmp_path / "words")
    tokenizer = open_tokenizer(
        "hf:words/tokenizer.json", cache_dir=tmp_path, data_dir=tmp_path, corpus_fingerprint="", texts=list
    )
    own = trained()
    assert tokenizer.vocabulary.bos == own.token_to_id("<|begin|>")
    for text in TEXTS:
        assert tokenizer.encode(text) == own.encode(text).ids and tokenizer.decode(tokenizer.encode(text)) == text
    fields = open_gguf(tmp_path / "model.gguf")[2] | {"tokenizer.ggml.pre": "falcon"}
    with pytest.raises(UserError, match=r"'falcon'.*--tokenizer"):
        write_gguf_tokenizer(fields, tmp_path / "other")


def test_a_file_is_a_run(tmp_path):
    path = tmp_path / "small.gguf"
    made = write(path)
    opened = open_run(import_gguf(path, tmp_path / "runs", tmp_path / "cache", ""))
    assert opened.config.name == "imported/small" and opened.config.data.sequence_length == 48
    assert np.array_equal(opened.model.embedding[:WORDS], made["token_embd.weight"])
    kept = Path(opened.config.data.tokenizer.removeprefix("hf:"))
    for file in sorted(kept.parent.iterdir()):
        before = file.read_bytes()
        DAMAGES["flip"](file, file)
        for read in (
            lambda: import_gguf(path, tmp_path / "others", tmp_path / "cache", ""),
            lambda: open_tokenizer(f"hf:{kept}", cache_dir=tmp_path / "cache", data_dir=None, corpus_fingerprint="", texts=list),
        ):
            with pytest.raises(UserError, match=f"{file}: changed or damaged .* delete the folder {kept.parent}, and"):
                read()
        file.write_bytes(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture = 'qwen2'"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn'"),
        ({"expert_count": 8}, "expert_count = 8"),
        ({"rope.dimension_count": 8}, "rope.dimension_count = 8"),
    ],
)
def test_unsupported_fields_are_named(tmp_path, changes, message):
    write(tmp_path / "model.gguf", **changes)
    with pytest.raises(UserError, match=message):
        open_gguf(tmp_path / "model.gguf")


def test_false_gguf_files_are_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("no model at all, only words")
    with pytest.raises(UserError, match="not a whole GGUF file"):
        open_gguf(tmp_path / "text.gguf")
    write(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for share in (100, 2):
        (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // share])
        with pytest.raises(UserError, match="not a whole GGUF file"):
            open_gguf(tmp_path / "cut.gguf")
    with pytest.raises(UserError, match="no such file"):
        open_gguf(tmp_path / "nowhere.gguf")
