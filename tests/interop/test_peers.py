"""Imported models compared with transformers: logits, log-likelihoods, bits per byte, choices, greedy text and its end."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from metajax.cli.main import main
from metajax.config import Choice
from metajax.core.fields import override
from metajax.core.progress import shown
from metajax.data.documents import is_validation
from metajax.data.pipeline import Paths
from metajax.evaluation.multiple_choice import score
from metajax.evaluation.questions import Question
from metajax.experiment import evaluate_run
from metajax.runs.directory import find_run
from metajax.training.losses import token_scores
from metajax.training.opened import open_run

pytestmark = pytest.mark.peers
END, ROWS = "<|endoftext|>", 260
PROMPT, COUNT = "the end of", 24
TEXTS = [f"the {word} of a {thing}" for word in ("sum", "row", "naïve") for thing in ("list", "text €", "graph")]
KINDS = ("gpt2", "llama", "llama_tied", "gguf")


@pytest.fixture(scope="module")
def library():
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    pytest.importorskip("torch", reason="the comparison needs PyTorch: pip install -r requirements-peers.txt")
    return pytest.importorskip("transformers", reason="the comparison needs transformers: pip install -r requirements-peers.txt")


def byte_tokenizer():
    """256 bytes, three merges, END."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "t"), ("Ġt", "h")]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *map("".join, merges)])}
    words = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_special_tokens([AddedToken(END, normalized=False)])
    return words, vocab, merges


def made(library, kind):
    """A model with random weights; the GPT-2 has logits near -32, like the published one."""
    import torch

    torch.manual_seed(0)
    ends = {"bos_token_id": 259, "eos_token_id": 259, "vocab_size": ROWS, "pad_token_id": None}
    if kind == "gpt2":
        model = library.GPT2LMHeadModel(
            library.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, initializer_range=0.3, **ends)
        )
        with torch.no_grad():
            model.transformer.wte.weight.copy_(0.5 + 0.1 * torch.randn(ROWS, 32))
            model.transformer.ln_f.bias.fill_(-2.0)
        return model.eval()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    cfg = library.LlamaConfig(
        **sizes,
        **ends,
        max_position_embeddings=64,
        initializer_range=0.3,
        rms_norm_eps=1e-6,
        tie_word_embeddings=kind == "llama_tied",
    )
    return library.LlamaForCausalLM(cfg).eval()


def tokens_of(model, ids, ends):
    """Greedy ids after `ids`, up to and without one of `ends`."""
    import torch

    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        do_sample=False,
        max_new_tokens=COUNT,
        eos_token_id=ends,
        pad_token_id=0,
    )[0].tolist()[len(ids) :]
    return found[:-1] if found[-1] in ends else found


def write_gguf(path, model, ends):
    """The Llama as a GGUF file: interleaved rotary pairs, and both end ids under their own keys."""
    import gguf

    cfg, (_, vocab, merges) = model.config, byte_tokenizer()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*vocab, END])
    writer.add_token_types([1] * len(vocab) + [3])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(ends[0])
    writer.add_eot_token_id(ends[1])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for name, value in model.state_dict().items():
        stem, value = name.removesuffix(".weight"), value.numpy()
        if stem.startswith("model.layers."):
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            if heads := {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part):
                value = value.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(value.shape)
            stem = f"blk.{layer}.{parts[part]}"
        writer.add_tensor(f"{names.get(stem, stem)}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=KINDS)
def pair(request, library, tmp_path_factory):
    """(transformers' model, our run of it, ids that end a text, folder of runs and cache); the text of PROMPT ends early.

    The tokenizer of the Llamas adds BOS to a prompt; those of the GPT-2 and the GGUF do not.
    """
    kind, home = request.param, tmp_path_factory.mktemp(request.param)
    model, words = made(library, kind), byte_tokenizer()[0]
    if kind.startswith("llama"):
        words.post_processor = processors.TemplateProcessing(f"{END} $A", special_tokens=[(END, 259)])
    free = tokens_of(model, words.encode(PROMPT).ids, [259])
    ends = [259, next((i for i in free[4:] if i not in free[:4]), 66)]
    model.generation_config.eos_token_id = ends
    if kind == "gguf":
        write_gguf(source := home / "made.gguf", model, ends)
    else:
        model.save_pretrained(source := home / "made")
        words.save(str(source / "tokenizer.json"))
        (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": END, "eos_token": END}))
    places = ["--runs-dir", str(home / "runs"), "--cache-dir", str(home / "cache")]
    assert main(["import", kind.partition("_")[0], str(source), *places]) == 0
    return model, open_run(find_run("imported/made", home / "runs")), ends, home


def logs_of(model, ids):
    """float64 log-probabilities [T, ROWS] of transformers' model."""
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()


def nats(model, ids):
    """Nats of each id except the first."""
    return -logs_of(model, ids[:-1])[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.fault(1)
def test_logits_and_log_likelihoods(pair):
    model, opened, _, _ = pair
    ids = [259, *opened.tokenizer.encode("the naïve text of a graph, 3 €")]
    tokens = jnp.asarray(ids)[None]
    logits = opened.model(tokens, positions=jnp.arange(len(ids))[None], segment_ids=jnp.ones_like(tokens))
    import torch

    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits[0, :, :ROWS], theirs, atol=2e-5 * np.abs(theirs).max())
    batch = {"tokens": tokens[:, :-1], "positions": jnp.arange(len(ids) - 1)[None], "segment_ids": jnp.ones_like(tokens[:, 1:])}
    found = token_scores(opened.model, batch | {"targets": tokens[:, 1:]})
    np.testing.assert_allclose(found.nll[0], nats(model, ids), atol=1e-4)


@pytest.mark.fault(1)
def test_bits_per_byte_and_choices(pair):
    model, opened, _, home = pair
    corpus, encode = home / "corpus.jsonl", opened.tokenizer.encode
    corpus.write_text("".join(json.dumps({"text": text, "id": str(n)}) + "\n" for n, text in enumerate(TEXTS)))
    changes = {"data.sources": f"jsonl:{corpus}?origin=id", "data.validation_share": 0.5, "evaluation.documents": 99}
    config, places = override(opened.config, changes), Paths(cache=home / "cache", runs=home / "runs")
    texts = [text for n, text in enumerate(TEXTS) if is_validation(str(n), 0.5)]
    total = sum(nats(model, [259, *encode(text)]).sum() for text in texts)
    found = evaluate_run(opened, config, places)["none"]
    np.testing.assert_allclose(found["bpb"], total / math.log(2) / len("".join(texts).encode()), rtol=1e-5)

    question = Question(("the end",) * 2, (" of a list", " €"), ("of a list", "€"), 0)
    corpora = opened.open_corpora(override(config, {"evaluation.choice": Choice(("jsonl:none",))}), places)
    for head in ([259], []):
        scored = score(opened.program, corpora, opened.model, [question], head)[:, 0]
        before = len([*head, *encode("the end")])
        expected = [-nats(model, [*head, *encode("the end" + answer)])[before - 1 :].sum() for answer in question.answers]
        np.testing.assert_allclose(scored, expected, rtol=1e-5)
    bare = replace(question, contexts=("", ""))
    scored = score(opened.program, corpora, opened.model, [bare], [])[:, 0]
    np.testing.assert_allclose(scored, [-nats(model, [259, *encode(answer)]).sum() for answer in bare.answers], rtol=1e-5)


@pytest.mark.fault(2)
def test_greedy_text_and_its_end(pair, capsys):
    model, opened, ends, home = pair
    assert sorted(opened.config.imported.ends) == sorted(ends)
    begins = [259] * opened.config.imported.opens
    encode, decode = opened.tokenizer.encode, byte_tokenizer()[0].decode
    for prompt in (PROMPT, "a naïve", ""):
        ids = [*begins, *encode(prompt)] or [259]
        expected = decode([*encode(prompt), *tokens_of(model, ids, ends)], skip_special_tokens=False)
        words = ["generate", str(opened.workdir), "--prompt", prompt, "--tokens", str(COUNT), "--temperature", "0"]
        assert main([*words, "--runs-dir", str(home / "runs"), "--cache-dir", str(home / "cache")]) == 0
        assert capsys.readouterr().out == shown(expected) + "\n"


def test_the_pins_are_what_is_compared_with(library):
    pins = (Path(__file__).parents[2] / "requirements-peers.txt").read_text()
    assert f"transformers=={library.__version__}" in pins
