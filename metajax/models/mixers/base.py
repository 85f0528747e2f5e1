"""The base class of sequence mixers and their registry. Each mixer is one file, registered by the name in its decorator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from metajax.config import Model
from metajax.core.registries import Registry
from metajax.models.rotary import Table

Batch = Mapping[str, np.ndarray]


class LayerSpec(NamedTuple):
    """The specification of one layer. Layers with equal specs can be stacked."""

    mixers: tuple[str, ...] = ("attention",)  # names in `MIXERS`; all read the same input
    join: Literal["alone", "mean", "concat"] = "alone"
    branch_norm: Literal["none", "plain", "scaled"] = "none"  # of each mixer's output before the join
    window: int | None = None  # a query sees itself and this many earlier keys; None: all
    owns_kv: bool = True  # False: it uses the keys and values of its group's first layer
    meta_attention: str = "none"  # form of meta-attention after the mixers, as in `MetaTokens.attention`
    mlp: bool = True
    residual_std: float = 0.02  # initial standard deviation of projections into the residual stream
    split_keys: bool = True  # initialisation: one random key per mixer; False: one key for attention and its output map

    @property
    def all_mixers(self) -> tuple[str, ...]:
        """The mixers, including meta-attention."""
        return (*self.mixers, *(("meta_attention",) if self.meta_attention != "none" else ()))


class KeyValues(NamedTuple):
    """Keys and values of S positions in one attention mixer; `real` marks the positions that hold a token."""

    k: Float[Array, "B S KV Dq"]  # rotated
    v: Float[Array, "B S KV Dv"]
    real: Bool[Array, "B S"]


class Cache(NamedTuple):
    """Cached state of a layer, {mixer: `KeyValues` or the mixer's state}. A layer returns such a dict for its own tokens."""

    prefix: dict[str, Any]  # of the learned prefix, B = 1
    past: dict[str, Any]  # when decoding: of each row's earlier tokens
    group: dict[str, Any]  # of the same tokens, in the earlier layers that share keys and values with this layer


class LayerInputs(NamedTuple):
    """Inputs of a layer besides the residual stream; the same for all layers."""

    segment_ids: Int[Array, "B T"]
    rotary: Table | None = None  # None: no rotary embedding
    meta_positions: Int[Array, "B M"] | None = None  # sorted, >= T if unused; None: no row has meta-tokens
    meta_rotary: Table | None = None  # for meta-attention: angles of the M meta-tokens if it gathers them, else of all positions
    is_prefix: bool = False  # the tokens are the learned prefix, which sees itself in any window
    row_is_meta: Bool[Array, "B N"] | None = None  # when decoding a token per row: which of its N positions are meta-tokens

    @property
    def metas(self) -> Int[Array, "B M"]:
        """The positions of the meta-tokens, which rows with meta-attention have."""
        assert self.meta_positions is not None
        return self.meta_positions


class Captures:
    """Collects intermediates by name while a layer is traced."""

    def __init__(self, names: tuple[str, ...] = ()):
        self.names = names
        self.values: dict[str, Array] = {}

    def wants(self, name: str) -> bool:
        return name in self.names

    def record(self, name: str, value: Array) -> None:
        if self.wants(name):
            self.values[name] = value


class Mixer(nnx.Module):
    """A module that mixes information across the positions of a row.

    Parameters carry their logical axes (`metajax.models.layers.normal_param`). The defaults suit a mixer with a recurrent state,
    without (query, key) pairs and without cached keys. The static methods count FLOPs and bytes for one layer.
    """

    name: ClassVar[str]  # in `MIXERS`
    captures: ClassVar[tuple[str, ...]] = ()  # names of intermediates that it can record
    in_hybrid: ClassVar[bool] = True  # whether `model.hybrid.ssm` accepts its name

    def __init__(self, cfg: Model, spec: LayerSpec, implementation: str, key: PRNGKeyArray):
        raise NotImplementedError

    def __call__(
        self, h: Float[Array, "B T width"], inputs: LayerInputs, cache: Cache, captures: Captures
    ) -> tuple[Float[Array, "B T C"], Any]:
        """(output, cache entry of these tokens): `KeyValues`, arrays [B, ...] that replace the earlier state, or None.

        No token may see a position of another segment.
        """
        raise NotImplementedError

    @staticmethod
    def channels(cfg: Model) -> int:
        """C, the width of the output."""
        raise NotImplementedError

    @staticmethod
    def token_flops(cfg: Model, spec: LayerSpec) -> dict[str, int]:
        """Forward operations per token by part, without (query, key) pairs."""
        raise NotImplementedError

    @staticmethod
    def pair_flops(cfg: Model) -> int:
        """Forward operations per (query, key) pair."""
        return 0

    @staticmethod
    def pairs(spec: LayerSpec, batch: Batch, prefix: int) -> int:
        """Allowed (query, key) pairs of a batch without padding; `prefix`: number of additional keys that every query sees."""
        return 0

    @staticmethod
    def kept_positions(spec: LayerSpec, tokens: int, metas: int) -> int:
        """Cached keys (S of `KeyValues`) after `tokens` positions, of which `metas` are meta-tokens; 0: none."""
        return 0

    @staticmethod
    def cache_bytes(cfg: Model, spec: LayerSpec, tokens: int) -> dict[str, int]:
        """Cache bytes of a row with `tokens` positions when decoding, by part; "state" is the part that does not grow."""
        return {}


M = TypeVar("M", bound=Mixer)
MIXERS: Registry[type[Mixer]] = Registry("mixer", "metajax.models.mixers")


def mixer(name: str) -> Callable[[type[M]], type[M]]:
    """Register a class as the mixer `name`."""

    def register(cls: type[M]) -> type[M]:
        cls.name = name
        return MIXERS(name)(cls)

    return register
