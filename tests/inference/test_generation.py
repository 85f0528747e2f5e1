"""Sampling: allowed tokens, positions of meta-tokens, and greedy text by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from metajax.config import Hybrid, Metadata, MetaTokens
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.data.pipeline import open_corpora, training_batches
from metajax.data.tokenizers import Bytes, open_tokenizer
from metajax.inference.decoding import Sampling, guided
from metajax.inference.forward import prepare
from metajax.inference.generation import generate, meta_layout, opening, room_for_prompt, stream
from metajax.training.program import build_model

TOKENIZER = Bytes()
GREEDY = Sampling(temperature=0.0)


HYBRID = {
    "model.hybrid": Hybrid(prefix_tokens=3, state=4),
    "model.layers": 1,
    "model.window": 4,
    "runtime.implementation": "reference",
}


def make(tiny_config, meta=None, **changes):
    config = tiny_config(meta_tokens=meta, **changes)
    model = build_model(config, TOKENIZER.vocabulary.size, jax.random.key(3))
    return config, jax.tree.map(lambda x: x * 4, model)  # sharper logits than fresh weights give


PAUSES = MetaTokens(rate=0.25, attention="none", embedding="frozen", zero_position="causal")


@pytest.mark.parametrize(
    ("meta", "changes"),
    [(None, {}), (MetaTokens(rate=0.25), {}), (None, HYBRID), (PAUSES, HYBRID)],
    ids=["plain", "meta_tokens", "hybrid", "hybrid_with_pauses"],
)
def test_greedy_text_is_the_argmax_of_the_model_itself(tiny_config, meta, changes):
    config, model = make(tiny_config, meta, **changes)
    text, _ = generate(prepare(model), config, TOKENIZER, ["ab", "a longer prompt"], count=6, sampling=GREEDY)
    positions = config.row_positions
    metas = meta_layout(positions, meta.rate) if meta else np.zeros(0, int)
    real = [s for s in range(positions) if s not in metas]
    tokens = np.full((1, positions), TOKENIZER.vocabulary.pad, np.int32)
    tokens[0, metas] = TOKENIZER.vocabulary.meta
    ids = [TOKENIZER.vocabulary.bos, *TOKENIZER.encode("ab")]
    tokens[0, real[:3]] = ids
    inputs = {"positions": jnp.arange(positions)[None], "segment_ids": jnp.ones((1, positions), jnp.int32)}
    if meta:
        inputs["meta_positions"] = jnp.asarray(metas)[None]
    forward = jax.jit(lambda model, tokens: model(tokens, **inputs))
    expected = []
    for i in range(6):
        logits = np.array(forward(model, tokens)[0, real[3 + i] - 1])
        logits[[t for t in range(TOKENIZER.vocabulary.base, len(logits)) if t != TOKENIZER.vocabulary.eos]] = -np.inf
        expected.append(int(logits.argmax()))
        if expected[-1] == TOKENIZER.vocabulary.eos:
            expected.pop()
            break
        tokens[0, real[3 + i]] = expected[-1]
    assert text == TOKENIZER.decode(expected)


def test_reserved_ids_are_never_sampled(tiny_config):
    config, model = make(tiny_config, MetaTokens())
    boosted = model.embedding[...].at[TOKENIZER.vocabulary.base :].multiply(50.0)
    model.embedding[...] = boosted.at[TOKENIZER.vocabulary.eos].set(0.0)
    for text in generate(prepare(model), config, TOKENIZER, ["a"] * 5, count=20, sampling=Sampling(1.0)):
        assert "<|" not in text


def test_seeds_and_temperature(tiny_config):
    config, model = make(tiny_config)
    draw = lambda **kw: generate(prepare(model), config, TOKENIZER, ["a", "a"], count=12, **kw)  # noqa: E731
    hot = Sampling(1.5)
    assert draw(seed=1, sampling=hot) == draw(seed=1, sampling=hot)
    assert len({text for s in range(2) for text in draw(seed=s, sampling=hot)}) == 4
    assert draw(context="zz", sampling=GREEDY) != draw(context=None, sampling=GREEDY)
    assert draw(sampling=Sampling(1.5, top_k=1)) == draw(sampling=GREEDY)


@pytest.mark.parametrize("stride", [1, 5])
def test_pieces_of_a_stream_make_the_whole_text(tiny_config, stride):
    config, model = make(tiny_config, MetaTokens(rate=0.25))
    prompts = ["a", "longer"]
    arguments = dict(count=12, sampling=Sampling(1.2, top_p=0.95), seed=3)
    pieces = list(stream(prepare(model), config, TOKENIZER, prompts, stride=stride, **arguments))
    assert len(pieces) > 12 // stride
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == generate(
        prepare(model), config, TOKENIZER, prompts, **arguments
    )


class Fixed(Bytes):
    """Decodes the ids by their order, as the bytes of a text."""

    text = "aé€😀\ufffd".encode() + b"\xf0\x9f\xff"

    def decode(self, ids):
        return self.text[: len(ids)].decode(errors="replace")


def test_a_character_is_shown_when_it_is_complete(tiny_config):
    config, model = make(tiny_config)
    model.embedding[...] = model.embedding[...].at[TOKENIZER.vocabulary.eos].set(0.0)
    pieces = [piece for (piece,) in stream(prepare(model), config, Fixed(), ["a"], count=len(Fixed.text) - 1, sampling=GREEDY)]
    assert "a" + "".join(pieces) == Fixed.text.decode(errors="replace")
    assert [piece for piece in pieces if piece][:3] == ["é", "€", "😀"]


def test_guidance_of_0_and_1_is_text_without_the_context_and_after_it(tiny_config):
    config, model = make(tiny_config, metadata=Metadata(template="{topic}"))
    prompts, contexts = ["ab", "a longer"], ["files", "x"]
    draw = lambda **kw: generate(prepare(model), config, TOKENIZER, prompts, count=8, sampling=GREEDY, **kw)  # noqa: E731
    after, without = draw(context=contexts), draw(context="")
    assert after != without
    assert draw(context=contexts, guidance=1.0) == after
    assert draw(context=contexts, guidance=0.0) == without
    with pytest.raises(UserError, match="it needs a context"):
        draw(guidance=2.0)


def test_guided_logits_are_exact_at_0_and_1_and_grow_apart_beyond():
    rng = np.random.default_rng(0)
    context, empty = rng.normal(size=(2, 3, 50)).astype(np.float32) * 20
    of = lambda g: np.asarray(guided(context, empty, jnp.float32(g)))  # noqa: E731
    assert (of(0) == empty).all() and (of(1) == context).all()
    np.testing.assert_allclose(of(2), empty + 2 * (context - empty), rtol=1e-5, atol=1e-5)


def test_a_prompt_that_does_not_fit_is_refused(tiny_config):
    config, model = make(tiny_config)
    room = room_for_prompt(config, TOKENIZER, "xy")
    generate(prepare(model), config, TOKENIZER, ["a" * (room - 3)], count=3, context="xy")
    with pytest.raises(UserError, match="shorten either"):
        generate(prepare(model), config, TOKENIZER, ["a" * (room - 2)], count=3, context="xy")


@pytest.mark.parametrize("recipe", [Metadata(), Metadata(wrap="plain"), Metadata(bos_eos="inside")])
def test_a_context_is_placed_as_in_training(tiny_config, paths, recipe):
    recipe = replace(recipe, template="{topic}", keep=1.0)
    config = tiny_config(metadata=recipe, **{"data.sequence_length": 512, "data.packing": "best_fit"})
    corpora = open_corpora(config, paths)
    batch = training_batches(corpora)[0]
    first = batch["tokens"][0][batch["segment_ids"][0] == 1]
    topic = TOKENIZER.decode([int(i) for i in first[batch["is_metadata"][0][: len(first)]] if i < 256])
    head = opening(config, TOKENIZER, topic)
    assert first[: len(head)].tolist() == head and len(head) > len(topic)


@pytest.mark.parametrize(("positions", "rate"), [(64, 0.1), (30, 0.25), (16, 0.9)])
def test_meta_layout_is_even_and_leaves_the_first_position(positions, rate):
    layout = meta_layout(positions, rate)
    assert layout.min() >= 1 and layout.max() < positions and len(set(layout.tolist())) == len(layout)
    assert len(set(np.diff(layout).tolist())) <= 1


# ------------------------------------------------------------------------------------------- prompt and continuation


def llama_pieces(folder):
    """A tokenizer like Llama 2's: a space before the text, pieces with their spaces, byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"paris"]
    merges = [("▁", "i"), ("▁i", "s"), ("▁", "p"), ("▁p", "a"), ("▁pa", "r"), ("▁par", "i"), ("▁pari", "s")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *map("".join, merges)])}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(parts)
    library.save(str(folder / "tokenizer.json"))
    return f"hf:{folder / 'tokenizer.json'}"


def sentence_pieces(folder):
    """A SentencePiece model trained on a few words."""
    options = {"model_prefix": str(folder / "tiny"), "vocab_size": 300, "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["paris is paris", "a list is"] * 20), **options, hard_vocab_limit=False
    )
    return f"sentencepiece:{folder / 'tiny.model'}"


def byte_pairs(folder):
    """Byte-level, with a space before the text."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))
    return f"hf:{folder / 'tokenizer.json'}"


def reciter(tiny_config, tokenizer, ids):
    """A model that recites `ids`: at each position it predicts the next one."""
    size = tokenizer.vocabulary.size
    config = tiny_config(**{"model.position": "learned", "model.tied": False, "model.layers": 1, "data.sequence_length": 64})
    model = jax.tree.map(jnp.zeros_like, build_model(override(config, {"model.width": 64}), size, jax.random.key(0)))
    model.positions[...] = jnp.eye(64)
    model.final_norm.scale[...] = jnp.ones(64)
    model.unembedding[...] = jnp.zeros((size, 64)).at[jnp.asarray(ids[1:]), jnp.arange(len(ids) - 1)].set(1.0)
    return config, model


@pytest.mark.fault(3)
@pytest.mark.parametrize(
    "make", [llama_pieces, sentence_pieces, byte_pairs, lambda folder: "byte"], ids=["llama", "sp", "bpe", "byte"]
)
@pytest.mark.parametrize(
    ("prompt", "rest"),
    [("paris is", " paris"), ("paris", " é is €"), ("", "paris is"), ("a é", "😀 x"), ("is ", "paris"), ("par", "is")],
)
def test_prompt_and_continuation_are_one_text(tiny_config, tmp_path, make, prompt, rest):
    """For every behaviour of a tokenizer at the start of a text or within a character, whole and in pieces."""
    tokenizer = open_tokenizer(make(tmp_path), cache_dir=tmp_path, data_dir=None, corpus_fingerprint="", texts=list)
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + rest)
    new = whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode(rest)
    expected = tokenizer.decode([*before, *new]).removeprefix(tokenizer.decode(before))
    vocabulary = tokenizer.vocabulary
    config, model = reciter(tiny_config, tokenizer, [vocabulary.bos, *before, *new, vocabulary.eos])
    arguments = {"count": len(new) + 1, "sampling": GREEDY}
    assert generate(prepare(model), config, tokenizer, [prompt], **arguments) == [expected]
    pieces = [piece for (piece,) in stream(prepare(model), config, tokenizer, [prompt], **arguments)]
    assert "".join(pieces) == expected
    assert "\ufffd" not in expected and all("\ufffd" not in piece for piece in pieces)
    assert tokenizer.decode(before) + expected == tokenizer.decode([*before, *new])
