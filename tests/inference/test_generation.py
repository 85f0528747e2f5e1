"""Sampling: what it may emit, where meta-tokens go, and greedy text by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import MetaTokens, UserError
from metajax.data.tokenizers import Bytes
from metajax.inference.generation import generate, meta_layout, room_for_prompt
from metajax.training.program import build_model

TOKENIZER = Bytes()


def make(tiny_config, meta=None):
    config = tiny_config(meta_tokens=meta)
    model = build_model(config, TOKENIZER.vocabulary.size, jax.random.key(3))
    return config, jax.tree.map(lambda x: x * 4, model)  # sharper logits than fresh weights give


@pytest.mark.parametrize("meta", [None, MetaTokens(rate=0.25)])
def test_greedy_text_is_the_argmax_of_the_model_itself(tiny_config, meta):
    config, model = make(tiny_config, meta)
    text = generate(model, config, TOKENIZER, "ab", count=6, temperature=0.0)
    slots = config.row_slots
    metas = meta_layout(slots, meta.rate) if meta else np.zeros(0, int)
    real = [s for s in range(slots) if s not in metas]
    tokens = np.full((1, slots), TOKENIZER.vocabulary.pad, np.int32)
    tokens[0, metas] = TOKENIZER.vocabulary.meta
    ids = [TOKENIZER.vocabulary.bos, *TOKENIZER.encode("ab")]
    tokens[0, real[:3]] = ids
    inputs = {"positions": jnp.arange(slots)[None], "segment_ids": jnp.ones((1, slots), jnp.int32)}
    if meta:
        inputs["meta_slots"] = jnp.asarray(metas)[None]
    expected = []
    for i in range(6):
        logits = np.array(model(jnp.asarray(tokens), **inputs)[0, real[3 + i] - 1])
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
    for seed in range(5):
        assert "<|" not in generate(model, config, TOKENIZER, "a", count=20, temperature=1.0, seed=seed)


def test_seeds_and_temperature(tiny_config):
    config, model = make(tiny_config)
    draw = lambda **kw: generate(model, config, TOKENIZER, "a", count=12, **kw)  # noqa: E731
    assert draw(seed=1, temperature=1.5) == draw(seed=1, temperature=1.5)
    assert len({draw(seed=s, temperature=1.5) for s in range(4)}) > 1
    assert draw(context="zz", temperature=0.0) != draw(context=None, temperature=0.0)


def test_a_prompt_that_does_not_fit_is_refused(tiny_config):
    config, model = make(tiny_config)
    room = room_for_prompt(config, TOKENIZER, "xy")
    generate(model, config, TOKENIZER, "a" * (room - 3), count=3, context="xy")
    with pytest.raises(UserError, match="shorten either"):
        generate(model, config, TOKENIZER, "a" * (room - 2), count=3, context="xy")


@pytest.mark.parametrize(("slots", "rate"), [(64, 0.1), (30, 0.25), (16, 0.9)])
def test_meta_layout_is_even_and_leaves_the_first_slot(slots, rate):
    layout = meta_layout(slots, rate)
    assert layout.min() >= 1 and layout.max() < slots and len(set(layout.tolist())) == len(layout)
    assert len(set(np.diff(layout).tolist())) <= 1
