"""The speed of generation: counted tokens, and models timed in turns."""

import jax
import pytest

from metajax.config import MetaTokens
from metajax.core.errors import UserError
from metajax.data.tokenizers import Bytes
from metajax.inference import speed
from metajax.training.program import build_model

VOCABULARY = Bytes().vocabulary


def test_medians_over_interleaved_rounds_without_the_first(tiny_config, monkeypatch):
    taken = iter([(9.0, 9.0), (8.0, 8.0), (0.1, 1.0), (0.2, 4.0), (0.3, 2.0), (0.4, 5.0), (0.5, 3.0), (0.6, 6.0)])
    turns = []

    def timed(model, config, vocabulary, ids, count):
        turns.append(model)
        assert len(ids) == 5 and max(ids) < vocabulary.base
        return next(taken)

    monkeypatch.setattr(speed, "_time", timed)
    monkeypatch.setattr(speed, "prepare", lambda model: model)
    found = speed.generation_speed({"a": ("A", None), "b": ("B", None)}, VOCABULARY, prompt=5, count=31, repeats=3)
    assert turns == ["A", "B"] * 4
    assert found["a"] == {"ttft_ms": pytest.approx(300), "tokens_per_second": pytest.approx(15)}
    assert found["b"] == {"ttft_ms": pytest.approx(400), "tokens_per_second": pytest.approx(6)}


def test_it_measures_real_models_and_refuses_what_does_not_fit(tiny_config):
    configs = {"plain": tiny_config(), "meta": tiny_config(meta_tokens=MetaTokens(rate=0.25))}
    models = {name: (build_model(c, VOCABULARY.size, jax.random.key(0)), c) for name, c in configs.items()}
    found = speed.generation_speed(models, VOCABULARY, prompt=4, count=8, repeats=1)
    assert found.keys() == models.keys()
    assert all(0 < value < float("inf") for numbers in found.values() for value in numbers.values())
    with pytest.raises(UserError, match="shorten either"):
        speed.generation_speed(models, VOCABULARY, prompt=20, count=8)
    with pytest.raises(UserError, match="at least 1 token in the prompt"):
        speed.generation_speed(models, VOCABULARY, prompt=4, count=1)
