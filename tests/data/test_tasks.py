"""Examples of the tasks: a solver that reads only the prompt finds the answer; correct lengths, pauses, split and curriculum."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metajax.config import Tasks
from metajax.core.errors import UserError
from metajax.data.tasks import is_test
from metajax.data.tasks import task as registered
from metajax.data.tasks.examples import Examples, phase_of
from metajax.data.tasks.prompts import LISTS, MARK, PAUSE, RESERVED_PIECES, TEXT
from metajax.data.tokenizers import Bytes, Gpt2, train_bpe

TEXTS = ["The old fox runs to the level; it is 3 o'clock.\n"]
RANKS = {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), b" t", b" to", b"an", b"la"])}
TOKENIZERS = {"bpe": train_bpe("bpe:512+tasks", TEXTS), "byte": Bytes(), "gpt2": Gpt2("gpt2:tiny", RANKS)}
ROOM = {"bpe": (64, 128), "byte": (300, 600), "gpt2": (300, 600)}  # a bin and the longest in training
PROMPTED = ("list_recall", "segment_counting", "parity", "copying", "needle")
KINDS = (*PROMPTED, "mqar")  # which has no words
PROPERTY = settings(deadline=None, max_examples=40)


def solve(prompt):
    """The answer to a prompt in words, from only its text; `_PAUSE_` or | marks the positions."""
    text = prompt.replace(MARK, f" {PAUSE}")
    lines = {}
    body, question = text.split("\nQ: ")
    for line in body.split("\n"):
        name, _, words = line.partition(":")
        if name != "Text" or "[" in words:
            lines[name] = words.split()
    if item := re.fullmatch(r"item (\d+) of (\w+)\? A:", question):
        words = lines[item[2]]
        if PAUSE in body:
            assert words.pop() == PAUSE and PAUSE not in body.replace(f" {PAUSE}", "", 1)
        return f" {words[int(item[1]) - 1]}"
    if counted := re.fullmatch(r"how many (\w+) between pauses\? A:", question):
        [words] = [words for words in lines.values() if PAUSE in words]
        first, second = (i for i, word in enumerate(words) if word == PAUSE)
        return f" {words[first:second].count(counted[1])}"
    if question == "xor before pause? A:":
        bits = [int(bit) for bit in lines["Bits"][: lines["Bits"].index(PAUSE)]]
        return f" {int(np.bitwise_xor.reduce(bits))}"
    assert question == "copy the span. A:"
    [span] = re.findall(rf"\[ {PAUSE}((?: \w+)+) {PAUSE}\]", text)
    return span


def examples(kind="bpe", seed=0, **changes):
    low, high = ROOM[kind]
    return Examples(
        Tasks(**{"names": KINDS, "train_length": high, "eval_lengths": (low, high), **changes}), TOKENIZERS[kind], seed
    )


MADE = {(kind, placement): examples(kind, placement=placement) for kind in TOKENIZERS for placement in ("deliberate", "none")}


def shown(made, ids):
    """Ids in words."""
    return made.tokenizer.decode(ids).replace("<|meta|>", f" {PAUSE}")


def drawn_lines(made, n):
    """The lines of a test example, neutral text included."""
    return [line.split() for line in made.test("needle", 128, n).text.split("\nQ: ")[0].split("\n")]


# ----------------------------------------------------------------------------------------------------- what is asked


@PROPERTY
@given(st.sampled_from(sorted(MADE)), st.sampled_from(PROMPTED), st.integers(0, 10**6), st.integers(-2, 4))
def test_a_solver_finds_the_answer_in_the_prompt(which, task, n, part):
    """part: a phase, or a bin counted from the end; either limits the length of the example."""
    made = MADE[which]
    length = None if part >= 0 else made.tasks.eval_lengths[part]
    example = made.test(task, length, n) if length else made.training(task, part, n)
    size = example.answers.sum()
    prompt, answer = (shown(made, ids) for ids in (example.ids[1:-size], example.ids[-size:]))
    assert solve(prompt) == answer
    assert (prompt + answer == example.text) == (which[1] == "deliberate" or task == "needle")
    assert example.ids[0] == made.tokenizer.vocabulary.bos and example.targets[-1] == made.tokenizer.vocabulary.eos
    assert example.targets[:-1].tolist() == example.ids[1:].tolist()
    assert np.flatnonzero(example.asked).tolist() == list(range(len(example.ids) - size - 1, len(example.ids)))
    assert len(example.ids) <= (length or made.longest(task, part))
    assert length is None or len(example.ids) > length // 2


@pytest.mark.parametrize("task", KINDS)
def test_an_example_is_a_function_of_its_number_alone(task):
    made, again = examples(), examples()
    again.test(task, 64, 5)
    for n in (0, 3, 10**9):
        np.testing.assert_array_equal(made.training(task, 2, n).ids, again.training(task, 2, n).ids)
    drawn = [
        made.training(task, 4, 7),
        made.training(task, 4, 8),
        examples(seed=1).training(task, 4, 7),
        made.training(task, 3, 7),
    ]
    assert len({example.text for example in [*drawn, made.test(task, 128, 7)]}) == 5


@pytest.mark.parametrize("placement", ["deliberate", "random", "none"])
def test_pauses_follow_the_placement(placement):
    made, deliberate = examples(placement=placement), 0
    meta = made.tokenizer.vocabulary.meta
    for task, expected in zip(PROMPTED, (1, 2, 1, 2, 0), strict=True):
        for n in range(40):
            example = made.training(task, 4, n)
            at = np.flatnonzero(example.ids == meta)
            assert len(at) == (0 if placement == "none" else expected)
            assert all(0 < position < example.asked.argmax() for position in at), "in the prompt, never its last token"
            text = shown(made, example.ids)
            assert text.count(MARK) == (0 if placement == "deliberate" else expected)
            without = text.replace(f" {PAUSE}", "").replace(MARK, f" {PAUSE}")
            deliberate += placement == "random" and without.endswith(example.text)
    assert deliberate == (200 if placement == "random" else 0), "random pauses are added to a prompt with marks"


def test_all_counts_bits_items_and_spans_occur_as_answers():
    made = examples()
    answers = {task: [made.test(task, 128, n).core.answer for n in range(400)] for task in PROMPTED}
    counts = Counter(answers["segment_counting"])
    assert set(counts) == {(f" {n}",) for n in range(4)}
    assert max(counts.values()) < 1.6 * min(counts.values()), "equally likely"
    assert 150 < Counter(answers["parity"])[(" 0",)] < 250
    assert len(set(answers["list_recall"])) == sum(map(len, LISTS.values()))
    assert {len(span) for span in answers["copying"]} == set(range(1, made.tasks.span + 1))
    assert [registered.find(task, "tasks").chance(made.tasks) for task in PROMPTED] == [
        1 / 8,
        1 / 4,
        1 / 2,
        1 / (made.tasks.span * len(TEXT)),
        1 / 8,
    ]


def test_sizes_bound_what_an_example_holds():
    made = examples(lists=2, items=3, bits=2, span=2)
    for n in range(60):
        for task in ("list_recall", "segment_counting"):
            lines = [line for line in made.test(task, 128, n).core.lines]
            assert len(lines) <= 2 and all(len([w for w in line[1:] if w != PAUSE]) <= 3 for line in lines)
        assert len(made.test("copying", 128, n).core.answer) <= 2
        [bits] = made.training("parity", 4, n).core.lines
        assert bits.index(PAUSE) - 1 <= 2


@PROPERTY
@given(st.integers(4, 200), st.integers(1, 50), st.integers(0, 10**6))
def test_every_key_is_queried_once_and_followed_by_its_value(length, pairs, n):
    made = examples(names=("mqar",), pairs=pairs)
    example = made.test("mqar", length, n)
    count, half = min(pairs, length // 4), made.tokenizer.vocabulary.base // 2
    value_of = dict(example.ids[: 2 * count].reshape(count, 2).tolist())
    at = np.flatnonzero(example.asked)
    assert len(example.ids) == length and len(value_of) == len(at) == count and at.min() >= 2 * count
    assert sorted(example.ids[at].tolist()) == sorted(value_of) and max(value_of) < half <= min(value_of.values())
    assert example.targets[at].tolist() == [value_of[key] for key in example.ids[at].tolist()]


def test_the_needle_is_found_at_every_depth():
    made = examples(names=("needle",))
    depths = [[line[0] == "Text:" for line in drawn_lines(made, n)].index(False) for n in range(200)]
    assert Counter(depths).keys() == set(range(max(depths) + 1)) and max(depths) >= 5
    for draw in (lambda n: made.test("needle", 128, n), lambda n: made.training("needle", 4, n)):
        assert len({draw(n).text.rpartition("A: ")[2] for n in range(300)}) > 40, (
            "every item is an answer in training and in the test"
        )


# ------------------------------------------------------------------------------------------------ split, curriculum


@pytest.mark.parametrize("task", KINDS)
def test_no_test_example_is_ever_trained_on(task):
    """The content of an example, without neutral text, is in one split only, for every seed and phase."""
    made = examples(items=3, lists=1, bits=4, span=2)
    train = {replace(made, seed=seed).training(task, phase, n).core for seed in (0, 1) for phase in range(5) for n in range(60)}
    test = {made.test(task, length, n).core for length in (64, 128) for n in range(60)}
    assert not train & test
    assert all(map(is_test, test)) and not any(map(is_test, train))


@pytest.mark.parametrize("task", KINDS)
def test_a_phase_has_lengths_up_to_its_bound(task):
    made = examples()
    longest = [made.longest(task, phase) for phase in range(5)]
    assert longest == sorted(longest) and longest[-1] == 128
    for phase in range(5):
        lengths = [len(made.training(task, phase, n).ids) for n in range(200)]
        middle = (made.shortest(task) + longest[phase]) / 2
        assert made.shortest(task) <= min(lengths) < middle < max(lengths) <= longest[phase]


@pytest.mark.parametrize("task", KINDS)
def test_a_short_curriculum_has_examples_in_every_phase(task):
    shortest = examples().shortest(task)
    for length in range(shortest + 1, shortest + 7):
        made = examples(train_length=length)
        for phase in range(5):
            assert shortest <= len(made.training(task, phase, 0).ids) <= made.longest(task, phase) <= length


def test_phases_are_equal_parts_of_the_run():
    assert [phase_of(step, 10, 5) for step in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert Counter(phase_of(step, 1000, 3) for step in range(1000)) == {0: 334, 1: 333, 2: 333}


def test_lengths_without_an_example_are_refused():
    with pytest.raises(UserError, match=r"tasks.train_length = 10: the shortest example of list_recall takes 11 tokens"):
        examples(train_length=10).check()
    with pytest.raises(UserError, match=r"tasks.eval_lengths = 8: .*copying takes 9"):
        examples(names=("parity", "copying"), eval_lengths=(8, 64)).check()
    with pytest.raises(UserError, match="parity has no test example of 6 to 6 tokens"):
        examples(names=("parity",)).test("parity", 6, 0)


# ----------------------------------------------------------------------------------------------------------- tokens


def test_a_tokenizer_of_tasks_holds_each_piece_as_one_token():
    tokenizer, plain = TOKENIZERS["bpe"], train_bpe("bpe:512", TEXTS)
    assert tokenizer.vocabulary == plain.vocabulary and tokenizer.vocabulary.size == 512
    for piece in RESERVED_PIECES:
        [token] = tokenizer.encode(piece)
        assert token < tokenizer.vocabulary.base and tokenizer.decode([token]) == piece
    assert len(set(RESERVED_PIECES)) == len(RESERVED_PIECES) < 128
    assert tokenizer.fingerprint() != plain.fingerprint()
    for text in (TEXTS[0], "levels of Tools: hammering\n 12 alphas", " 3 of Fruits? A: plum"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(" hammers")[0] == tokenizer.encode(" hammer")[0]


def test_lists_share_no_words():
    words = [*TEXT, *(word for items in LISTS.values() for word in items)]
    assert len(set(words)) == len(words) == 64
