"""Metadata in rows, set by the config: dropped and counted, learnable tokens, the control, phases of a run."""

import json
from collections import Counter

import numpy as np
import pytest

from metajax.config import Metadata
from metajax.core.errors import UserError
from metajax.data import pipeline
from metajax.data.pipeline import open_corpora, training_batches, training_rows
from metajax.data.rows import stack
from metajax.evaluation.validation import check_validation
from metajax.runs.pace import Counts
from metajax.training.text import positions_of


def test_rows_of_new_documents_report_the_tokens_left_out(tiny_config, paths):
    corpora = open_corpora(tiny_config(**{"data.packing": "new_document", "data.sequence_length": 40}), paths)
    [cache], notes = corpora.caches, []
    train = cache.documents("train", corpora.config.data.validation_share)
    source = pipeline.packed_rows(corpora, cache, "training", train, "new_document", notes.append)
    rows = [source[n] for n in range(len(source))]
    assert all(row["tokens"][0] == corpora.tokenizer.vocabulary.bos for row in rows)
    total = int(cache.lengths[train].sum()) + len(train)
    left_out = total - sum(int((row["segment_ids"] > 0).sum()) for row in rows)
    assert 0 < left_out < total
    assert notes == [
        f"{corpora.config.data.sources[0]}: data.packing=new_document leaves out {left_out:,} of {total:,} tokens, the rest of "
        "documents that the end of a row cuts"
    ]


def test_metadata_too_long_for_a_row_is_dropped_and_counted_or_refused(tiny_config, tiny_corpus, paths):
    """The longest module names do not fit beside 16 tokens of text and are dropped whole."""
    names = [json.loads(line)["module"] for line in tiny_corpus.read_text().splitlines()]
    changes = {"data.sequence_length": 26, "data.batch_size": 1, "metadata": Metadata(template="{module}", keep=1.0)}
    too_long = r"document .*corpus\.jsonl, line \d+: \d+ metadata tokens, which leaves no room .* metadata\.too_long=drop"
    with pytest.raises(UserError, match=too_long):
        training_rows(open_corpora(tiny_config(**changes), paths))
    corpora = open_corpora(tiny_config(**changes, **{"metadata.too_long": "drop"}), paths)
    train = corpora.caches[0].documents("train", corpora.config.data.validation_share).tolist()
    long = [i for i in train if len(names[i]) > 26 - 16 - 2]
    notes, vocabulary = [], corpora.tokenizer.vocabulary
    rows = training_rows(corpora, notes.append)
    check_validation(corpora)
    with pytest.raises(UserError, match="leaves no room"):
        check_validation(
            open_corpora(tiny_config(**changes, **{"evaluation.conditions": "right", "evaluation.documents": 20}), paths)
        )
    [note] = notes
    assert f"the metadata of {len(long)} of {len(train)} documents (training) takes more than the 10 tokens" in note
    assert note.endswith(f"first that of document {long[0]}") and 0 < len(long) < len(train)
    shown = set()
    for n in range(400):
        tokens = rows[n]["tokens"].tolist()
        for at in (i for i, token in enumerate(tokens) if token == vocabulary.context_begin):
            shown.add(bytes(tokens[at + 1 : tokens.index(vocabulary.context_end, at)]).decode())
    assert shown == {names[i] for i in train if i not in long} | {""}, "metadata is complete or absent"


@pytest.mark.parametrize("position", ["prepend", "append", "both"])
def test_tokens_are_counted_exactly_body_and_metadata_apart(tiny_config, tiny_corpus, paths, position):
    """In an epoch of rows that cut no document, the run's counts equal those of the file."""
    recipe = Metadata(template="{topic}", position=position, keep=1.0)
    corpora = open_corpora(tiny_config(metadata=recipe, **{"data.sequence_length": 600, "data.packing": "best_fit"}), paths)
    [cache], counts = corpora.caches, Counts()
    documents = [json.loads(line) for line in tiny_corpus.read_text().splitlines()]
    train = [documents[i] for i in cache.documents("train", 0.2)]
    rows = pipeline.phase_rows(corpora, 0)
    for n in range(len(rows)):
        counts.update(positions_of(stack([rows[n]])))
    body, sides = sum(len(d["text"]) for d in train), 1 + (position == "both")
    metadata = sides * sum(len(d["topic"]) + 2 for d in train)
    appended = 0 if position == "prepend" else metadata // sides  # the delimiters are asked for, too
    expected = {"positions": 600 * len(rows), "body": body, "metadata": metadata, "loss_tokens": body + appended + len(train)}
    expected |= {"padding": 600 * len(rows) - body - metadata - len(train), "meta_tokens": 0}
    assert counts == expected and len(rows) > 3
    assert cache.manifest["tokens"] == cache.manifest["bytes"] == sum(len(d["text"]) for d in documents)


@pytest.mark.parametrize("position", ["prepend", "append"])
def test_learnable_tokens_are_the_same_for_all_documents(tiny_config, paths, position):
    recipe = Metadata(position=position, tokens=5, keep=0.5)
    corpora = open_corpora(tiny_config(metadata=recipe, **{"data.sequence_length": 48, "data.batch_size": 60}), paths)
    vocabulary = corpora.tokenizer.vocabulary
    batch = training_batches(corpora)[0]
    shown = Counter()
    for tokens in batch["tokens"].tolist():
        for at in (i for i, token in enumerate(tokens) if token == vocabulary.context_begin):
            shown[tuple(tokens[at + 1 : tokens.index(vocabulary.context_end, at)])] += 1
    assert set(shown) == {(), vocabulary.spare[:5]} and min(shown.values()) > 20
    weight = 1.0 if position == "append" else 0.0
    assert set(batch["loss_weights"][batch["asks_metadata"]]) == {weight}


def test_the_control_in_training_exchanges_metadata_at_random(tiny_config, paths):
    """The set of strings is the same, and a document keeps its own at the rate of chance."""
    source = {}
    for assigned in ("own", "shuffled"):
        recipe = Metadata(template="{topic}", keep=1.0, assigned=assigned, wrap="plain")
        corpora = open_corpora(tiny_config(metadata=recipe, **{"data.sequence_length": 48}), paths)
        [cache] = corpora.caches
        train = cache.documents("train", corpora.config.data.validation_share)
        side = pipeline._placement(corpora, cache, "training", train, pytest.fail).parts[0][1]
        source[assigned] = [side[int(i)].tobytes() for i in train]
    own, shuffled = source["own"], source["shuffled"]
    assert Counter(own) == Counter(shuffled)
    met = np.mean([a == b for a, b in zip(own, shuffled, strict=True)])
    chance = sum((n / len(own)) ** 2 for n in Counter(own).values())
    assert abs(met - chance) < 4 * np.sqrt(chance / len(own)), "some documents keep their own string by chance"


def unstack(batches):
    return [{name: values[i] for name, values in batch.items()} for batch in batches for i in range(len(batch["tokens"]))]


def texts_of(rows):
    """{a document's tokens: whether it had metadata}, from rows with whole documents."""
    shown = {}
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            own = row["segment_ids"] == segment
            shown[row["tokens"][own & ~row["is_metadata"]].tobytes()] = bool(row["is_metadata"][own].any())
    return shown


@pytest.mark.parametrize("switch", [{"unseen": 0.4}, {"metadata": "none"}, {"metadata": "none", "unseen": 0.4}])
def test_phases_read_their_own_documents_with_metadata_or_without(tiny_config, paths, switch):
    """Best-fit rows of 512 positions cut no document, and 20 steps are an epoch of either phase."""
    changes = {
        "data.sequence_length": 512,
        "data.packing": "best_fit",
        "training.steps": 40,
        "data.switch": {"step": 20, **switch},
    }
    corpora = open_corpora(tiny_config(metadata=Metadata(template="{topic}", keep=1.0), **changes), paths)
    [cache], batches, bos = corpora.caches, training_batches(corpora), corpora.tokenizer.vocabulary.bos
    train = cache.documents("train", corpora.config.data.validation_share)
    everything = {np.array([bos, *cache[int(i)]], np.int32).tobytes() for i in train}
    before, after = (texts_of(unstack([batches[n] for n in steps])) for steps in (range(20), range(20, 40)))
    assert all(before.values()) and set(after.values()) == {switch.get("metadata") != "none"}
    assert before.keys() | after.keys() == everything
    if "unseen" in switch:
        assert not before.keys() & after.keys()
        assert abs(len(after) / len(everything) - 0.4) < 4 * np.sqrt(0.24 / len(everything))
    else:
        assert before.keys() == after.keys()
