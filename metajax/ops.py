"""The one door to kernels. A model says what it attends to; `implementation` and the platform say how it is computed.

"auto" is settled when the program is lowered, for the platform it is lowered for, so that a program planned for
another platform holds that platform's kernels.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from kernels_pallas.prefix_window_attention.reference import attention_reference
from kernels_pallas.prefix_window_attention.xla import attention_xla
from metajax.dispatch import dispatch
from metajax.models.masks import Mask, gathered_expiry

ATTENTION = {"reference": attention_reference, "xla": attention_xla}
ATTENTION_AUTO: dict[str, str] = {}  # platform -> name in ATTENTION; any other platform takes "xla"


def attention(
    q: Float[Array, "B T H Dq"],
    k: Float[Array, "B S KV Dq"],
    v: Float[Array, "B S KV Dv"],
    *,
    mask: Mask,
    segment_ids: Int[Array, "B S"],
    meta_k: Float[Array, "M KV Dq"] | None = None,
    meta_v: Float[Array, "M KV Dv"] | None = None,
    q_offset: int | Int[Array, ""] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Masked softmax attention with scale 1/sqrt(Dq): (out, lse), lse float32, the natural log of the sum of exponentials.

    Grouped heads: query head h reads KV head h // (H / KV). Every query sees the keys `meta_k` too. Query row t stands at
    key index t + q_offset (None: S - T, the end). A row without any visible key gives out 0 and lse -inf.
    Raises UserError for an unknown implementation, and for one that does not take the dtype or the platform.
    """
    return _attention(q, k, v, mask.expiry(segment_ids), implementation, meta_k, meta_v, q_offset)


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
    A slot >= T is unused: its output is 0. Raises UserError as `attention` does.
    """
    return _attention(q, k, v, gathered_expiry(segment_ids, slots), implementation)


def _attention(
    q: Array,
    k: Array,
    v: Array,
    expiry: Array,
    implementation: str,
    meta_k: Array | None = None,
    meta_v: Array | None = None,
    q_offset: int | Array | None = None,
) -> tuple[Array, Array]:
    scale = q.shape[-1] ** -0.5
    options = {"meta_k": meta_k, "meta_v": meta_v, "q_offset": q_offset}
    return dispatch(ATTENTION, ATTENTION_AUTO, implementation, q, k, v, expiry, scale=scale, **options)
