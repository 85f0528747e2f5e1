"""The bottleneck heads: the rate by hand and by sampling, extreme values of beta, and heads trained at once or one at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from metajax.analysis.rate_distortion import PARTS, WIDTH, Budget, draw, draws_of, rate_and_distortion, train_head, train_heads


def examples(count, width=8, classes=4):
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=count)
    return jnp.asarray(np.eye(width, dtype=np.float32)[labels]), jnp.asarray(labels)


def test_rate_and_distortion_by_hand():
    h, labels = examples(6)
    head = draw(1, Budget(6, 1, 5), 6, 8, 4).head
    noise = np.random.default_rng(1).normal(size=(6, WIDTH)).astype(np.float32)
    rate, distortion = rate_and_distortion(head, h, labels, jnp.asarray(noise))
    encoded = np.asarray(h @ head["encoder"] + head["encoder_bias"], np.float64)
    mu, sigma = encoded[:, :WIDTH], np.exp(encoded[:, WIDTH:])
    assert rate == pytest.approx(np.mean(np.sum((mu**2 + sigma**2 - 1) / 2 - np.log(sigma), axis=1)), rel=1e-5)
    logits = (mu + sigma * noise) @ np.asarray(head["decoder"], np.float64) + np.asarray(head["decoder_bias"])
    assert distortion == pytest.approx(-np.mean(log_softmax(logits, axis=1)[np.arange(6), labels]), rel=1e-5)
    z = mu[0] + sigma[0] * np.random.default_rng(2).normal(size=(40_000, WIDTH))
    sampled = np.mean(np.sum(-0.5 * ((z - mu[0]) / sigma[0]) ** 2 - np.log(sigma[0]) + 0.5 * z**2, axis=1))
    assert rate_and_distortion(head, h[:1], labels[:1], jnp.asarray(noise[:1]))[0] == pytest.approx(sampled, rel=0.02)


def test_the_ends_of_beta():
    """With beta 0 the label is transmitted. With a large beta nothing is, and the loss is the entropy of the labels."""
    h, labels = examples(60)
    budget = Budget(40, 40, 2000, 3e-3)
    free, dear = train_heads(jnp.array([1e-3, 50.0]), draws_of(2, budget, 60, 8, 4), h, labels, budget=budget)
    shares = np.bincount(np.asarray(labels)[:40]) / 40
    assert (free[:, -1, :, 1] < 0.1).all() and (free[:, -1, 0, 0] > 1).all()
    assert (dear[:, -1, :, 0] < 0.05).all()
    np.testing.assert_allclose(dear[:, -1, 0, 1], -np.sum(shares * np.log(shares)), atol=0.05)


def test_heads_trained_together_equal_heads_trained_alone():
    h, labels = examples(12)
    budget = Budget(6, 1, 30)
    whole = train_heads(jnp.array([0.1, 1.0]), draws_of(3, budget, 12, 8, 4), h, labels, budget=budget)
    assert whole.shape == (2, 3, PARTS, 2, 2)
    one = train_head(jnp.float32(1.0), draw(2, budget, 12, 8, 4), h, labels, budget=budget)
    np.testing.assert_allclose(whole[1, 2], one, rtol=1e-4, atol=1e-5)
    assert np.abs(whole[1, 1] - one).max() > 1e-2, "heads differ between seeds"


def test_every_epoch_has_every_example_once():
    chosen = np.asarray(draw(3, Budget(6, 2, 10), 9, 8, 4).chosen)
    assert chosen.shape == (10, 2)
    epochs = chosen.reshape(-1)[:18].reshape(3, 6)
    assert (np.sort(epochs, axis=1) == np.arange(6)).all() and (epochs[0] != epochs[1]).any()
