"""The speed of the input pipeline: all of its parts are counted and measured."""

import itertools

from metajax.data.pipeline import open_corpora, training_batches
from metajax.reporting import feeding as module
from metajax.reporting.feeding import feeding, rate


def test_rates_are_tokens_per_second(monkeypatch):
    seconds, asked = itertools.count(100.0, 0.5), []
    monkeypatch.setattr(module.time, "process_time", lambda: next(seconds))
    assert rate(lambda n: asked.append(n) or 7, 2.0) == 3 * 7 / 2.0 and asked == [0, 1, 2, 3]


def test_reading_rows_and_tokenising(tiny_config, paths, monkeypatch):
    corpora = open_corpora(tiny_config(), paths)
    monkeypatch.setattr(module, "rate", lambda read, seconds: read(2))
    cache, found = corpora.caches[0], feeding(corpora)
    train = cache.lengths[cache.documents("train", corpora.config.data.validation_share)]
    assert found["rows"] == training_batches(corpora)[2]["tokens"].size == 4 * 32
    assert len(train) < module.CHUNK and found["tokenising"] == train.sum()
    assert found["reading"] in train
