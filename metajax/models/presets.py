"""Named model configs. GPT-2, Llama and Hymba are configs of one decoder class."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from metajax.config import Hybrid, Model, hymba_ntk_factor
from metajax.core.fields import override


def gpt2(layers: int = 12, heads: int = 12, width: int = 768, **changes: Any) -> Model:
    """GPT-2 as nanoGPT trains it: pre-LayerNorm, learned positions, exact GELU, tied head, no biases.

    Published checkpoints have biases (`bias=True`); those of Hugging Face use the tanh form of GELU (`activation="gelu_tanh"`).
    """
    fields = dict(mlp_width=4 * width, activation="gelu", norm="layernorm", norm_eps=1e-5, position="learned")
    return Model(layers=layers, heads=heads, width=width, **{**fields, **changes})


def gpt2_small(**changes: Any) -> Model:
    """GPT-2 small: 12 layers, 12 heads, width 768 (124M parameters with 50,257 tokens and 1,024 positions)."""
    return gpt2(12, 12, 768, **changes)


def llama(layers: int, heads: int, width: int, *, kv_heads: int = 0, mlp_width: int = 0, **changes: Any) -> Model:
    """Llama: RMSNorm, rotary positions, SwiGLU, no biases, untied head. mlp_width 0: 8/3 width, up to a multiple of 256."""
    mlp_width = mlp_width or -(-8 * width // 3 // 256) * 256
    fields = dict(activation="swiglu", norm="rmsnorm", norm_eps=1e-5, position="rope", tied=False)
    return Model(layers=layers, heads=heads, width=width, kv_heads=kv_heads, mlp_width=mlp_width, **{**fields, **changes})


def hymba(layers: int, heads: int, width: int, *, kv_heads: int, mlp_width: int, window: int = 1024) -> Model:
    """Hymba (arXiv 2411.13676, section 2 and table 11): full attention first, middle and last; window layers share keys in pairs.

    NTK rotary positions for rows of 8,192 tokens after training on 2,048. In the named sizes below, `changes` are fields of
    `Model`, dotted names included, such as {"hybrid.prefix_tokens": 0}.
    """
    full = tuple(sorted({0, (layers - 1) // 2, layers - 1}))
    ntk = {"position": "ntk", "rope_original_length": 2048, "rope_factor": hymba_ntk_factor(8192, 2048)}
    parts = {"activation": "swiglu", "norm": "rmsnorm", "norm_eps": 1e-6, **ntk}
    mixers = Hybrid(full_layers=full, kv_groups=shared_pairs(layers, full))
    return Model(
        layers=layers, heads=heads, width=width, kv_heads=kv_heads, mlp_width=mlp_width, window=window, hybrid=mixers, **parts
    )


def shared_pairs(layers: int, apart: Sequence[int]) -> tuple[int, ...]:
    """Group sizes that pair the layers between those `apart`. The first group of an odd run has three (released checkpoint)."""
    sizes: list[int] = []
    for before, after in itertools.pairwise([-1, *apart, layers]):
        sizes += [1] if before >= 0 else []
        run = after - before - 1
        pairs = [2] * (run // 2) or [0] * (run > 0)
        sizes += [pairs[0] + run % 2, *pairs[1:]] if pairs else []
    return tuple(sizes)


def hymba_125m(**changes: Any) -> Model:
    """24 layers of width 512 (table 11)."""
    return override(hymba(24, 8, 512, kv_heads=4, mlp_width=1664), changes)


def hymba_350m(**changes: Any) -> Model:
    """32 layers of width 768 (table 11)."""
    return override(hymba(32, 12, 768, kv_heads=4, mlp_width=2432), changes)


def hymba_1_5b(**changes: Any) -> Model:
    """The released Hymba-1.5B (table 11): 1,522,797,824 parameters with 32,001 tokens."""
    return override(hymba(32, 25, 1600, kv_heads=5, mlp_width=5504), changes)


def hymba_300m(**changes: Any) -> Model:
    """The ablation model (appendix A.3): 12 layers, window 256, rows of 1,024 tokens.

    Widths are inferred from the cache sizes and branch ratios of table 10; mlp_width is not stated in the paper.
    """
    plain = {"position": "rope", "rope_factor": 1.0, "rope_original_length": 0}
    return override(hymba(12, 16, 1024, kv_heads=4, mlp_width=4096, window=256), plain | changes)


def hymba_cpu(**changes: Any) -> Model:
    """A model of 0.3M parameters with a vocabulary of 512 and every kind of layer; ours, not the paper's."""
    small = {"position": "rope", "rope_factor": 1.0, "rope_original_length": 0, "hybrid.prefix_tokens": 8, "hybrid.state": 8}
    return override(hymba(7, 4, 48, kv_heads=2, mlp_width=96, window=16), small | changes)
