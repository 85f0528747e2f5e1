"""Named shapes of the one decoder: GPT-2 and Llama are configurations, not classes."""

from __future__ import annotations

from typing import Any

from metajax.config import Model


def gpt2(layers: int = 12, heads: int = 12, width: int = 768, **changes: Any) -> Model:
    """GPT-2 as nanoGPT trains it: pre-LayerNorm, learned positions, exact GELU, tied head, no biases.

    Published checkpoints have biases (`bias=True`); Hugging Face's use the tanh form of GELU (`activation="gelu_tanh"`).
    """
    fields = dict(
        mlp_width=4 * width, activation="gelu", norm="layernorm", norm_eps=1e-5, position="learned", bias=False, tied=True
    )
    return Model(layers=layers, heads=heads, width=width, **{**fields, **changes})


def gpt2_small(**changes: Any) -> Model:
    """GPT-2 small: 12 layers, 12 heads, width 768 (124M parameters with 50,257 tokens and 1,024 positions)."""
    return gpt2(12, 12, 768, **changes)


def llama(layers: int, heads: int, width: int, *, kv_heads: int = 0, mlp_width: int = 0, **changes: Any) -> Model:
    """Llama: RMSNorm, rotary positions, SwiGLU, no biases, a head of its own. mlp_width 0: 8/3 width, up to a multiple of 256."""
    mlp_width = mlp_width or -(-8 * width // 3 // 256) * 256
    fields = dict(activation="swiglu", norm="rmsnorm", norm_eps=1e-5, position="rope", bias=False, tied=False)
    return Model(layers=layers, heads=heads, width=width, kv_heads=kv_heads, mlp_width=mlp_width, **{**fields, **changes})
