"""What a sequence mixer is, and the registry of mixers: one file each, found by the name in its decorator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from metajax.config import Model
from metajax.config.model import HYBRID_MIXERS
from metajax.core.registries import Registry
from metajax.models.rotary import Table

Batch = Mapping[str, np.ndarray]


class LayerSpec(NamedTuple):
    """What one layer is made of. Layers with equal specs can be stacked."""

    mixers: tuple[str, ...] = ("attention",)  # names in `MIXERS`, all on the same input
    join: Literal["alone", "mean", "concat"] = "alone"
    branch_norm: Literal["none", "plain", "scaled"] = "none"  # of each mixer's output before the join
    window: int | None = None  # a query sees itself and this many keys before it; None: all
    owns_kv: bool = True  # False: keys and values of the first layer of its group
    meta_attention: str = "none"  # form of the meta-attention after the mixers, as in `MetaTokens.attention`
    mlp: bool = True
    residual_std: float = 0.02  # initial standard deviation of projections into the residual stream
    split_keys: bool = True  # initialisation: each mixer draws from a key of its own; False: one key for attention and its output

    @property
    def all_mixers(self) -> tuple[str, ...]:
        """The mixers, with meta-attention."""
        return (*self.mixers, *(("meta_attention",) if self.meta_attention != "none" else ()))


class KeyValues(NamedTuple):
    """Keys and values of S positions in one attention, and which of them hold a token."""

    k: Float[Array, "B S KV Dq"]  # rotated
    v: Float[Array, "B S KV Dv"]
    real: Bool[Array, "B S"]


class Cache(NamedTuple):
    """What earlier tokens left in a layer: {mixer: `KeyValues` or the mixer's own state}. A layer returns such a dict for its tokens."""

    prefix: dict[str, Any]  # of the learned prefix, B = 1
    past: dict[str, Any]  # when decoding: of the earlier tokens of each row
    group: dict[str, Any]  # of the same tokens, in the earlier layers that share keys and values with this one


class LayerInputs(NamedTuple):
    """Inputs of a layer besides the residual stream; the same for all layers."""

    segment_ids: Int[Array, "B T"]
    rotary: Table | None = None  # None: no rotary embedding
    meta_positions: Int[Array, "B M"] | None = None  # sorted, >= T where unused; None: no row has meta-tokens
    meta_rotary: Table | None = None  # for meta-attention: of the M meta-tokens if it gathers them, else of all positions
    is_prefix: bool = False  # the tokens are the learned prefix, which sees itself in any window
    row_is_meta: Bool[Array, "B N"] | None = None  # decoding one token of each row: which of a row's N positions are meta-tokens


class Captures:
    """Collects the intermediates asked for by name while a layer is traced."""

    def __init__(self, names: tuple[str, ...] = ()):
        self.names = names
        self.values: dict[str, Array] = {}

    def wants(self, name: str) -> bool:
        return name in self.names

    def record(self, name: str, value: Array) -> None:
        if self.wants(name):
            self.values[name] = value


class Mixer(nnx.Module):
    """A module that lets positions of a row see each other.

    Parameters carry their logical axes (`metajax.models.layers.normal_param`). By default it has no (query, key) pairs and keeps a state,
    not keys. The static methods count one layer.
    """

    captures: ClassVar[tuple[str, ...]] = ()  # names that `Captures` can ask for

    def __init__(self, cfg: Model, spec: LayerSpec, implementation: str, key: PRNGKeyArray):
        raise NotImplementedError

    def __call__(
        self, h: Float[Array, "B T width"], inputs: LayerInputs, cache: Cache, captures: Captures
    ) -> tuple[Float[Array, "B T C"], Any]:
        """(output, what these tokens leave for later ones: `KeyValues`, or arrays [B, ...] that replace those of earlier tokens).

        None instead of the latter: nothing is left. No token may see a position of another segment.
        """
        raise NotImplementedError

    @staticmethod
    def channels(cfg: Model) -> int:
        """C, the width of the output."""
        raise NotImplementedError

    @staticmethod
    def token_flops(cfg: Model, spec: LayerSpec) -> dict[str, int]:
        """Forward operations of one token by part, without (query, key) pairs."""
        raise NotImplementedError

    @staticmethod
    def pair_flops(cfg: Model) -> int:
        """Forward operations of one (query, key) pair."""
        return 0

    @staticmethod
    def pairs(spec: LayerSpec, batch: Batch, prefix: int) -> int:
        """Allowed (query, key) pairs of a batch, padding left out; `prefix`: keys that every query sees besides."""
        return 0

    @staticmethod
    def kept_positions(spec: LayerSpec, tokens: int, metas: int) -> int:
        """S of its `KeyValues` after `tokens` positions, `metas` of them meta-tokens; 0: no key is kept."""
        return 0

    @staticmethod
    def cache_bytes(cfg: Model, spec: LayerSpec, tokens: int) -> dict[str, int]:
        """Bytes that decoding keeps of a row with `tokens` positions, by part; "state" for what does not grow."""
        return {}


MIXERS: Registry[type[Mixer]] = Registry("mixer", "metajax.models.mixers")


def mixer(name: str, *, hybrid: bool = True) -> Callable[[type], type]:
    """Register a class as the mixer `name`. hybrid: `model.hybrid.ssm` takes the name."""

    def register(cls: type) -> type:
        MIXERS.add(name, cls, cls.__module__)
        if hybrid and name not in HYBRID_MIXERS:
            HYBRID_MIXERS.append(name)
        return cls

    return register
