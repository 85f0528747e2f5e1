"""The one door to kernels. A model says what it attends to; `implementation` and the platform say how it is computed.

"auto" is settled when the program is lowered, for the platform it is lowered for, so that a program planned for
another platform holds that platform's kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.prefix_window_attention.reference import attention_reference
from kernels_pallas.prefix_window_attention.xla import attention_xla
from metajax.config import nearest, require
from metajax.models.masks import Mask, gathered_expiry

Kernel = Callable[..., tuple[Array, Array]]

ATTENTION: dict[str, Kernel] = {"reference": attention_reference, "xla": attention_xla}
ATTENTION_AUTO: dict[str, str] = {}  # platform -> name in ATTENTION; any other platform takes "xla"


def attention(
    q: Float[Array, "B T H Dq"],
    k: Float[Array, "B T KV Dq"],
    v: Float[Array, "B T KV Dv"],
    *,
    mask: Mask,
    segment_ids: Int[Array, "B T"],
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Masked softmax attention with scale 1/sqrt(Dq): (out, lse), lse float32, the natural log of the sum of exponentials.

    Grouped heads: query head h reads KV head h // (H / KV). A row without any visible key gives out 0 and lse -inf.
    Raises UserError for an unknown implementation.
    """
    return _dispatch(q, k, v, mask.expiry(segment_ids), implementation)


def meta_attention(
    q: Float[Array, "B M H Dq"],
    k: Float[Array, "B M KV Dq"],
    v: Float[Array, "B M KV Dv"],
    *,
    slots: Int[Array, "B M"],
    segment_ids: Int[Array, "B T"],
    implementation: str = "auto",
) -> tuple[Float[Array, "B M H Dv"], Float[Array, "B M H"]]:
    """Attention among the meta-tokens of a row: `q`, `k`, `v` are already gathered at `slots`, sorted row indices.

    A meta-token sees itself and the earlier meta-tokens of its own segment (learned meta-tokens, arXiv 2509.16278).
    A slot >= T is unused: its output is 0. Raises UserError for an unknown implementation.
    """
    return _dispatch(q, k, v, gathered_expiry(segment_ids, slots), implementation)


def _dispatch(q: Array, k: Array, v: Array, expiry: Array, implementation: str) -> tuple[Array, Array]:
    scale = q.shape[-1] ** -0.5

    def call(name: str) -> Kernel:
        return lambda *arrays: ATTENTION[name](*arrays, scale=scale)

    if implementation == "auto":
        chosen = {platform: call(name) for platform, name in ATTENTION_AUTO.items()}
        return jax.lax.platform_dependent(q, k, v, expiry, default=call("xla"), **chosen)
    known = ("auto", *ATTENTION)
    require(
        implementation in ATTENTION,
        f"implementation = {implementation!r}: unknown{nearest(implementation, known)}; known: {', '.join(known)}",
    )
    return call(implementation)(q, k, v, expiry)
