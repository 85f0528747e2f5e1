"""PyTorch's side of the attention cases: FlexAttention with a block mask, and scaled_dot_product_attention for plain masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import flex_attention as flex

from benchmarks.gpu.clock import Side

if TYPE_CHECKING:
    from benchmarks.gpu.attention import Setting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    flex._validate_device = lambda *_: (
        None
    )  # compiled FlexAttention refuses gradients on a CPU, its plain form does not; only tiny sizes need this
Arrays = dict[str, np.ndarray]


def wait(_: Any) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compile_here(function: Callable) -> Callable:
    """torch.compile for one shape (without dynamic=False the second shape is compiled as dynamic); on a CPU only traced."""
    return torch.compile(function, dynamic=False, backend="inductor" if DEVICE == "cuda" else "aot_eager")


def attention_sides(setting: Setting, passes: str, arrays: Arrays) -> dict[str, Callable[[], Side]]:
    """Functions that make the sides, by name; `arrays`: as in benchmarks.gpu.attention.inputs, float32."""
    make = functools.partial(_side, setting, passes, arrays)
    sides = {"torch, FlexAttention": make("torch, FlexAttention", flex_sides)}
    if setting.shape.key_width < setting.shape.value_width:
        name = f"torch, FlexAttention, q and k padded to {setting.shape.value_width}"
        sides[name] = make(name, functools.partial(flex_sides, padding=setting.shape.value_width - setting.shape.key_width))
    if setting.shape.window is None and not setting.shape.meta:
        name = "torch, SDPA" + (" of the gathered tokens" if setting.among else "")
        sides[name] = make(name, sdpa_sides)
    return sides


def flex_sides(setting: Setting, padding: int = 0) -> tuple[Callable, np.ndarray | None]:
    """(function of [B, T, heads, width] arrays, the positions of its gathered rows); padding zeros do not change scores."""
    shape, meta_positions = setting.shape, None
    if setting.among:
        meta_positions = meta_positions(setting.rows, setting.among, shape.length)
        block_mask = meta_mask(meta_positions, setting.among)
    else:
        block_mask = row_mask(shape.length, shape.window, shape.meta)

    def attend(block_mask: Any, q: Any, k: Any, v: Any, prefix_k: Any = None, prefix_v: Any = None) -> Any:
        if prefix_k is not None:
            k, v = (torch.cat([m.expand(len(x), *m.shape), x], dim=1) for m, x in ((prefix_k, k), (prefix_v, v)))
        q, k = (functional.pad(x, (0, padding)) for x in (q, k)) if padding else (q, k)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = flex.flex_attention(*heads_first, block_mask=block_mask, scale=shape.key_width**-0.5, enable_gqa=True)
        return out.transpose(1, 2)

    return functools.partial(compile_here(attend), block_mask), meta_positions


def sdpa_sides(setting: Setting) -> tuple[Callable, None]:
    def attend(q: Any, k: Any, v: Any) -> Any:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend, None


def row_mask(length: int, window: int | None, meta: int) -> Any:
    """Causal mask with a window of so many earlier keys, after `meta` keys that all queries see."""

    def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
        own = key - meta
        seen = query >= own
        seen = seen if window is None else seen & (query - own <= window)
        return (own < 0) | seen if meta else seen

    return flex.create_block_mask(visible, None, None, length, meta + length, device=DEVICE)


def meta_mask(meta_positions: np.ndarray, length: int) -> Any:
    """Mask: query and key are both meta-tokens of their row, and the key is not later."""
    flags = torch.zeros(len(meta_positions), length, dtype=torch.bool, device=DEVICE)
    flags.scatter_(1, torch.from_numpy(meta_positions).to(DEVICE), True)

    def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
        return (query >= key) & flags[b, query] & flags[b, key]

    return flex.create_block_mask(visible, len(meta_positions), None, length, length, device=DEVICE)


def meta_positions(rows: int, length: int, count: int) -> np.ndarray:
    """int64[rows, count], sorted: positions of the meta-tokens of each row."""
    rng = np.random.default_rng(0)
    return np.stack([np.sort(rng.choice(length, count, replace=False)) for _ in range(rows)])


def _side(setting: Setting, passes: str, arrays: Arrays, name: str, build: Callable) -> Callable[[], Side]:
    def make() -> Side:
        torch._dynamo.reset()
        function, meta_positions = build(setting)
        given = {key: _spread(x, meta_positions, setting.among) for key, x in arrays.items()}
        tensors = {key: torch.from_numpy(x).to(DEVICE, torch.bfloat16) for key, x in given.items()}
        cotangent = tensors.pop("cotangent")
        leaves = [x.requires_grad_(passes == "both") for x in tensors.values()]

        def call() -> list[Any]:
            if passes == "forward":
                with torch.no_grad():
                    return [function(*leaves)]
            out = function(*leaves)
            return [out, *torch.autograd.grad(out, leaves, cotangent)]

        return Side(name, call, wait, lambda made: [_gathered(as_numpy(x), meta_positions) for x in made])

    return make


def _spread(x: np.ndarray, meta_positions: np.ndarray | None, length: int) -> np.ndarray:
    """Whole rows with the meta-tokens at their positions and zeros between."""
    if meta_positions is None:
        return x
    whole = np.zeros((len(x), length, *x.shape[2:]), x.dtype)
    whole[np.arange(len(x))[:, None], meta_positions] = x
    return whole


def _gathered(x: np.ndarray, meta_positions: np.ndarray | None) -> np.ndarray:
    return x if meta_positions is None else x[np.arange(len(x))[:, None], meta_positions]


def as_numpy(x: Any) -> np.ndarray:
    return x.detach().float().cpu().numpy()
