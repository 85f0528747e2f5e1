"""Meta-attention: the second attention operation of learned meta-tokens (arXiv 2509.16278), in several forms."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from kernels_pallas.prefix_window_attention.reference import masked_attention, masked_softmax
from metajax.config import Model
from metajax.models import ops
from metajax.models.layers import gather_rows
from metajax.models.masks import Mask, dense_mask, gathered_expiry, meta_dense, meta_flags
from metajax.models.mixers.attention import Attention, Projections
from metajax.models.mixers.base import Batch, Cache, Captures, KeyValues, LayerInputs, LayerSpec, Mixer, mixer

EVERYWHERE = ("dense_uniform", "dense_causal", "causal")  # forms that also change ordinary tokens


@mixer("meta_attention")
class MetaAttention(Projections, Mixer):
    """Attention among the meta-tokens of a segment, with separate weights, [B, N, width] -> [B, N, width].

    The form is `MetaTokens.attention`. "gathered" reads and writes only the M meta-tokens (N = M), at M / T of the cost of
    "dense" (N = T). For "dense" the caller drops the rows of ordinary tokens. The forms in EVERYWHERE write to all tokens.
    """

    in_hybrid = False
    captures = (
        "meta_out",  # [L, B, T, width], what meta-attention adds, else 0; absent if no row has meta-tokens
        "meta_probabilities",  # float32[L, B, heads, query, key]; query and key count M if gathered, else T
        "meta_keys",  # [L, B, M, kv_heads, head_dim]; T instead of M if it writes to all tokens
        "meta_values",
    )

    def __init__(self, cfg: Model, spec: LayerSpec, implementation: str, key: PRNGKeyArray):
        super().__init__(cfg, key)
        self.form, self.implementation = spec.meta_attention, implementation

    @property
    def writes_everywhere(self) -> bool:
        return self.form in EVERYWHERE

    def __call__(
        self, h: Float[Array, "B N width"], inputs: LayerInputs, cache: Cache, captures: Captures
    ) -> tuple[Float[Array, "B N width"], KeyValues]:
        q, k, v = self.split(h, inputs.meta_rotary)
        assert k is not None and v is not None  # no layer shares them
        options = {"segment_ids": inputs.segment_ids, "implementation": self.implementation}
        if self.form == "gathered":
            out, lse = ops.meta_attention(q, k, v, meta_positions=inputs.metas, **options)
        elif self.form == "causal":
            out, lse = ops.attention(q, k, v, mask=Mask(), **options)
        else:
            q, allow = self._allowed(q, inputs)
            out, lse = masked_attention(q, k, v, allow, scale=q.shape[-1] ** -0.5)
        if "meta_attention" in cache.past:
            past = self._visible(cache.past["meta_attention"], inputs)
            out, lse = ops.join_past(out, lse, q, *past, implementation=self.implementation)
        if captures.wants("meta_probabilities"):  # masking the queries again changes nothing
            masked, allow = self._allowed(q, inputs)
            captures.record("meta_probabilities", masked_softmax(masked, k, allow, scale=q.shape[-1] ** -0.5)[0])
        left = self._left(k, v, inputs)
        captures.record("meta_keys", left.k)
        captures.record("meta_values", left.v)
        return self.merge(out), left

    def _left(self, k: Array, v: Array, inputs: LayerInputs) -> KeyValues:
        """Keys and values of the M meta-tokens, or of all tokens if the form writes to all tokens."""
        if self.writes_everywhere:
            return KeyValues(k, v, inputs.segment_ids > 0)
        if self.form == "dense":
            k, v = (gather_rows(x, inputs.metas) for x in (k, v))
        return KeyValues(k, v, gather_rows(inputs.segment_ids, inputs.metas) > 0)

    def _visible(self, past: KeyValues, inputs: LayerInputs) -> KeyValues:
        """The cached keys that each row's token sees. In two of the forms a meta-token sees only meta-tokens."""
        if self.form not in ("dense_uniform", "dense_causal"):
            return past
        assert inputs.row_is_meta is not None  # when decoding
        is_meta = inputs.metas[:, :1] == 0  # rows have one token each
        return past._replace(real=past.real & (inputs.row_is_meta[:, : past.k.shape[1]] | ~is_meta))

    def _allowed(self, q: Float[Array, "B N H D"], inputs: LayerInputs) -> tuple[Array, Array]:
        """(queries, mask bool[B, N, N]). If dense, meta-tokens see meta-tokens; ordinary tokens see nothing or their past, by the form.

        A constant added to all scores of a fully masked row cancels in the softmax, so the past stays visible ("dense_causal").
        A constant so large that float32 loses the scores leaves equal weights, so the scores are 0 ("dense_uniform").
        """
        if self.form == "gathered":
            return q, dense_mask(gathered_expiry(inputs.segment_ids, inputs.metas))
        if self.form == "causal":
            return q, Mask().dense(inputs.segment_ids)
        allow = meta_dense(inputs.segment_ids, inputs.metas)
        if self.writes_everywhere:
            ordinary = ~meta_flags(inputs.metas, q.shape[1])
            allow = allow | (Mask().dense(inputs.segment_ids) & ordinary[:, :, None])
            if self.form == "dense_uniform":
                q = jnp.where(ordinary[:, :, None, None], 0, q)
        return q, allow

    @staticmethod
    def channels(cfg: Model) -> int:
        return cfg.width

    @staticmethod
    def token_flops(cfg: Model, spec: LayerSpec) -> dict[str, int]:
        output = 2 * cfg.width * cfg.heads * cfg.head_dim
        return {"meta_attention": output + sum(Attention.token_flops(cfg, LayerSpec()).values())}

    pair_flops = Attention.pair_flops

    @staticmethod
    def pairs(spec: LayerSpec, batch: Batch, prefix: int) -> int:
        real = batch["segment_ids"] > 0
        after = ((0, 0), (0, 1))  # an unused position points past the row: no segment, no past
        positions = np.minimum(batch["meta_positions"], real.shape[1])
        segments = np.take_along_axis(np.pad(batch["segment_ids"], after), positions, axis=1)
        same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
        among = int(np.tril(same).sum())
        if spec.meta_attention not in EVERYWHERE:
            return among
        past = np.pad(np.where(real, batch["positions"] + 1, 0), after)
        if spec.meta_attention == "causal":
            return int(past.sum())
        np.put_along_axis(past, positions, 0, axis=1)  # ordinary tokens attend to their past, meta-tokens to meta-tokens
        return int(past.sum()) + among

    @staticmethod
    def kept_positions(spec: LayerSpec, tokens: int, metas: int) -> int:
        return tokens if spec.meta_attention in EVERYWHERE else metas
