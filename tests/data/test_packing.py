"""The row index: nothing lost, nothing repeated, no row too long; best-fit compared with slow implementations and grain's."""

import grain
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metajax.core.errors import UserError
from metajax.data.packing import MIN_PIECE, pack

STYLES = ("concat", "best_fit")


@st.composite
def corpora(draw, with_metadata=True):
    """(documents, inputs, overhead, capacity), overheads as large as a row allows."""
    capacity = draw(st.integers(1, 70))
    most = max(0, capacity - MIN_PIECE) if with_metadata else 0
    pairs = draw(st.lists(st.tuples(st.integers(1, 3 * capacity), st.integers(0, most)), max_size=40))
    documents = np.array(draw(st.permutations(range(5, 5 + len(pairs)))), np.int64)
    inputs, overhead = np.array(pairs, np.int64).reshape(-1, 2).T
    return documents, inputs, overhead, capacity


def one_row(total, capacity=32):
    return np.array([5]), np.array([total]), np.array([0]), capacity


def fills(index, documents, overhead):
    """Used positions of each row, with the metadata of every piece."""
    extra = dict(zip(documents.tolist(), overhead.tolist(), strict=True))
    return [sum(length + extra[document] for document, _, length in index.row(n).tolist()) for n in range(len(index))]


@pytest.mark.parametrize("style", STYLES)
@given(corpora())
@example(one_row(1, 1))
@example(one_row(64))
@example(one_row(65))
def test_every_input_is_in_one_piece_and_no_row_is_too_long(style, corpus):
    documents, inputs, overhead, capacity = corpus
    index = pack(documents, inputs, overhead, capacity, style)
    assert index.pieces.dtype == np.int32 and index.offsets.dtype == np.int64
    assert index.offsets[0] == 0 and index.offsets[-1] == len(index.pieces)
    assert np.all(np.diff(index.offsets) > 0), "no row is empty"
    reached = dict.fromkeys(documents.tolist(), 0)
    order = np.argsort(index.pieces[:, 1], kind="stable") if style == "best_fit" else np.arange(len(index.pieces))
    for document, start, length in index.pieces[order].tolist():
        assert length >= 1 and start == reached[document]
        reached[document] += length
    assert reached == dict(zip(documents.tolist(), inputs.tolist(), strict=True))
    assert all(0 < used <= capacity for used in fills(index, documents, overhead))


@pytest.mark.parametrize("style", STYLES)
@given(corpora())
def test_a_piece_after_metadata_has_a_least_length(style, corpus):
    documents, inputs, overhead, capacity = corpus
    total = dict(zip(documents.tolist(), inputs.tolist(), strict=True))
    extra = dict(zip(documents.tolist(), overhead.tolist(), strict=True))
    for document, start, length in pack(documents, inputs, overhead, capacity, style).pieces.tolist():
        assert not extra[document] or length >= MIN_PIECE or start + length == total[document]


@given(corpora(with_metadata=False))
def test_concat_without_metadata_pads_only_the_last_row(corpus):
    documents, inputs, overhead, capacity = corpus
    index = pack(documents, inputs, overhead, capacity, "concat")
    assert all(used == capacity for used in fills(index, documents, overhead)[:-1])
    np.testing.assert_array_equal(
        index.pieces[:, 0][np.append(True, np.diff(index.pieces[:, 0]) != 0)[: len(index.pieces)]], documents
    )


@given(corpora())
def test_concat_leaves_no_more_room_than_the_next_piece_asks_for(corpus):
    documents, inputs, overhead, capacity = corpus
    total = dict(zip(documents.tolist(), inputs.tolist(), strict=True))
    extra = dict(zip(documents.tolist(), overhead.tolist(), strict=True))
    index = pack(documents, inputs, overhead, capacity, "concat")
    used = fills(index, documents, overhead)
    for n in range(1, len(index)):
        document, start, _ = index.row(n)[0].tolist()
        smallest = min(MIN_PIECE if extra[document] else 1, total[document] - start)
        assert capacity - used[n - 1] < extra[document] + smallest


@given(corpora())
def test_best_fit_never_cuts_what_fits_and_cuts_the_rest_into_full_rows(corpus):
    documents, inputs, overhead, capacity = corpus
    index = pack(documents, inputs, overhead, capacity, "best_fit")
    for document, total, extra in zip(documents.tolist(), inputs.tolist(), overhead.tolist(), strict=True):
        lengths = sorted(index.pieces[index.pieces[:, 0] == document, 2].tolist(), reverse=True)
        room = capacity - extra
        assert lengths == [room] * (total // room) + [total % room] * (total % room > 0)
        assert len(lengths) == 1 or total > room


def naive_best_fit_decreasing(sizes, capacity):
    """The rows as sorted lists of sizes: each size, largest first, goes into the fullest row that takes it."""
    rows = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            rows.append([size])
    return rows


@given(st.integers(1, 60).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=50))))
@example((10, [5, 4, 3, 2, 5, 6]))
def test_best_fit_is_best_fit_decreasing(case):
    capacity, sizes = case
    index = pack(np.arange(len(sizes)), np.array(sizes, np.int64), np.zeros(len(sizes), np.int64), capacity, "best_fit")
    ours = [index.row(n)[:, 2].tolist() for n in range(len(index))]
    assert sorted(map(sum, ours)) == sorted(map(sum, naive_best_fit_decreasing(sizes, capacity)))


def grain_rows(packer, lengths, capacity):
    """The documents of each row of a grain packer; grain numbers segments inside a row, so ids are part of the element."""
    elements = [{"document": np.full(n, i + 1, np.int32)} for i, n in enumerate(lengths)]
    source = grain.MapDataset.source(elements).to_iter_dataset()
    if packer is grain.experimental.ConcatThenSplitIterDataset:
        rows = packer(source, length_struct={"document": capacity})
    else:
        rows = packer(source, length_struct={"document": capacity}, num_packing_bins=len(lengths), shuffle_bins=False)
    return [row["document"] for row in rows]


def log_normal_lengths(seed, capacity, count=150):
    return np.clip(np.random.default_rng(seed).lognormal(np.log(capacity / 4), 0.8, count).astype(int), 1, capacity)


@pytest.mark.parametrize("seed", range(3))
def test_best_fit_against_grain(seed):
    capacity, lengths = 64, log_normal_lengths(seed, 64)
    ours = pack(np.arange(150), lengths, np.zeros(150, int), capacity, "best_fit")
    first_fit = grain_rows(grain.experimental.FirstFitPackIterDataset, lengths, capacity)
    assert -(-int(lengths.sum()) // capacity) <= len(ours) <= len(first_fit)
    sorted_best_fit = grain_rows(grain.experimental.BestFitPackIterDataset, np.sort(lengths)[::-1], capacity)
    used = sorted(int((row > 0).sum()) for row in sorted_best_fit)
    assert sorted(fills(ours, np.arange(150), np.zeros(150, int))) == used


@pytest.mark.parametrize("seed", range(3))
def test_concat_against_grain(seed):
    capacity, lengths = 40, log_normal_lengths(seed, 100)
    ours = pack(np.arange(150), lengths, np.zeros(150, int), capacity, "concat")
    theirs = grain_rows(grain.experimental.ConcatThenSplitIterDataset, lengths, capacity)
    assert len(ours) == len(theirs)
    for n, row in enumerate(theirs):
        np.testing.assert_array_equal(np.repeat(ours.row(n)[:, 0] + 1, ours.row(n)[:, 2]), row[row > 0])


@pytest.mark.parametrize("style", STYLES)
@given(corpora())
def test_packing_is_deterministic(style, corpus):
    first, second = pack(*corpus, style), pack(*corpus, style)
    np.testing.assert_array_equal(first.pieces, second.pieces)
    np.testing.assert_array_equal(first.offsets, second.offsets)


@pytest.mark.parametrize("style", STYLES)
def test_no_documents_make_no_rows(style):
    empty = np.zeros(0, np.int64)
    assert len(pack(empty, empty, empty, 32, style)) == 0


@pytest.mark.parametrize("style", STYLES)
def test_metadata_that_leaves_no_room_is_named(style):
    documents, inputs = np.array([3, 8]), np.array([4, 90])
    pack(documents, inputs, np.array([0, 64 - MIN_PIECE]), 64, style)
    with pytest.raises(UserError, match=r"document 8: 49 metadata tokens.*row of 64; choose a shorter metadata.template"):
        pack(documents, inputs, np.array([0, 65 - MIN_PIECE]), 64, style)


@pytest.mark.parametrize("style", STYLES)
def test_a_row_shorter_than_the_smallest_piece_holds_text_without_metadata(style):
    documents, inputs = np.arange(2), np.array([20, 3])
    assert len(pack(documents, inputs, np.zeros(2, int), 8, style)) == 3
    with pytest.raises(UserError, match="document 1: 1 metadata tokens"):
        pack(documents, inputs, np.array([0, 1]), 8, style)
