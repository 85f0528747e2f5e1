"""Cache sizes: all of the Hymba paper, and the buffers of the released model."""

import jax
import jax.numpy as jnp
import pytest

from metajax.config import Model, Runtime
from metajax.inference.forward import prefill, prepare
from metajax.models.cache_bytes import cache_bytes, published_cache_bytes
from metajax.models.lm import LM
from metajax.models.presets import hymba_1_5b, hymba_300m

TOKENS = 8000
PLAIN = {"hybrid.prefix_tokens": 0, "hybrid.kv_groups": (), "hybrid.full_layers": ()}
NARROW = {**PLAIN, "window": None, "hybrid.head_dim": 64, "hybrid.value_dim": 64}
NO_META = {"hybrid.prefix_tokens": 0}
MAMBA = {**PLAIN, "hybrid.fusion": "mamba", "layers": 24, "window": None}
LLAMA = {"width": 1080, "heads": 12, "hybrid.fusion": "attention", "hybrid.head_dim": 72, "hybrid.prefix_tokens": 0}
ROWS = {
    "1.5B": (hymba_1_5b(), 78.60),
    "1": (hymba_300m(**MAMBA), 1.87),
    "2": (hymba_300m(**NARROW, heads=4, kv_heads=4), 99.09),
    "3": (hymba_300m(**NARROW, heads=8, kv_heads=8), 197.39),
    "4": (hymba_300m(**NARROW, heads=16, kv_heads=16), 394.00),
    "5": (hymba_300m(**PLAIN, window=None), 148.24),
    "6": (Model(layers=12, width=1080, heads=18), 414.72),
    "7": (hymba_300m(**PLAIN), 5.51),
    "8": (hymba_300m(**{**NO_META, "hybrid.kv_groups": ()}), 41.19),
    "9": (hymba_300m(**NO_META), 39.42),
    "10": (hymba_300m(**LLAMA), 28.98),
    "12": (hymba_300m(**{**MAMBA, "hybrid.prefix_tokens": 128}), 1.87),
    "13": (hymba_300m(), 40.01),
}


@pytest.mark.parametrize("row", ROWS)
def test_sizes_in_the_paper(row):
    """Table 2 and table 10, in 10^6 bytes."""
    model, printed = ROWS[row]
    assert round(sum(published_cache_bytes(model, TOKENS).values()) / 1e6, 2) == printed


def test_buffers_of_the_released_model():
    """17 owners, 14 of them with a window of 1,024; in 16 bits, with the states in 32."""
    rows, cfg = 2, hymba_1_5b(compute_dtype="bfloat16")
    expected = cache_bytes(cfg, TOKENS, rows)
    keys = 2 * 5 * (64 + 128)
    states, tails = 32 * 3200 * 16 * 4, 32 * 3200 * 3 * 2
    assert expected["full"] == rows * keys * 3 * TOKENS and expected["window"] == rows * keys * 14 * 1024
    assert expected["meta"] == keys * 17 * 128 + states + tails
    assert (expected["state"], expected["conv"]) == (rows * states, rows * tails)

    def make():
        model = LM(cfg, vocab_size=8, max_length=1, meta=None, runtime=Runtime(unroll=1), key=jax.random.key(0))
        ready, unused = prepare(model), jnp.full((rows, 1), 4)
        prompt = jnp.zeros((rows, 4), int)
        return ready.prefix, prefill(ready, prompt, jnp.full(rows, 4), unused, capacity=TOKENS, meta_capacity=0)[1]

    numbers = [leaf for leaf in jax.tree.leaves(jax.eval_shape(make)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in numbers) == sum(expected.values())
