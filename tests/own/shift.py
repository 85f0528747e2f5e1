"""Each token reads the one before it in its document, a mixer."""

import jax.numpy as jnp

from metajax.models.layers import Linear
from metajax.models.mixers import Mixer, mixer


@mixer("shift")
class Shift(Mixer):
    """A document starts after the last prefix token."""

    def __init__(self, cfg, spec, implementation, key):
        self.w = Linear(key, (cfg.width, cfg.width), std=cfg.init_std, bias=False, axes=("embed", "ssm"))

    def __call__(self, h, inputs, cache, captures):
        x, ids = self.w(h), inputs.segment_ids
        (reset,) = cache.prefix.get("shift", (jnp.zeros_like(x[:1, 0]),))
        (last,) = cache.past.get("shift", (reset,))
        last = jnp.broadcast_to(last, x[:, 0].shape)[:, None]
        starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))[..., None]
        return jnp.where(starts, reset[:, None], jnp.concatenate([last, x[:, :-1]], axis=1)), (x[:, -1],)

    @staticmethod
    def channels(cfg):
        return cfg.width

    @staticmethod
    def token_flops(cfg, spec):
        return {"shift": 2 * cfg.width**2}

    @staticmethod
    def cache_bytes(cfg, spec, tokens):
        return {"state": 4 * cfg.width}
