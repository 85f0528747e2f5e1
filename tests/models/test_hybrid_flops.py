"""FLOPs of hybrid layers: matrix products compared with the program's, pairs by brute force, the scan from its recurrence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_flops import dot_flops

from metajax.config import Config, Data, Hybrid, Model, Runtime
from metajax.core.fields import override
from metajax.models.flops import flops_per_token, matmul_flops, pair_flops, step_flops
from metajax.models.mixers import MIXERS
from metajax.models.mixers.mamba import scan_operations
from metajax.models.presets import hymba_1_5b
from metajax.models.specs import layer_specs
from metajax.training.program import build_model

VOCAB, LENGTH, ROWS, METAS = 64, 24, 2, 3
HYBRID = Hybrid(prefix_tokens=METAS, full_layers=(0,), kv_groups=(1, 3), state=4)
SIZES = {"width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 24, "activation": "swiglu", "norm": "rmsnorm"}
MODEL = Model(window=5, layers=4, hybrid=HYBRID, **SIZES)
FORMS = {
    "mean": {},
    "concat": {"hybrid.fusion": "concat"},
    "attention": {"hybrid.fusion": "attention"},
    "mamba": {"hybrid.fusion": "mamba", "hybrid.kv_groups": ()},
    "sequential": {"hybrid.fusion": "sequential", "hybrid.kv_groups": (), "hybrid.head_dim": 6},
}


def config_of(model):
    runtime = Runtime(implementation="reference", unroll=1)
    return Config(name="x", data=Data(sequence_length=LENGTH, batch_size=ROWS), model=model, runtime=runtime)


@pytest.mark.parametrize("form", FORMS)
def test_matrix_products_equal_the_programs_own(form):
    config = config_of(override(MODEL, FORMS[form]))
    model = jax.eval_shape(lambda: build_model(config, VOCAB, jax.random.key(0)))
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    counted = dot_flops(jax.make_jaxpr(lambda m: m(tokens, positions=tokens, segment_ids=tokens + 1))(model).jaxpr)
    parts = matmul_flops(config, VOCAB)
    head, _ = parts.pop("head"), parts.pop("scan", 0)  # the scan has no matrix product in it
    attending = sum("attention" in spec.mixers for spec in layer_specs(config.model))
    dense_pairs = attending * (ROWS * LENGTH * (METAS + LENGTH) + METAS**2)
    positions = ROWS * LENGTH
    assert (positions + METAS) * sum(parts.values()) + positions * head + MIXERS["attention"].pair_flops(
        config.model
    ) * dense_pairs == counted


def test_pairs_equal_a_brute_force_count():
    lengths = [[9, 11, 4], [2, 14, 5]]
    segments = np.array([np.repeat([1, 2, 3, 0], [*n, LENGTH - sum(n)]) for n in lengths])
    positions = np.array([np.concatenate([np.arange(k) for k in [*n, LENGTH - sum(n)]]) for n in lengths])
    count = 0
    for window in (None, 5, 5, 5):
        count += sum(k <= q for q in range(METAS) for k in range(METAS))
        for row in lengths:
            for length in row:
                for q in range(METAS, METAS + length):  # the document after its meta tokens
                    count += sum(k <= q and (k < METAS or window is None or q - k <= window) for k in range(METAS + length))
    assert pair_flops(config_of(MODEL), {"segment_ids": segments, "positions": positions}) == {
        "attention": count * MIXERS["attention"].pair_flops(MODEL)
    }


def test_the_scans_count_follows_from_its_recurrence():
    class Counted:
        """A number that counts what is done to it."""

        total = 0

        def operation(self, *_):
            Counted.total += 1
            return Counted()

        __add__ = __mul__ = exp = softplus = silu = operation

    def token(state):
        u, delta, bias, skip, z = (Counted() for _ in range(5))
        step = (delta + bias).softplus()
        change, readout = step * u, skip * u
        for _ in range(state):
            h, rate, b, c = (Counted() for _ in range(4))
            h = (step * rate).exp() * h + change * b
            readout = readout + h * c
        return readout * z.silu()

    token(5)
    assert scan_operations(3, 5) == 3 * Counted.total


def test_a_row_of_one_document_costs_flops_per_token():
    config = config_of(MODEL)
    ones = np.ones((ROWS, LENGTH), np.int32)
    batch = {"tokens": ones, "segment_ids": ones, "positions": np.tile(np.arange(LENGTH), (ROWS, 1))}
    per_token = flops_per_token(config, VOCAB)
    assert step_flops(config, VOCAB, batch) == pytest.approx(ROWS * LENGTH * sum(per_token.values()), rel=1e-12)


def test_sharing_saves_the_projections_of_keys_and_values():
    shared = hymba_1_5b()
    alone = dataclasses.replace(shared, hybrid=dataclasses.replace(shared.hybrid, kv_groups=()))
    saved = matmul_flops(config_of(alone), VOCAB)["attention"] - matmul_flops(config_of(shared), VOCAB)["attention"]
    assert saved == 2 * 15 * 1600 * (320 + 640), "15 of 32 layers reuse"
