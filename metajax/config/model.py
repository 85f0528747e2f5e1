"""Config of the decoder and of its hybrid layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Literal

from metajax.core.errors import require
from metajax.core.fields import Count, CountOrZero, Except, OnlyWith, Part, Positive, Range, Size, SizeOrZero

if TYPE_CHECKING:
    import numpy as np

Layers = Annotated[int, Range(1, 10_000)]
Attends, Scans = Except("fusion", "mamba"), Except("fusion", "attention")
OfMamba = Except("ssm", "mamba2")
Rotates, Extends = Except("position", "learned", "none"), Except("position", "learned", "none", "rope")


@dataclass(frozen=True)
class Hybrid(Part, path="model.hybrid", renamed={"meta_tokens": "prefix_tokens"}):
    """Layers with attention, with another mixer such as Mamba, or with both, as in Hymba (arXiv 2411.13676) and its ablations.

    Layers outside `full_layers` attend within `model.window`; if the window is null, every layer attends to all positions.
    """

    # mean, concat: both in one layer, joined after their norms. sequential: Mamba and attention layers alternate (Samba).
    fusion: Literal["mean", "concat", "sequential", "attention", "mamba"] = "mean"
    prefix_tokens: SizeOrZero = 128  # M learned embeddings before every document (Hymba's "meta tokens")
    full_layers: Annotated[tuple[CountOrZero, ...], Attends] = ()
    kv_groups: tuple[Layers, ...] = ()  # sizes of layer groups that share the first layer's keys and values; empty: no sharing
    head_dim: Annotated[SizeOrZero, Attends] = 0  # of queries and keys; 0: model.width / model.heads
    value_dim: Annotated[SizeOrZero, Attends] = 0  # width of a head's values; 0: expand * head_dim beside Mamba, else head_dim
    ssm: Annotated[str, Scans] = "mamba"  # mixer beside or instead of attention: mamba, mamba2, or another from `@mixer`
    expand: Annotated[int, Range(1, 64), Scans] = 2  # Mamba's inner width / model.width
    state: Annotated[Size, Scans] = 16  # N, state size of a channel
    d_conv: Annotated[int, Range(2, 4), Scans] = 4  # width in tokens of the convolution before the scan, with the current token
    dt_rank: Annotated[SizeOrZero, Scans, OfMamba] = 0  # 0: ceil(model.width / 16)
    # Step-size bias: the released code's, or Mamba's 0.001 - 0.1; not stated in the paper.
    dt_init: Annotated[Literal["zero", "mamba"], Scans, OfMamba] = "zero"
    inner_norms: Annotated[bool, Scans, OfMamba] = True  # norms of step size, B and C
    # before the fusion; the scales are the paper's learnable betas
    branch_norm: Annotated[Literal["scaled", "plain", "none"], OnlyWith("fusion", "mean", "concat")] = "scaled"

    @property
    def is_parallel(self) -> bool:
        """Whether one layer has both mixers."""
        return self.fusion in ("mean", "concat")


@dataclass(frozen=True)
class Model(Part, path="model"):
    """A decoder language model assembled from parts. The presets in metajax/models/presets.py fill in these fields."""

    layers: Layers = 4
    width: Size = 128
    heads: Size = 4
    kv_heads: SizeOrZero = 0  # 0: as many as heads
    mlp_width: SizeOrZero = 512  # 0 (only in a hybrid): layers without a feed-forward network
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "swiglu"] = "gelu"  # gelu is the exact (erf) form
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: Positive = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    bias: bool = False
    tied: bool = True
    position: str = "rope"  # learned, rope, linear, llama3, ntk, yarn, none, or another registered with `@position`
    rope_theta: Annotated[Positive, Rotates] = 10_000.0
    rope_factor: Annotated[Positive, Extends] = 1.0  # context extension
    rope_original_length: Annotated[CountOrZero, Extends, Except("position", "linear")] = 0  # length before extension
    # rows of the learned position table; 0: as many as a row has positions
    max_positions: Annotated[SizeOrZero, OnlyWith("position", "learned")] = 0
    window: CountOrZero | None = None  # a query attends to itself and this many earlier keys; None: all
    init_std: Positive = 0.02
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    hybrid: Hybrid | None = None

    def __post_init__(self) -> None:
        hybrid, width, heads = self.hybrid, self.width, self.heads
        require(self.mlp_width > 0 or hybrid is not None, "model.mlp_width = 0: only a hybrid model has layers without")
        divides = width % heads == 0 or bool(hybrid and hybrid.head_dim)
        require(divides, f"model.width = {width} does not divide by model.heads = {heads}")
        require(heads % self.num_kv_heads == 0, f"model.heads = {heads} does not divide by model.kv_heads = {self.kv_heads}")
        has_length = self.position not in ("llama3", "ntk", "yarn") or self.rope_original_length > 0
        length = "model.rope_original_length, the length before extension"
        require(has_length, f"model.position = {self.position!r} needs {length}")
        if hybrid is not None:
            self._check_hybrid(hybrid)

    def _check_hybrid(self, hybrid: Hybrid) -> None:
        require(self.norm_position == "pre", f"model.norm_position = {self.norm_position!r}: a hybrid model has 'pre'")
        require(not self.bias, "model.bias = True: a hybrid model has False")
        prefix = "the prefix of a hybrid model has none; choose another scheme, such as rope, or none"
        require(self.position != "learned", f"model.position = 'learned': {prefix}")
        full, groups, layers = hybrid.full_layers, hybrid.kv_groups, self.layers
        require(max(full, default=0) < layers, f"model.hybrid.full_layers = {full}: layers go from 0 to {layers - 1}")
        apart = "model.hybrid.full_layers sets layers apart, but without model.window all attend to everything"
        require(not full or self.window is not None, apart)
        shared = sum(groups)
        require(shared in (0, layers), f"model.hybrid.kv_groups = {groups} has {shared} layers, model.layers = {layers}")
        attends = not groups or hybrid.fusion in ("mean", "concat", "attention")
        neighbours = "has no attention in neighbouring layers to share keys and values"
        require(attends, f"model.hybrid.kv_groups: fusion {hybrid.fusion!r} {neighbours}")
        for start, size in zip(accumulate(groups, initial=0), groups, strict=False):
            windows = {self.layer_window(layer) for layer in range(start, start + size)}
            mixes = f"the group from layer {start} on mixes full and window layers"
            require(len(windows) == 1, f"model.hybrid.kv_groups: {mixes}")
        pairs = hybrid.fusion != "sequential" or layers % 2 == 0
        require(pairs, f"model.layers = {layers}: sequential layers come in pairs, Mamba and attention")

    def layer_window(self, layer: int) -> int | None:
        """The attention window of a layer; None: all earlier keys."""
        full = self.hybrid is not None and layer in self.hybrid.full_layers
        return None if full else self.window

    @property
    def head_dim(self) -> int:
        return (self.hybrid and self.hybrid.head_dim) or self.width // self.heads

    @property
    def value_dim(self) -> int:
        """Width of one head's values."""
        if self.hybrid is None:
            return self.head_dim
        return self.hybrid.value_dim or self.head_dim * (self.hybrid.expand if self.hybrid.is_parallel else 1)

    @property
    def ssm_width(self) -> int:
        """Channels of a Mamba in a hybrid layer."""
        return self.width * self.hybrid.expand if self.hybrid is not None else 0

    @property
    def dt_rank(self) -> int:
        """Rank of the projection to Mamba's step size."""
        return (self.hybrid.dt_rank or -(-self.width // 16)) if self.hybrid is not None else 0

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def prefix_tokens(self) -> int:
        """M, the number of learned embeddings before every document."""
        return self.hybrid.prefix_tokens if self.hybrid is not None else 0


@dataclass(frozen=True)
class Imported(Part, path="imported"):
    """Facts about the published checkpoint that the parameters come from; `import` and `init.from` fill it in."""

    rows: Count  # rows of the checkpoint's embedding table; the model's table may have more
    added: tuple[CountOrZero, ...] = ()  # ids without a row in the checkpoint that this run trains or evaluates
    ends: tuple[CountOrZero, ...] = ()  # ids that end a text
    opens: bool = True  # whether the tokenizer puts BOS before a prompt

    @property
    def last(self) -> int:
        """Number of rows up to the last one in the softmax."""
        return max((self.rows - 1, *self.added)) + 1

    def table(self, size: int) -> int:
        """Rows of the model's embedding table for a tokenizer of `size` ids: at least the checkpoint's, in blocks of 64."""
        return max(size, -(-self.rows // 64) * 64)

    def absent(self, size: int) -> np.ndarray:
        """bool[size]: ids that have no row in the checkpoint and are not in `added`; every softmax excludes them."""
        import numpy as np  # a tenth of the time of `list`

        ids = np.arange(size)
        return (ids >= self.rows) & ~np.isin(ids, self.added)


def hymba_ntk_factor(length: float, original_length: float, extension: float = 2.0) -> float:
    """`rope_factor` as Hymba derives it from its maximum length: extension * length / original - (extension - 1)."""
    return extension * length / original_length - (extension - 1)
