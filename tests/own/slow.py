"""Half the speed of RoPE at every frequency, a position scheme."""

import numpy as np

from metajax.models.rotary import position


@position("slow")
def slow(cfg):
    return (0.5 * cfg.rope_theta ** (-np.arange(0, cfg.head_dim, 2) / cfg.head_dim)).astype(np.float32), 1.0
