"""Rows of task examples: the loss only on answers, the same strings for every model, and batch = f(step, seed)."""

import pickle

import numpy as np
import pytest

from metajax.config import MetaTokens, Tasks
from metajax.core.errors import UserError
from metajax.data.pipeline import derive_seed, open_corpora, read_batches, task_examples, training_batches, training_rows
from metajax.evaluation.tasks import task_batches

TASKS = Tasks(train_length=64, eval_lengths=(32, 64), eval_examples=21)
ROWS = {"tasks": TASKS, "data.tokenizer": "bpe:512+tasks", "data.sequence_length": 96}


@pytest.fixture(scope="module")
def corpora(tiny_config, paths):
    """corpora(**changes) -> the opened corpora of a tiny config with tasks."""
    return lambda **changes: open_corpora(tiny_config(**ROWS | changes), paths)


def segments(row):
    """(positions, tokens) of each segment of a row."""
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        positions = np.flatnonzero(row["segment_ids"] == segment)
        yield positions, row["tokens"][positions]


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_a_row_is_whole_examples_with_loss_on_their_answers(corpora, monkeypatch):
    monkeypatch.setattr("metajax.data.tasks.examples.TRAIN_EXAMPLES", 25)
    opened = corpora()
    vocabulary, examples = opened.tokenizer.vocabulary, task_examples(opened, derive_seed("tasks", 0))
    known = {examples.training(task, phase, n).ids.tobytes() for phase in range(5) for task in TASKS.names for n in range(5)}
    rows = training_rows(opened)
    for n in (0, 1, 11, 23, 500):
        row = rows[n]
        padding = row["segment_ids"] == 0
        assert not (row["loss_weights"][padding].any() or row["is_body"][padding].any() or row["is_metadata"].any())
        assert (row["tokens"][padding] == vocabulary.pad).all() and padding.sum() < 96 // 2
        for positions, ids in segments(row):
            np.testing.assert_array_equal(row["targets"][positions], [*ids[1:], vocabulary.eos])
            np.testing.assert_array_equal(row["positions"][positions], np.arange(len(positions)))
            text = opened.tokenizer.decode(ids)
            answer = opened.tokenizer.encode(text[text.index(" A:") + 3 :])
            asked = len(ids) - len(answer) - 1
            np.testing.assert_array_equal(row["loss_weights"][positions], [0.0] * asked + [1.0] * (len(answer) + 1))
            np.testing.assert_array_equal(row["is_body"][positions], [False] * asked + [True] * len(answer) + [False])
            assert row["targets"][positions][row["is_body"][positions]].tolist() == answer
            assert ids.tobytes() in known, "one of the seed's examples"


def test_meta_positions_are_the_pauses_and_nothing_else_differs_between_models(corpora):
    plain, meta = training_rows(corpora()), training_rows(corpora(meta_tokens=MetaTokens()))
    vocabulary = corpora().tokenizer.vocabulary
    for n in range(30):
        row = meta[n]
        positions = row.pop("meta_positions")
        same(plain[n], row)
        assert positions.shape == (96 // 8,) and positions.dtype == np.int32
        used = np.flatnonzero(row["tokens"] == vocabulary.meta)
        assert len(used) > 0
        assert positions.tolist() == [*used, *[96] * (96 // 8 - len(used))]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_batch_is_a_function_of_step_and_seed_for_any_number_of_hosts(corpora, hosts):
    whole = training_batches(corpora(meta_tokens=MetaTokens()))
    shards = [training_batches(corpora(meta_tokens=MetaTokens()), host=host, hosts=hosts) for host in range(hosts)]
    for step in (0, 5, 10**6):
        parts = [shard[step] for shard in shards]
        same({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, whole[step])
    other = training_batches(corpora(seed=1))
    assert (other[0]["tokens"] != whole[0]["tokens"]).any() and (whole[0]["tokens"] != whole[1]["tokens"]).any()


def test_resume_anywhere(corpora):
    batches = training_batches(corpora())
    resumed = read_batches(training_batches(corpora()), 4, 0)
    for step in range(4, 8):
        same(next(resumed), batches[step])


def test_rows_pickle_for_reader_processes(corpora):
    rows = training_rows(corpora())
    same(pickle.loads(pickle.dumps(rows))[7], rows[7])


def test_rows_follow_the_curriculum(corpora):
    opened = corpora(**{"training.steps": 10, "tasks.names": "copying"})
    examples, rows = task_examples(opened), training_rows(opened)
    for step in range(10):
        longest = max(len(positions) for i in range(4) for positions, _ in segments(rows[4 * step + i]))
        assert longest <= examples.longest("copying", step // 2)
    assert longest > examples.longest("copying", 2)


@pytest.mark.parametrize("meta", [None, MetaTokens()])
def test_test_rows_hold_one_example_each(corpora, meta):
    opened = corpora(meta_tokens=meta, **{"data.batch_size": 6})
    batches = task_batches(opened, "segment_counting", 64, shards=4)
    assert {batch["tokens"].shape for batch in batches} == {(8, 64)}, "6 rows of 96 positions make 9 of 64; 4 devices take 8"
    examples = [task_examples(opened).test("segment_counting", 64, n) for n in range(21)]
    rows = [{name: values[i] for name, values in batch.items()} for batch in batches for i in range(8)]
    assert len(rows) == 24 and not any(row["segment_ids"].any() or row["is_body"].any() for row in rows[21:])
    for row, example in zip(rows, examples, strict=False):
        assert row["tokens"][: len(example.ids)].tolist() == example.ids.tolist()
        assert ("meta_positions" in row) == (meta is not None)
        if meta is not None:
            np.testing.assert_array_equal(row["meta_positions"], np.flatnonzero(example.ids == opened.tokenizer.vocabulary.meta))
    same(task_batches(corpora(seed=3, meta_tokens=meta, **{"data.batch_size": 6}), "segment_counting", 64, 4)[0], batches[0])


def test_errors_name_the_remedy(tiny_config, corpora):
    for changes, message in (
        ({"tasks.train_length": 97}, r"tasks.train_length = 97: between 16 and data.sequence_length = 96"),
        ({"tasks.names": "list_recal"}, "tasks.names: unknown task 'list_recal'; did you mean 'list_recall'"),
        ({"tasks.items": 2}, "tasks.items = 2: at least 3"),
        ({"tasks.phases": "0.5,1.5"}, "tasks.phases"),
        ({"tasks.eval_lengths": "64,64"}, "different lengths"),
        ({"tasks": None, "evaluation.documents": 0}, "evaluation.documents = 0"),
        ({"model.max_positions": 40}, "model.max_positions = 40 is less than the 96"),
        ({"data.tokenizer": "bpe:512+task"}, "unknown 'task'"),
        ({"data.tokenizer": "bpe:320+tasks"}, r"a multiple of 64 from 384 on"),
    ):
        with pytest.raises(UserError, match=message):
            corpora(**changes)
    with pytest.raises(UserError, match="list_recall takes"):
        training_rows(corpora(**{"data.tokenizer": "byte"}))
