"""Metadata: templates, which documents keep theirs, and the shuffled control."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metajax.config import Metadata
from metajax.core.errors import UserError
from metajax.data.metadata import MetadataIds, check_fields, delimiters, owners, render, template_fields, uniform_hash
from metajax.data.tokenizers import Bytes

EMPTY, NOTHING = MetadataIds.EMPTY, MetadataIds.NOTHING
DOCUMENTS = np.arange(20_000)
HAS = np.ones(20_000, bool)


# ------------------------------------------------------------------------------------------------------ templates


def test_templates():
    assert template_fields("{topic}: {url} ({topic}) {{literal}}") == ("topic", "url", "topic")
    assert render("{topic}: {{x}} {url}", {"topic": ["a{b}"], "url": ["c"]}) == ["a{b}: {x} c"]
    assert render("{url:>4}|", {"url": ["c"]}) == ["   c|"]
    assert render("{topic} {url}", {"topic": ["a", "b"], "url": [None, "c"]}) == [None, "b c"]
    assert render("{url}", {"url": [""]}) == [""]
    assert render("{meta.url|host} {0}", {"meta.url": ["http://a.b/c"], "0": ["x"]}) == ["a.b x"]
    assert render('{"og:title":>3}{{{"a{b}"|or_unknown}}}', {"og:title": ["t"], "a{b}": [None]}) == ["  t{unknown}"]
    assert render("{url|host}, {score|tenths}", {"url": ["http://a.b/c", "/c"], "score": ["2.71", "3"]}) == ["a.b, 27", None]


@pytest.mark.parametrize(
    "template",
    [
        "",
        "plain text",
        "{{url}}",
        "{url",
        "url}",
        "{}",
        "{} {url}",
        "{url:d}",
        "{url!x}",
        "{url[0]}",
        "{url.host}",
        "{url:{size}}",
        '{"url}',
        '{ur"l}',
        "{og:title}",
        '{"url"x}',
    ],
)
def test_a_template_that_cannot_be_filled_in_is_refused(template):
    with pytest.raises(UserError, match=r"metadata\.template = "):
        check_fields(template, {"url", "topic"}, "jsonl:x")


def test_an_unknown_field_names_the_nearest_and_what_there_is():
    check_fields("{url} {topic}", {"url", "topic"}, "jsonl:x")
    with pytest.raises(UserError, match=r"jsonl:x has no field 'topik'; did you mean 'topic'\?; it has topic, url"):
        check_fields("{url} {topik}", {"url", "topic"}, "jsonl:x")
    with pytest.raises(UserError, match="no field 'url'; it has none"):
        check_fields("{url}", set(), "jsonl:x")
    check_fields("{url|host|top100}", {"url"}, "jsonl:x")
    with pytest.raises(UserError, match="filter 'hots' is unknown; did you mean 'host'"):
        check_fields("{url|hots}", {"url"}, "jsonl:x")


def test_delimiters():
    tokenizer = Bytes()
    vocabulary = tokenizer.vocabulary
    assert delimiters(Metadata(), tokenizer) == ((vocabulary.context_begin,), (vocabulary.context_end,))
    assert delimiters(Metadata(wrap="plain"), tokenizer) == ((), ())


# --------------------------------------------------------------------------------------------------- keep or drop


def test_uniform_hash_is_uniform_and_independent_between_seeds():
    columns = [uniform_hash(seed, DOCUMENTS) for seed in (0, 1, 2, 12345)]
    for values in columns:
        assert values.min() >= 0 and values.max() < 1
        counts = np.histogram(values, 20, (0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # 0.999 quantile of chi-square with 19 degrees
    for i in range(4):
        for j in range(i):
            assert abs(np.corrcoef(columns[i], columns[j])[0, 1]) < 0.03  # four standard errors


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 99])
def test_share_of_documents_that_keep_metadata(keep, seed):
    owner = owners(Metadata(keep=keep), "training", HAS, DOCUMENTS, seed)
    kept = owner >= 0
    assert abs(kept.mean() - keep) <= 4 * np.sqrt(keep * (1 - keep) / len(DOCUMENTS))
    np.testing.assert_array_equal(owner[kept], DOCUMENTS[kept])
    assert (owner[~kept] == EMPTY).all()


@given(st.permutations(range(30)), st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_keep_depends_on_seed_and_document_alone(order, used, seed):
    has = np.ones(30, bool)
    some = np.array(order[:used], np.int64)
    whole = owners(Metadata(keep=0.5), "training", has, np.arange(30), seed)
    part = owners(Metadata(keep=0.5), "training", has, some, seed)
    np.testing.assert_array_equal(part[some], whole[some])
    assert (part[np.setdiff1d(np.arange(30), some)] == NOTHING).all(), "unused documents have no metadata"


def test_two_seeds_drop_different_documents():
    kept = [owners(Metadata(keep=0.5), "training", HAS, DOCUMENTS, seed) >= 0 for seed in (0, 1)]
    assert 0.47 < (kept[0] == kept[1]).mean() < 0.53


@pytest.mark.parametrize("wrap", ["special_tokens", "plain"])
@pytest.mark.parametrize("when_dropped", ["empty", "nothing"])
def test_what_a_document_without_metadata_gets(wrap, when_dropped):
    recipe = Metadata(keep=1.0, wrap=wrap, when_dropped=when_dropped)
    has = np.array([True, False, True])
    dropped = EMPTY if (wrap, when_dropped) == ("special_tokens", "empty") else NOTHING
    for condition in ("training", "right"):
        np.testing.assert_array_equal(owners(recipe, condition, has, np.arange(3), 0), [0, dropped, 2])
    np.testing.assert_array_equal(owners(recipe, "shuffled", has, np.arange(3), 0), [2, dropped, 0])
    np.testing.assert_array_equal(owners(recipe, "none", has, np.arange(3), 0), [NOTHING] * 3)


def test_shuffling_gives_every_document_another_string():
    strings = np.array([5, 5, 7, 9, 7, 5, 9, 7, 1, 2])
    owner = owners(Metadata(), "shuffled", np.ones(10, bool), np.arange(10), 0, strings)
    assert sorted(owner.tolist()) == list(range(10))
    assert (strings[owner] != strings).all()


@pytest.mark.parametrize("when_dropped", ["empty", "nothing"])
def test_the_empty_condition_gives_the_pair_of_delimiters(when_dropped):
    """Also for a recipe whose dropped documents get no delimiters."""
    owner = owners(Metadata(when_dropped=when_dropped), "empty", np.array([True, False]), np.arange(2), 0)
    ids = MetadataIds(np.zeros(0, np.int32), np.zeros(3, np.int64), owner, (7,), (8,))
    assert [ids[i].tolist() for i in range(2)] == [[7, 8]] * 2 and ids.lengths().tolist() == [2, 2]
    plain = MetadataIds(np.zeros(0, np.int32), np.zeros(3, np.int64), owner, (), ())
    assert [ids.tolist() for ids in (plain[0], plain[1])] == [[], []] and plain.lengths().tolist() == [0, 0]


def test_position_none_trains_without_and_can_be_shown_metadata():
    recipe = Metadata(position="none")
    assert (owners(recipe, "training", HAS, DOCUMENTS, 0) == NOTHING).all()
    np.testing.assert_array_equal(owners(recipe, "right", HAS, DOCUMENTS, 0), DOCUMENTS)


# ------------------------------------------------------------------------------------------------ shuffled control


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.randoms())
def test_the_shuffled_control_is_a_permutation_without_fixed_points(has, random):
    has = np.array(has)
    documents = np.array(random.sample(range(len(has)), random.randint(1, len(has))))
    sharing = documents[has[documents]]
    if len(sharing) == 1:
        with pytest.raises(UserError, match="two documents"):
            owners(Metadata(), "shuffled", has, documents, 0)
        return
    owner = owners(Metadata(), "shuffled", has, documents, 0)
    assert Counter(owner[sharing].tolist()) == Counter(sharing.tolist()), "the same strings as a set, each once"
    assert (owner[sharing] != sharing).all(), "no document keeps its own string"
    assert (owner[documents[~has[documents]]] == EMPTY).all()


def test_ids_and_lengths_of_another_documents_metadata():
    ids = MetadataIds(np.arange(6, dtype=np.int32), np.array([0, 1, 3, 6]), np.array([2, 0, EMPTY], np.int32), (7,), (8, 9))
    assert [ids[i].tolist() for i in range(3)] == [[7, 3, 4, 5, 8, 9], [7, 0, 8, 9], [7, 8, 9]]
    assert ids.lengths().tolist() == [6, 4, 3]
    assert all(ids[i].dtype == np.int32 for i in range(3))
