"""The operations that have kernels. The model gives the mask; `implementation` and the platform select the algorithm.

"auto" is resolved when the program is lowered, for the target platform. A program planned for another platform
therefore contains that platform's kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.prefix_window_attention.reference import attention_reference
from kernels_pallas.prefix_window_attention.tpu import attention_tpu
from kernels_pallas.prefix_window_attention.xla import attention_xla
from kernels_pallas.selective_scan.conv import causal_conv_tpu
from kernels_pallas.selective_scan.reference import causal_conv_reference, selective_scan_reference
from kernels_pallas.selective_scan.tpu import selective_scan_tpu
from kernels_pallas.selective_scan.xla import causal_conv_xla, selective_scan_xla
from metajax.models.masks import Mask, gathered_expiry
from metajax.models.ops.dispatch import dispatch
from metajax.models.ops.sharded import Axes, attention_in_parts, conv_in_parts, on_devices, parts_of, scan_in_parts

ATTENTION = {"reference": attention_reference, "xla": attention_xla, "pallas_tpu": attention_tpu}
SELECTIVE_SCAN = {"reference": selective_scan_reference, "xla": selective_scan_xla, "pallas_tpu": selective_scan_tpu}
CAUSAL_CONV = {"reference": causal_conv_reference, "xla": causal_conv_xla, "pallas_tpu": causal_conv_tpu}
AUTO = {"tpu": "pallas_tpu"}  # platform -> implementation; any other platform takes "xla"
# Up to this many queries x keys of a row, "auto" is XLA on every platform. At or below one tile the kernel cannot skip any block,
# and its layout changes cost about what it saves (docs/kernels.md, meta_attention). Scan and convolution use XLA for rows of
# one token, because the kernels would pad them to a group of tokens.
ONE_TILE = 256 * 256

# Logical axes of the arrays; every part of a row has the expiries and segment ids of the whole row.
_SEGMENTS, _KEYS = ("batch", None), ("batch", "length", "kv_heads", None)
ATTENTION_AXES = {"q": ("batch", "length", "heads", None), "k": _KEYS, "v": _KEYS, "expiry": _SEGMENTS, "q_offset": ()}
ATTENTION_AXES |= dict.fromkeys(("prefix_k", "prefix_v"), (None, "kv_heads", None))
_CHANNELS, _STATE = ("batch", "length", "ssm"), ("batch", "ssm", None)
SCAN_AXES = {"segment_ids": _SEGMENTS, "initial_state": _STATE, **dict.fromkeys(("u", "dt", "z"), _CHANNELS)}
SCAN_AXES |= dict.fromkeys(("B", "C"), ("batch", "length", None))
SCAN_AXES |= dict.fromkeys(("A", "reset_state"), ("ssm", None)) | dict.fromkeys(("D", "dt_bias"), ("ssm",))
_TAIL = ("batch", None, "ssm")
CONV_AXES = {"x": _CHANNELS, "w": ("ssm", None), "b": ("ssm",), "segment_ids": _SEGMENTS, "initial_tail": _TAIL}
CONV_AXES |= {"reset_tail": _TAIL[1:]}


def attention(
    q: Float[Array, "B T H Dq"],
    k: Float[Array, "B S KV Dq"],
    v: Float[Array, "B S KV Dv"],
    *,
    mask: Mask,
    segment_ids: Int[Array, "B S"],
    prefix_k: Float[Array, "M KV Dq"] | None = None,
    prefix_v: Float[Array, "M KV Dv"] | None = None,
    q_offset: int | Int[Array, ""] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Masked softmax attention with scale 1/sqrt(Dq): (out, lse); lse is float32, the natural log of the sum of exponentials.

    Grouped heads: query head h reads KV head h // (H / KV). Every query also sees the keys `prefix_k`. Query row t is at
    key index t + q_offset (None: S - T, the end). A row without any visible key gives out 0 and lse -inf.
    Raises UserError for an unknown implementation, and for one that does not support the dtype or the platform.
    """
    prefix = {"prefix_k": prefix_k, "prefix_v": prefix_v}
    return _attention(q, k, v, mask.expiry(segment_ids), implementation, mask.window, q_offset, **prefix)


def meta_attention(
    q: Float[Array, "B M H Dq"],
    k: Float[Array, "B M KV Dq"],
    v: Float[Array, "B M KV Dv"],
    *,
    meta_positions: Int[Array, "B M"],
    segment_ids: Int[Array, "B T"],
    implementation: str = "auto",
) -> tuple[Float[Array, "B M H Dv"], Float[Array, "B M H"]]:
    """Attention among the meta-tokens of a row; `q`, `k`, `v` are already gathered at the sorted `meta_positions`.

    A meta-token sees itself and the earlier meta-tokens of its segment (learned meta-tokens, arXiv 2509.16278).
    A position >= T is unused: its output is 0. Raises UserError as `attention` does.
    """
    return _attention(q, k, v, gathered_expiry(segment_ids, meta_positions), implementation)


def join_past(
    out: Float[Array, "B T H Dv"],
    lse: Float[Array, "B T H"],
    q: Float[Array, "B T H Dq"],
    k: Float[Array, "B S KV Dq"],
    v: Float[Array, "B S KV Dv"],
    visible: Bool[Array, "B S"],
    implementation: str,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Add earlier keys to an attention result (out, lse); every query of a row sees the `visible` ones of these keys.

    Two softmaxes over disjoint keys are merged by their log-sum-exp. Raises UserError as `attention` does.
    """
    last = k.shape[1] + q.shape[1]  # after the last query, because the queries follow all these keys
    past_out, past_lse = _attention(q, k, v, jnp.where(visible, last, 0), implementation, q_offset=k.shape[1])
    total = jnp.logaddexp(lse, past_lse)
    finite = jnp.where(total == -jnp.inf, 0.0, total)  # a query without any key: weights exp(-inf - 0) = 0, not NaN
    own, earlier = (jnp.exp(part - finite)[..., None] for part in (lse, past_lse))
    return (own * out + earlier * past_out).astype(out.dtype), total


def _attention(
    q: Array,
    k: Array,
    v: Array,
    expiry: Array,
    implementation: str,
    window: int | None = None,
    q_offset: Any = None,
    **prefix: Any,
) -> tuple[Array, Array]:
    def attend(q: Array, k: Array, v: Array, expiry: Array, **options: Any) -> tuple[Array, Array]:
        auto = AUTO if q.shape[1] * k.shape[1] > ONE_TILE else {}
        return dispatch(ATTENTION, auto, implementation, q, k, v, expiry, scale=q.shape[-1] ** -0.5, window=window, **options)

    kernel, parts = attend, parts_of(q.shape[1], k.shape[1]) if q_offset is None else 1
    if parts > 1:
        kernel = functools.partial(attention_in_parts, attend, window)
    elif isinstance(q_offset, int):  # a static offset lets the implementation skip the keys after the queries
        kernel, q_offset = functools.partial(attend, q_offset=q_offset), None
    arrays = {"q": q, "k": k, "v": v, "expiry": expiry, "q_offset": q_offset, **prefix}
    return on_devices(kernel, ATTENTION_AXES, (ATTENTION_AXES["q"], ATTENTION_AXES["q"][:3]), parts, **arrays)


def selective_scan(
    *, segment_ids: Int[Array, "B T"], implementation: str = "auto", **arrays: Array | None
) -> tuple[Float[Array, "B T C"], Float[Array, "B C N"]]:
    """Mamba-1's recurrence with softplus, skip and gate (arXiv 2312.00752, algorithm 2): (y, float32 state after the last token).

    arrays: as of `selective_scan_reference`. Each segment starts from `reset_state` (None: zeros). The row starts from
    `initial_state` (None: `reset_state`). Raises UserError as `attention` does.
    """
    arrays["segment_ids"] = segment_ids
    return _along_rows(
        SELECTIVE_SCAN, implementation, scan_in_parts, SCAN_AXES, (_CHANNELS, _STATE), segment_ids.shape[1], arrays
    )


def causal_conv(
    *, segment_ids: Int[Array, "B T"], implementation: str = "auto", **arrays: Array | None
) -> tuple[Float[Array, "B T C"], Float[Array, "B tail C"]]:
    """silu(b + causal depthwise convolution) inside segments: (y, `initial_tail` for a call that continues the row).

    arrays: as of `causal_conv_reference`. K is 2 to 4. `reset_tail` (None: zeros) holds the K-1 inputs before a segment,
    `initial_tail` (None: `reset_tail`) those before the row, oldest first. Raises UserError as `attention` does.
    """
    arrays["segment_ids"] = segment_ids
    return _along_rows(CAUSAL_CONV, implementation, conv_in_parts, CONV_AXES, (_CHANNELS, _TAIL), segment_ids.shape[1], arrays)


def _along_rows(
    table: Mapping[str, Callable],
    implementation: str,
    in_parts: Callable,
    axes: Mapping[str, Axes],
    outputs: tuple[Axes, Axes],
    length: int,
    arrays: Mapping[str, Array | None],
) -> tuple[Array, Array]:
    kernel, parts = functools.partial(dispatch, table, AUTO if length > 1 else {}, implementation), parts_of(length)
    return on_devices(kernel if parts == 1 else functools.partial(in_parts, kernel), axes, outputs, parts, **arrays)
