"""The generated corpus: its samples, and best possible losses that agree with information theory."""

import numpy as np
import pytest

from metajax.core.errors import UserError
from metajax.data.sources import open_source
from metajax.data.sources.generated import GROUPS, LENGTH, SOURCES, SYMBOLS, best_nats, draw, successors


@pytest.fixture(scope="module")
def drawn():
    """(sources, symbols) of 4,000 documents."""
    return tuple(np.array(part) for part in zip(*(draw(i) for i in range(4_000)), strict=True))


def test_documents_follow_the_table(drawn):
    sources, symbols = drawn
    assert symbols.shape == (4_000, LENGTH) and symbols.min() == 0 and symbols.max() == SYMBOLS - 1
    np.testing.assert_allclose(successors().sum(-1), 1)
    counts = np.zeros((SOURCES, SYMBOLS, SYMBOLS))
    np.add.at(counts, (sources[:, None], symbols[:, :-1], symbols[:, 1:]), 1)
    expected = successors() * counts.sum(-1, keepdims=True)
    assert (np.abs(counts - expected) < 5.5 * np.sqrt(expected + 1)).all()


def test_knowing_the_source_saves_the_logarithm_of_their_number(drawn):
    """A whole document reveals its source. Knowing the source in advance saves ln 16 nats in all, the group ln 4."""
    nats = {known: best_nats(*drawn, known) for known in ("nothing", "group", "source")}
    for known, values in (("group", GROUPS), ("source", SOURCES)):
        gain = (nats["nothing"] - nats[known]).sum(1)
        assert gain.max() <= np.log(values) + 1e-9, "never more than the entropy of the known value"
        assert gain.mean() == pytest.approx(np.log(values), abs=1e-3)
        per_position = (nats["nothing"] - nats[known]).mean(0)
        assert per_position[1:4].min() > 0.1 > 0.02 > np.abs(per_position[-12:]).max(), "early in the document, not late"
    rows = -(successors() * np.log(successors())).sum(-1)
    assert nats["source"][:, 1:].mean() == pytest.approx(rows.mean(), abs=0.02)


def test_the_published_values_of_such_a_corpus(drawn):
    """The paper's 1.244, 1.201 and 1.157 nats per symbol come from another table of the same kind."""
    means = [best_nats(*drawn, known).mean() for known in ("nothing", "group", "source")]
    np.testing.assert_allclose(means, [1.244, 1.201, 1.157], atol=0.02)


def test_as_a_source(tmp_path):
    source = open_source("generated:50", cache_dir=tmp_path, data_dir=None)
    first = source[3]
    assert len(source) == 50 and len(first.text) == LENGTH and set(first.text) <= set("abcdefghijklmnop")
    assert first == source[3] and first.metadata.keys() == {"source", "group"} and first.origin == "document 3"
    assert ord(first.metadata["source"]) % GROUPS == (ord("A") + int(first.metadata["group"])) % GROUPS
    other = open_source("generated:51", cache_dir=tmp_path, data_dir=None)
    assert other[3] == first and other.fingerprint() != source.fingerprint()
    with pytest.raises(IndexError):
        source[50]
    for spec in ("generated:many", "generated:0", "generated?text=x"):
        with pytest.raises(UserError, match="generated"):
            open_source(spec, cache_dir=tmp_path, data_dir=None)
