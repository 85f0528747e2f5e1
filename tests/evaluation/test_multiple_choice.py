"""Multiple choice: prompts and scores compared with the lm-evaluation-harness, and packed scores with one pass per answer."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import Choice, Metadata
from metajax.core.errors import UserError
from metajax.data.pipeline import open_corpora
from metajax.evaluation.multiple_choice import (
    COMPLETION,
    check_choice,
    evaluate_choice,
    metadata_before,
    score,
    summarise,
    with_shots,
)
from metajax.evaluation.questions import KINDS, Question, QuestionFile, encode_pair
from metajax.experiment import run_experiment
from metajax.inference.decoding import Sampling
from metajax.inference.forward import prepare
from metajax.inference.generation import generate, opening
from metajax.reporting.tasks import choice_rows
from metajax.training.program import Program

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "choice_harness.json").read_text())


@pytest.mark.harness
def test_the_frozen_sample_equals_the_harness(tmp_path):
    pytest.importorskip("lm_eval", reason="pip install lm_eval==0.4.13")
    from harness import frozen_sample

    assert json.loads(json.dumps(frozen_sample(tmp_path))) == GOLDENS


@pytest.mark.parametrize("kind", GOLDENS["tasks"])
def test_prompts_and_scores_equal_the_harness(kind):
    """The frozen sample holds our own records, the harness' requests for each, and its metrics for synthetic answers."""
    sample = GOLDENS["tasks"][kind]
    questions = [KINDS[kind](record) for record in sample["records"]]
    asked = [
        [[q.description + context, answer] for context, answer in zip(q.contexts, q.answers, strict=True)] for q in questions
    ]
    assert asked == sample["requests"]
    found = np.concatenate([np.asarray(of_question, np.float64) for of_question in sample["replies"]])
    for name, value in sample["metrics"].items():
        assert summarise(questions, found)[name] == pytest.approx(value)
    shown = {tuple(with_shots(questions[2], n, questions[:2], 2, same_file=False).contexts) for n in range(20)}
    assert len(shown) == 2 and tuple(sample["two_shots"]) in shown, "the two examples in one order or the other"


def test_ids_of_a_pair_equal_the_harness():
    table = {word: i for i, word in enumerate(GOLDENS["pairs"]["words"])}

    def encode(text):  # longest first, so that a space belongs to the word after it
        ids = []
        while text:
            word = max((w for w in table if text.startswith(w)), key=len)
            ids.append(table[word])
            text = text[len(word) :]
        return ids

    for context, answer, before, after in GOLDENS["pairs"]["cases"]:
        assert encode_pair(encode, context, answer) == (before, after)


RECORDS = [
    {"query": "the mask of a row", "choices": ["is a matrix", "segments"], "gold": 1},
    {"query": "sort:", "choices": ["a", "b", "the list and the rest of it"], "gold": 0},
    {
        "query": "a very long question that no row can hold as it is, so that it loses its beginning",
        "choices": ["x", "y"],
        "gold": 1,
    },
]


@pytest.fixture
def prepared(tiny_config, paths, tmp_path):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))

    def build(tasks, **changes):
        config = tiny_config(**{"evaluation.choice": Choice((f"jsonl:{tmp_path}/own.jsonl", *tasks), shots=(0, 2)), **changes})
        corpora = open_corpora(config, paths)
        program = Program.build(config, corpora.tokenizer.vocabulary.size, jax.devices()[:1])
        return program, corpora, jax.tree.map(lambda x: 6 * x, program.create_state().model)

    return build


def test_packed_scores_equal_one_answer_at_a_time(prepared):
    program, corpora, model = prepared([], **{"data.sequence_length": 64})
    questions = [KINDS["jsonl"](record) for record in RECORDS]
    head = [corpora.tokenizer.vocabulary.bos]
    found = score(program, corpora, model, questions, head)
    forward = jax.jit(
        lambda tokens: jax.nn.log_softmax(model(tokens, positions=jnp.arange(64)[None], segment_ids=jnp.ones((1, 64), int)))
    )
    at = 0
    for question in questions:
        for context, answer in zip(question.contexts, question.answers, strict=True):
            ids = (head + corpora.tokenizer.encode(context + answer)[-64:])[:]
            count = len(corpora.tokenizer.encode(answer))
            tokens = np.zeros((1, 64), np.int32)
            tokens[0, : len(ids) - 1] = ids[:-1]
            logs = np.asarray(forward(tokens))[0, : len(ids) - 1]
            own = logs[np.arange(len(ids) - 1), ids[1:]][-count:]
            greedy = (logs.argmax(-1) == ids[1:])[-count:].all()
            np.testing.assert_allclose(found[at], (own.sum(), greedy), rtol=1e-5)
            at += 1
    assert at == len(found) == 7


def test_results_by_task_context_and_shots(prepared):
    program, corpora, model = prepared(
        [], metadata=Metadata(template="{topic}"), **{"evaluation.choice.contexts": ("none", "empty")}
    )
    found = evaluate_choice(program, corpora, model)
    assert found["settings"].keys() == {"none_0", "none_2", "empty_0", "empty_2"}
    assert found["jsonl"] == found["settings"]["none_0"]["jsonl"] and found["jsonl"]["n"] == 3
    assert found["average"] == found["jsonl"]["acc"]


def test_passages_count_as_right_if_their_first_line_has_the_value(prepared, tmp_path):
    texts = ["Ada was born in", "so long a passage that its beginning is lost, by", "Ada was born in"]
    file, changes = tmp_path / "swde.jsonl", {"data.sequence_length": 72, "evaluation.choice.shots": (0,)}
    file.touch()
    program, corpora, model = prepared([f"swde:{file}"], **changes)
    room = 72 - 1 - COMPLETION  # beside BOS
    cut, greedy = [text[-room:] for text in texts], Sampling(temperature=0)
    written = generate(prepare(model), corpora.config, corpora.tokenizer, cut, count=COMPLETION, sampling=greedy)
    lines = [text.partition("\n")[0] for text in written]
    assert min(map(len, lines)) > 3 and lines[0] != lines[1]
    values = [lines[0][1:4].swapcase(), lines[1][-3:], lines[2] + "?"]
    records = [{"text": text, "value": value} for text, value in zip(texts, values, strict=True)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    shown = with_shots(*(KINDS["swde"](record) for record in records[:1]), 0, [KINDS["swde"](records[1])], 1, same_file=False)
    assert shown.contexts == (f"{texts[1]} {values[1]}\n\n{texts[0]}",)
    found = evaluate_choice(program, corpora, model)
    assert found["swde"]["acc"] == found["passages"] == pytest.approx(2 / 3) and found["questions"] == found["jsonl"]["acc"]
    assert found["average"] == pytest.approx((found["passages"] + found["questions"]) / 2)


def test_a_run_with_questions_from_start_to_finish(tiny_config, paths, tmp_path):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    choice = Choice((f"jsonl:{tmp_path}/own.jsonl?name=own",), shots=(0,))
    config = tiny_config(**{"evaluation.choice": choice, "evaluation.every": 3, "evaluation.sample_tokens": 0})
    report = run_experiment(config, tmp_path / "run", paths)
    scored = report["eval"]["choice"]
    assert scored["own"]["n"] == 3 and scored["average"] == scored["own"]["acc"]
    assert [step for step, _ in report["curves"]["choice"]] == [step for step, _ in report["curves"]["bpb"]] == [3, 6]
    assert (
        report["curves"]["choice"][-1][1] == scored["average"] and report["curves"]["bpb"][-1][1] == report["eval"]["none"]["bpb"]
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Multiple choice" in page and f"<td>{scored['own']['acc']:.1%} ± " in page
    assert choice_rows(scored)[-1][:3] == ["mean", "nothing", "0"]


def test_solved_examples_are_never_the_question_itself():
    questions = [Question((f"q{i}",), (f" a{i}",), ("a",), 0) for i in range(4)]
    for number, question in enumerate(questions):
        shown = with_shots(question, number, questions, 3, same_file=True).contexts[0]
        assert shown.endswith(f"q{number}") and shown.count(f"q{number}") == 1 and shown.count("\n\n") == 3
    with pytest.raises(UserError, match="4 shots, but there are 3"):
        with_shots(questions[0], 0, questions, 4, same_file=True)


def test_conditional_inference_puts_a_source_where_training_had_metadata(prepared):
    recipe = Metadata(template="URL: {url|host}\n\n", wrap="plain")
    _, corpora, _ = prepared([], metadata=recipe)
    task, tokenizer = QuestionFile.of("openbookqa:f.jsonl"), corpora.tokenizer
    bos = tokenizer.vocabulary.bos
    head = lambda context: opening(corpora.config, tokenizer, metadata_before(corpora.config, context, task))  # noqa: E731
    assert head("task") == [bos, *tokenizer.encode("URL: www.factquizmaster.com\n\n")]
    assert head("empty") == head("none") == [bos]
    with pytest.raises(UserError, match="own has no source to name; give it one with"):
        metadata_before(corpora.config, "task", QuestionFile.of("jsonl:f.jsonl?name=own"))


@pytest.mark.fault(30)
def test_questions_are_read_like_corpora(tmp_path):
    record = {"query": "The\u2028sea\x85is", "choices": ["blue", "a cup"], "gold": 0}
    text = "\ufeff" + json.dumps(record, ensure_ascii=False) + "\r\n \n" + json.dumps(record) + "\n\n"
    (tmp_path / "q.jsonl").write_bytes(text.encode())
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("q.jsonl", "q.jsonl.gz"):
        questions = QuestionFile.of(f"jsonl:{name}").read(name, tmp_path)
        assert [q.contexts[0] for q in questions] == [record["query"]] * 2
    (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n\n{\n")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 3: not JSON"):
        QuestionFile.of("jsonl:bad.jsonl").read("bad.jsonl", tmp_path)


def test_mistakes_in_files_are_named(prepared, tmp_path):
    for line, message in (
        ("{", "line 1: not JSON"),
        ('{"goal": "g"}', "no question of piqa .KeyError: 'sol1'.; a record has goal"),
    ):
        (tmp_path / "piqa.jsonl").write_text(line)
        _, corpora, _ = prepared([f"piqa:{tmp_path}/piqa.jsonl"])
        with pytest.raises(UserError, match=message):
            check_choice(corpora)
    with pytest.raises(UserError, match="unknown kind 'piqua'; did you mean 'piqa'"):
        QuestionFile.of("piqua:f.jsonl")
