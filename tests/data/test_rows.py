"""Rows by hand, and over whole corpora: every body token is a target once, and nothing else counts as body."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metajax.config import MetaTokens
from metajax.data.encoding import Vocabulary
from metajax.data.meta_tokens import inject
from metajax.data.metadata import MetadataIds, Placement
from metajax.data.packing import MIN_PIECE, RowIndex, pack
from metajax.data.positions import Spot, after, before
from metajax.data.rows import RowSource, finish, padding_row, stack

B, E, P, M, C, D = 90, 91, 92, 93, 94, 95  # bos, eos, pad, meta, context_begin, context_end
VOCABULARY = Vocabulary(base=90, size=128, bos=B, eos=E, pad=P, meta=M, context_begin=C, context_end=D, spare=())
BODIES = ([1, 2, 3, 4], [5, 6], [], [11, 12, 13, 14, 15, 16, 17])


def metadata_ids(strings, owner=None, wrapped=True):
    """One string of ids for each document; `owner` as in MetadataIds."""
    offsets = np.cumsum([0, *map(len, strings)])
    ids = np.array([i for string in strings for i in string], np.int32)
    owner = np.arange(len(strings), dtype=np.int32) if owner is None else np.array(owner, np.int32)
    return MetadataIds(ids, offsets, owner, (C,) if wrapped else (), (D,) if wrapped else ())


def source(rows, capacity, metadata=None, bodies=BODIES, loss_weight=0.0):
    """A RowSource whose row n holds exactly the pieces rows[n], with `metadata` prepended."""
    index = RowIndex(np.array([p for row in rows for p in row], np.int32).reshape(-1, 3), np.cumsum([0, *map(len, rows)]))
    placement = Placement(() if metadata is None else ((Spot("", before, loss_weight), metadata),))
    return RowSource(index, lambda i: np.array(bodies[i], np.int32), placement, VOCABULARY, capacity)


def check(row, **expected):
    """Every array of `row` against rows of a table; bits as a string."""
    for name, values in expected.items():
        values = [int(bit) for bit in values] if isinstance(values, str) else values
        np.testing.assert_array_equal(row[name], np.array(values).astype(row[name].dtype), err_msg=name)
    types = {"tokens": "i4", "targets": "i4", "loss_weights": "f4", "segment_ids": "i4"}
    types |= dict.fromkeys(("is_body", "is_metadata", "asks_metadata"), "?")
    assert {name: values.dtype for name, values in row.items() if name != "positions"} == {
        k: np.dtype(t) for k, t in types.items()
    }


def test_a_document_in_one_row():
    row = source([[(0, 0, 5)]], 7)[0]
    check(
        finish(row, attend_across_documents=False),
        tokens=[B, 1, 2, 3, 4, P, P],
        targets=[1, 2, 3, 4, E, P, P],
        loss_weights="1111100",
        is_body="1111000",
        is_metadata="0000000",
        segment_ids="1111100",
        positions=[0, 1, 2, 3, 4, 0, 1],
    )


def test_a_document_over_two_rows():
    rows = source([[(0, 0, 3)], [(0, 3, 2)]], 3)
    assert len(rows) == 2
    check(rows[0], tokens=[B, 1, 2], targets=[1, 2, 3], loss_weights="111", is_body="111", segment_ids="111")
    check(rows[1], tokens=[3, 4, P], targets=[4, E, P], loss_weights="110", is_body="100", segment_ids="110")


def test_two_documents_in_a_row_and_an_empty_one():
    row = source([[(1, 0, 3), (2, 0, 1), (0, 2, 2)]], 7)[0]
    expected = {
        "tokens": [B, 5, 6, B, 2, 3, P],
        "targets": [5, 6, E, E, 3, 4, P],
        "loss_weights": "1111110",
        "is_body": "1100110",
        "is_metadata": "0000000",
    }
    check(finish(row, attend_across_documents=False), **expected, segment_ids="1112330", positions=[0, 1, 2, 0, 0, 1, 0])
    check(finish(row, attend_across_documents=True), **expected, segment_ids="1111110", positions=[0, 1, 2, 3, 4, 5, 0])


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_metadata_after_the_bos(weight):
    """The target of the last metadata token is the first body token; BOS and the other metadata tokens predict metadata."""
    row = source([[(1, 0, 3)]], 8, metadata_ids([[], [7, 8], [], []]), loss_weight=weight)[0]
    check(
        finish(row, attend_across_documents=False),
        tokens=[B, C, 7, 8, D, 5, 6, P],
        targets=[C, 7, 8, D, 5, 6, E, P],
        loss_weights=[weight, weight, weight, weight, 1, 1, 1, 0],
        is_body="00001100",
        is_metadata="01111000",
        segment_ids="11111110",
        positions=[0, 1, 2, 3, 4, 5, 6, 0],
    )


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_metadata_before_a_later_piece(weight):
    """The previous piece has predicted this piece's first token, so the last metadata token has no target."""
    metadata = metadata_ids([[7], [], [], []])
    rows = source([[(0, 0, 3)], [(0, 3, 2)]], 6, metadata, loss_weight=weight)
    check(
        rows[0],
        tokens=[B, C, 7, D, 1, 2],
        targets=[C, 7, D, 1, 2, 3],
        loss_weights=[weight, weight, weight, 1, 1, 1],
        is_body="000111",
        is_metadata="011100",
    )
    check(
        rows[1],
        tokens=[C, 7, D, 3, 4, P],
        targets=[7, D, 3, 4, E, P],
        loss_weights=[weight, weight, 0, 1, 1, 0],
        is_body="000100",
        is_metadata="111000",
        segment_ids="111110",
    )


def test_plain_metadata_has_no_delimiters():
    rows = source([[(1, 0, 2)], [(1, 2, 1)]], 4, metadata_ids([[], [7, 8], [], []], wrapped=False), loss_weight=0.5)
    check(rows[0], tokens=[B, 7, 8, 5], targets=[7, 8, 5, 6], loss_weights=[0.5, 0.5, 1, 1], is_body="0011", is_metadata="0110")
    check(rows[1], tokens=[7, 8, 6, P], targets=[8, 6, E, P], loss_weights=[0.5, 0, 1, 0], is_body="0000", is_metadata="1100")


def test_empty_missing_and_shuffled_metadata():
    metadata = metadata_ids([[7], [8, 9], [], []], owner=[MetadataIds.EMPTY, 0, MetadataIds.NOTHING, MetadataIds.EMPTY])
    row = source([[(0, 0, 2), (1, 0, 1), (2, 0, 1)]], 9, metadata)[0]
    check(
        row,
        tokens=[B, C, D, 1, B, C, 7, D, B],
        targets=[C, D, 1, 2, C, 7, D, 5, E],
        loss_weights="001100011",
        is_body="001100010",
        is_metadata="011001110",
        segment_ids="111122223",
    )
    np.testing.assert_array_equal(metadata.lengths(), [2, 3, 0, 2])


def test_best_fit_rows():
    """Documents of 5, 3, 1 and 8 inputs in rows of 7: 7 of the 8, then 5 + 1 + the last 1 of the 8, then 3."""
    index = pack(np.arange(4), np.array([5, 3, 1, 8]), np.zeros(4, int), 7, "best_fit")
    rows = RowSource(index, lambda i: np.array(BODIES[i], np.int32), Placement(), VOCABULARY, 7)
    tokens = [rows[n]["tokens"].tolist() for n in range(len(rows))]
    assert tokens == [[B, 11, 12, 13, 14, 15, 16], [B, 1, 2, 3, 4, B, 17], [B, 5, 6, P, P, P, P]]
    check(rows[1], targets=[1, 2, 3, 4, E, E, E], is_body="1111000", loss_weights="1111111", segment_ids="1111123")


def test_padding_rows_count_for_nothing():
    row = inject(source([[(0, 0, 5)]], 6)[0], np.random.default_rng(0), meta=MetaTokens(), count=2, meta_id=M)
    empty = padding_row(row, P)
    assert {k: v.shape for k, v in empty.items()} == {k: v.shape for k, v in row.items()}
    assert (empty["tokens"] == P).all() and (empty["targets"] == P).all()
    assert not any(empty[name].any() for name in ("loss_weights", "is_body", "is_metadata", "asks_metadata", "segment_ids"))
    np.testing.assert_array_equal(stack([row, empty])["tokens"], [row["tokens"], empty["tokens"]])


# ------------------------------------------------------------------------------------------------- whole corpora


@dataclasses.dataclass
class Corpus:
    bodies: list[list[int]]
    metadata: Placement
    capacity: int
    style: str
    meta: MetaTokens | None


def both_sides(corpus, document):
    """(ids before, ids after) of a document."""
    ids = {spot.at: ids[document] for spot, ids in corpus.metadata.parts}
    return tuple(ids.get(at, np.zeros(0, np.int32)) for at in (before, after))


@st.composite
def corpora(draw):
    """Every body token and every metadata token is unique in the corpus, so that targets can be counted."""
    lengths = draw(st.lists(st.integers(0, 80), min_size=1, max_size=12))
    starts = np.cumsum([1000, *lengths]).tolist()
    bodies = [list(range(starts[d], starts[d] + n)) for d, n in enumerate(lengths)]
    owner = st.sampled_from([MetadataIds.EMPTY, MetadataIds.NOTHING, *range(len(bodies))])
    parts = []
    weights = draw(st.sampled_from([(0.0, 1.0), (0.5, 0.25)]))
    for first, at, weight in zip((20, 30), (before, after), weights, strict=True):
        owners = draw(st.lists(owner, min_size=len(bodies), max_size=len(bodies)))
        strings = [list(range(first, first + draw(st.integers(0, 6)))) for _ in bodies]
        wrapped = draw(st.booleans())
        parts += draw(st.sampled_from([[], [(Spot("", at, weight), metadata_ids(strings, owners, wrapped))]]))
    metadata = Placement(tuple(parts), draw(st.booleans()))
    loss = draw(st.sampled_from([None, "skip_meta_targets", "real_only"]))
    meta = None if loss is None else MetaTokens(inject=draw(st.sampled_from(["random", "periodic"])), loss=loss)
    capacity = draw(st.integers(17 + MIN_PIECE, 60))
    return Corpus(bodies, metadata, capacity, draw(st.sampled_from(["concat", "best_fit", "new_document"])), meta)


def assemble(corpus, seed):
    """(row before injection, finished row) of the whole corpus."""
    documents = np.arange(len(corpus.bodies))
    overhead = corpus.metadata.overhead(documents)
    index = pack(documents, np.array([len(b) + 1 for b in corpus.bodies]), overhead, corpus.capacity, corpus.style)
    read = lambda i: np.array(corpus.bodies[i], np.int32)  # noqa: E731
    rows = RowSource(index, read, corpus.metadata, VOCABULARY, corpus.capacity)
    for n in range(len(rows)):
        plain = rows[n]
        row = plain
        if corpus.meta:
            row = inject(row, np.random.default_rng([seed, n]), meta=corpus.meta, count=6, meta_id=M)
        yield index.row(n), plain, finish(row, attend_across_documents=False)


@given(corpora(), st.integers(0, 99))
def test_every_body_token_is_a_target_once(corpus, seed):
    """If rows begin with new documents, a prefix of every document is predicted, each token once."""
    asked, ends, complete = [], 0, 0
    for pieces, _, row in assemble(corpus, seed):
        asked += row["targets"][row["is_body"]].tolist()
        assert (row["loss_weights"][row["is_body"]] == 1).all()
        whole = (row["loss_weights"] == 1) & ~row["is_body"] & ~row["asks_metadata"]
        assert (row["targets"][whole] == E).all(), "the other targets of weight 1 are ends of documents"
        ends += int(whole.sum())
        complete += sum(start + length > len(corpus.bodies[d]) for d, start, length in pieces.tolist())
    assert ends == complete
    if corpus.style == "new_document":
        assert len(set(asked)) == len(asked)
        for body in corpus.bodies:
            of_body = sorted(set(asked) & set(body))
            assert of_body == body[: len(of_body)]
            assert of_body or not body, "no document is left out whole"
    else:
        assert sorted(asked) == [token for body in corpus.bodies for token in body]
        assert ends == len(corpus.bodies)


def middle(length):
    return length // 2


@given(corpora(), st.integers(0, 6))
def test_metadata_inside_the_body_loses_no_token_of_it(corpus, size):
    """Also with metadata inside every piece: body tokens are predicted once, in order, and metadata has its weight."""
    strings = metadata_ids([list(range(40, 40 + size))] * len(corpus.bodies))
    parts = (*corpus.metadata.parts, (Spot("", middle, 0.25), strings))
    corpus = dataclasses.replace(corpus, metadata=dataclasses.replace(corpus.metadata, parts=parts), capacity=corpus.capacity + 8)
    asked = []
    for pieces, plain, row in assemble(corpus, 0):
        asked += row["targets"][row["is_body"]].tolist()
        assert (row["loss_weights"][row["is_body"]] == 1).all()
        held = plain["tokens"][plain["is_metadata"]]
        assert sum(np.isin(held, range(40, 40 + size))) == size * len(pieces)
        inside = plain["asks_metadata"] & np.isin(plain["targets"], range(40, 40 + size))
        assert (plain["loss_weights"][inside] == 0.25).all()
    if corpus.style == "new_document":
        assert len(set(asked)) == len(asked)
    else:
        assert asked == sorted(asked) or corpus.style == "best_fit"
        assert sorted(asked) == [token for body in corpus.bodies for token in body]


@given(corpora(), st.integers(0, 99))
def test_targets_are_the_next_token_of_the_document(corpus, seed):
    following = {}
    for body in filter(None, corpus.bodies):
        following |= dict(zip(body, [*body[1:], E], strict=True))
    if any(spot.at is after for spot, _ in corpus.metadata.parts):  # the last one may predict the metadata after it
        following = {token: after for token, after in following.items() if after != E}
    for pieces, _, row in assemble(corpus, seed):
        real = row["tokens"] != M
        for position in np.flatnonzero(real & (row["segment_ids"] > 0)).tolist():
            token = int(row["tokens"][position])
            if token in following:
                assert row["targets"][position] == following[token]
        firsts = {corpus.bodies[d][0] for d, start, _ in pieces.tolist() if start == 0 and corpus.bodies[d]}
        asked_first = set(row["targets"][row["is_body"]].tolist()) & {body[0] for body in corpus.bodies if body}
        assert asked_first == firsts


@given(corpora(), st.integers(0, 99))
def test_masks_cover_exactly_the_metadata(corpus, seed):
    """Metadata is every token besides BOS, EOS and body. It is whole at every piece, and its labels have the weight of their side."""
    weight_of = {spot.at: spot.loss_weight for spot, _ in corpus.metadata.parts}
    before_weight, after_weight = weight_of.get(before, 0.0), weight_of.get(after, 0.0)
    for pieces, plain, row in assemble(corpus, seed):
        tokens = plain["tokens"][plain["segment_ids"] > 0]
        is_metadata = plain["is_metadata"][plain["segment_ids"] > 0]
        np.testing.assert_array_equal(is_metadata, ~(np.isin(tokens, [B, E]) | (tokens >= 1000)))
        beside = [np.concatenate(both_sides(corpus, d)) for d, _, _ in pieces.tolist()]
        np.testing.assert_array_equal(tokens[is_metadata], np.concatenate(beside))
        asks = plain["asks_metadata"]
        following = np.append(plain["tokens"][1:], P)
        np.testing.assert_array_equal(plain["targets"][asks], following[asks])
        for segment, (document, start, length) in enumerate(pieces.tolist(), 1):
            prepended, appended = both_sides(corpus, document)
            inside = plain["segment_ids"] == segment
            weights = plain["loss_weights"][inside & asks].tolist()
            asked = plain["targets"][inside & asks].tolist()
            first = 0 if start == 0 and corpus.metadata.outside else 1  # the first token of a row has nobody to ask for it
            skipped = 0 if start + length > len(corpus.bodies[document]) else 1  # the last text asks for text
            assert asked == prepended[first:].tolist() + appended[skipped:].tolist()
            assert weights == [before_weight] * len(prepended[first:]) + [after_weight] * len(appended[skipped:])
        real = row["tokens"] != M
        np.testing.assert_array_equal(row["is_metadata"][real], plain["is_metadata"])
        assert not row["is_metadata"][~real].any()
        assert not row["loss_weights"][row["segment_ids"] == 0].any()


@given(corpora(), st.integers(0, 99))
def test_metadata_after_the_text_changes_nothing_before_it(corpus, seed):
    """The inputs of a body token are the same with and without metadata after the text of its piece."""
    alone = dataclasses.replace(corpus.metadata, parts=tuple(part for part in corpus.metadata.parts if part[0].at is before))
    for pieces, plain, _ in assemble(corpus, seed):
        rows = [tuple(map(int, piece)) for piece in pieces]
        for segment, piece in enumerate(rows, 1):
            index = RowIndex(np.array([piece], np.int32), np.array([0, 1]))
            without = RowSource(index, lambda i: np.array(corpus.bodies[i], np.int32), alone, VOCABULARY, corpus.capacity)[0]
            own = plain["segment_ids"] == segment
            last = np.flatnonzero(plain["is_body"][own]).max(initial=-1) + 1
            for name in ("tokens", "is_body"):
                np.testing.assert_array_equal(plain[name][own][:last], without[name][:last])
            np.testing.assert_array_equal(plain["targets"][own][:last], without["targets"][:last])


@given(corpora(), st.integers(0, 99))
def test_positions_count_from_the_start_of_each_segment(corpus, seed):
    for pieces, _, row in assemble(corpus, seed):
        assert set(row["segment_ids"].tolist()) - {0} == set(range(1, len(pieces) + 1))
        for segment in set(row["segment_ids"].tolist()):
            inside = np.flatnonzero(row["segment_ids"] == segment)
            np.testing.assert_array_equal(inside, np.arange(inside[0], inside[-1] + 1))
            np.testing.assert_array_equal(row["positions"][inside], np.arange(len(inside)))
