"""Generation speed: time to first token and tokens per second, for several models interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import Config
from metajax.core.errors import require
from metajax.data.encoding import Vocabulary
from metajax.inference.decoding import Sampling, advance
from metajax.inference.forward import Ready, prepare
from metajax.inference.generation import Rows, make_rules
from metajax.models.lm import LM


def generation_speed(
    models: Mapping[str, tuple[LM, Config]], vocabulary: Vocabulary, *, prompt: int, count: int, repeats: int = 5, seed: int = 0
) -> dict[str, dict[str, float]]:
    """{name: {"ttft_ms", "tokens_per_second"}}, medians over `repeats` rounds of all models, after one round that compiles.

    Every model reads the same `prompt` random tokens and draws `count` more, greedily and without an end. Its meta-tokens
    take time but are not counted (the learned meta-tokens paper reports 130.82 tokens per second without and 117.86 with them).
    Raises UserError if there is no token to time, or if the tokens do not fit in a row.
    """
    require(prompt >= 1 and count >= 2, f"prompt = {prompt}, count = {count}: at least 1 token in the prompt and 2 to draw")
    ids = np.random.default_rng(seed).integers(vocabulary.base, size=prompt).tolist()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    ready = {name: prepare(model) for name, (model, _) in models.items()}
    for _ in range(repeats + 1):
        for name, (_, config) in models.items():
            taken[name].append(_time(ready[name], config, vocabulary, ids, count))
    return {
        name: {
            "ttft_ms": 1e3 * statistics.median(first for first, _ in rounds[1:]),
            "tokens_per_second": (count - 1) / statistics.median(rest for _, rest in rounds[1:]),
        }
        for name, rounds in taken.items()
    }


def _time(ready: Ready, config: Config, vocabulary: Vocabulary, ids: list[int], count: int) -> tuple[float, float]:
    """(seconds to the first token, seconds of the rest)."""
    rules = make_rules(config, vocabulary, Sampling(temperature=0.0), seed=0).replace(ends=jnp.asarray([-1]))
    rows = Rows.of(config, [ids], vocabulary, count)
    begin = time.perf_counter()
    state = jax.block_until_ready(rows.start(ready, rules))
    first = time.perf_counter()
    jax.block_until_ready(advance(ready, state, rules, config.row_positions))
    return first - begin, time.perf_counter() - first
