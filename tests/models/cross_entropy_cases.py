"""Cross-entropy in blocks equals optax on whole logits, for every mesh, block size and kind of gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kernels_pallas import cross_entropy
from metajax.distributed.mesh import make_mesh
from metajax.distributed.rules import partition_spec
from metajax.models.cross_entropy import MATRIX_AXES, token_scores, weighted_loss

ROWS, LENGTH, WIDTH, VOCABULARY, Z_LOSS = 8, 12, 16, 40, 1e-2
MESHES = ("fsdp=1", "fsdp=8", "data=2,fsdp=4", "data=8", "fsdp=2,tensor=4", "fsdp=2,context=4", "fsdp=2,context=2,tensor=2")


@pytest.fixture(params=[1 << 27, 16 * VOCABULARY], ids=["whole", "blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK", request.param)
    return request.param


def drawn(width=WIDTH, vocabulary=VOCABULARY, rows=ROWS):
    keys = jax.random.split(jax.random.key(0), 4)
    x, matrix = (jax.random.normal(k, (*shape, width)) for k, shape in zip(keys, ((rows, LENGTH), (vocabulary,)), strict=False))
    targets = jax.random.randint(keys[2], (rows, LENGTH), 0, vocabulary)
    weights = jnp.where(targets % 3 == 0, 0.0, jax.random.uniform(keys[3], (rows, LENGTH)))
    return x, matrix, targets, weights


def reference(x, matrix, targets, weights, absent):
    logits = jnp.where(absent, -jnp.inf, x @ matrix.T)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(weights * (nll + Z_LOSS * jax.nn.logsumexp(logits, axis=-1) ** 2))


def by_scores(x, matrix, targets, weights, absent):
    found = token_scores(x, matrix, targets, absent)
    return jnp.sum(weights * (found.nll + Z_LOSS * found.log_z**2))


def by_sum(x, matrix, targets, weights, absent):
    return weighted_loss(x, matrix, targets, weights, absent, Z_LOSS)[0]


def on_mesh(text, x, matrix, targets, weights):
    devices = jax.devices()[: 1 if text == "fsdp=1" else 8]
    mesh = make_mesh(text, devices)
    place = lambda a, axes: jax.device_put(a, jax.NamedSharding(mesh, partition_spec(axes, a.shape, mesh)))  # noqa: E731
    rows = ("batch", "length")
    return mesh, (place(x, (*rows, None)), place(matrix, MATRIX_AXES), place(targets, rows), place(weights, rows))


@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("loss", [by_sum, by_scores])
def test_loss_and_gradient(block, text, loss):
    given, absent = drawn(), jnp.arange(VOCABULARY) == VOCABULARY - 1
    given = (*given[:2], jnp.minimum(given[2], VOCABULARY - 2), given[3])
    expected = jax.value_and_grad(reference, (0, 1))(*given, absent)
    mesh, placed = on_mesh(text, *given)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(*placed, absent)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-5), found, expected)


@pytest.mark.parametrize(("width", "vocabulary", "rows"), [(12, 40, 8), (16, 37, 8), (16, 40, 3), (12, 37, 3)])
def test_sizes_that_the_mesh_does_not_divide(block, width, vocabulary, rows):
    given, absent = drawn(width, vocabulary, rows), jnp.zeros(vocabulary, bool)
    expected = jax.value_and_grad(reference, (0, 1))(*given, absent)
    mesh, placed = on_mesh("fsdp=4,tensor=2", *given)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(by_sum, (0, 1)))(*placed, absent)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-5), found, expected)


@pytest.mark.parametrize("text", ["fsdp=1", "fsdp=2,context=2,tensor=2"])
def test_the_most_likely_id_is_the_first_of_equals(block, text):
    """As `argmax` says, also if equal logits are on different devices."""
    x, matrix, targets, weights = drawn()
    matrix = jnp.round(matrix.at[20:].set(matrix[:20]))
    x = jnp.round(x)
    best = jnp.argmax(x @ matrix.T, axis=-1)
    targets = jnp.where(targets % 3 == 0, best, jnp.where(targets % 3 == 1, (best + 20) % 40, targets))
    mesh, placed = on_mesh(text, x, matrix, targets, weights)
    with jax.set_mesh(mesh):
        found = jax.jit(token_scores)(*placed[:3]).is_top
    assert 0.2 < found.mean() < 0.8
    np.testing.assert_array_equal(found, best == targets)


def test_no_array_holds_the_logits_of_all_positions(monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK", 128 * VOCABULARY)
    x, matrix, targets, weights = drawn(rows=64)
    step = jax.jit(jax.grad(lambda x, matrix: by_sum(x, matrix, targets, weights, None), (0, 1)))
    assert f"{64 * LENGTH},{VOCABULARY}" not in (text := step.lower(x, matrix).compile().as_text())
    assert f"[128,{VOCABULARY}]" in text
