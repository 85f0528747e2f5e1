"""Missing numbers: a perplexity too large for a float, a loss that is not finite; impossible evaluations are refused early."""

import json

import jax
import pytest

from metajax.config import Evaluation, MetaTokens, Tasks
from metajax.core.atomic import strict
from metajax.core.errors import UserError
from metajax.data.pipeline import open_corpora
from metajax.evaluation.tasks import check_bins
from metajax.evaluation.validation import evaluate_validation
from metajax.experiment import run_experiment
from metajax.training.program import Program

REFUSED = "a training that would end so was begun"


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.fault(26)
def test_a_huge_perplexity_is_none_and_a_loss_that_is_not_finite_is_an_error(tiny_config, paths):
    config = tiny_config()
    corpora = open_corpora(config, paths)
    program = Program.build(config, corpora.tokenizer.vocabulary.size)
    model = program.create_state().model
    found = [evaluate_validation(program, corpora, jax.tree.map(lambda x, by=by: x * by, model), "none") for by in (1.0, 300.0)]
    assert found[0]["perplexity"] > 1 and found[1]["perplexity"] is None
    assert found[1]["nats_per_token"] > 710 and found[1]["bpb"] > found[0]["bpb"]
    with pytest.raises(UserError, match="diverged"):
        evaluate_validation(program, corpora, jax.tree.map(lambda x: x * float("nan"), model), "none")


@pytest.mark.fault(26)
def test_a_diverged_run_has_a_readable_report(tiny_config, paths, tmp_path, monkeypatch):
    from metajax import experiment

    original = experiment.evaluate_validation
    monkeypatch.setattr(
        experiment, "evaluate_validation", lambda *a: original(*a) | {"perplexity": None, "strange": float("inf")}
    )
    run_experiment(tiny_config(), tmp_path, paths)
    for file in ("report.json", "metrics.jsonl", "time.json"):
        for text in (tmp_path / file).read_text().splitlines() if file.endswith("l") else [(tmp_path / file).read_text()]:
            json.loads(text, parse_constant=no_constant)
    assert json.loads((tmp_path / "report.json").read_text())["eval"]["none"]["perplexity"] is None
    assert strict({"a": [float("nan"), 1, (float("-inf"), 2.5)], "b": None}) == {"a": [None, 1, [None, 2.5]], "b": None}


def corpus(path, text_of):
    path.write_text("".join(json.dumps({"text": text_of(i), "site": f"s{i % 10}"}) + "\n" for i in range(40)))
    return f"jsonl:{path}?origin=site"


def validation_sites():
    from metajax.data.documents import is_validation

    return {i for i in range(10) if is_validation(f"s{i}", 0.5)}


@pytest.mark.fault(26)
@pytest.mark.parametrize(
    ("empty", "message"),
    [("validation", "validation documents .* have no text"), ("training", "training documents .* have no text")],
)
def test_documents_without_text_are_refused_before_training(tiny_config, paths, tmp_path, empty, message):
    out = validation_sites()
    assert 0 < len(out) < 10
    source = corpus(tmp_path / "c.jsonl", lambda i: "" if (i % 10 in out) == (empty == "validation") else f"words and words {i}")
    with pytest.raises(UserError, match=message):
        run_experiment(tiny_config(**{"data.sources": (source,), "data.validation_share": 0.5}), tmp_path / "run", paths)
    assert not (tmp_path / "run" / "config.json").exists(), REFUSED


@pytest.mark.fault(26)
def test_one_empty_document_among_others_is_evaluated(tiny_config, paths, tmp_path):
    source = corpus(tmp_path / "c.jsonl", lambda i: "" if i < 10 else f"words and words {i}")
    report = run_experiment(tiny_config(**{"data.sources": (source,), "data.validation_share": 0.5}), tmp_path / "run", paths)
    assert report["eval"]["none"]["bpb"] > 0


@pytest.mark.fault(26)
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"tasks": "jsonl:{folder}/three.jsonl", "shots": 5}, "5 shots, but there are 2 examples"),
        ({"tasks": "jsonl:{folder}/three.jsonl", "shots": 0, "contexts": "task"}, "has no source to name"),
        ({"tasks": "jsonl:{folder}/three.jsonl,jsonl:{folder}/three.jsonl", "shots": 0}, "same name"),
        ({"tasks": "jsonl:{folder}/none.jsonl"}, "has no question"),
        ({"tasks": "jsonl:{folder}/nowhere.jsonl"}, "no such file"),
        ({"tasks": "jsonl:{folder}/blank.jsonl", "shots": 0}, "an answer without text"),
        ({"tasks": "swde:{folder}/passages.jsonl", "shots": 0}, "a row holds no passage"),
    ],
)
def test_impossible_questions_are_refused_before_training(tiny_config, paths, tmp_path, choice, message):
    question = {"query": "What?", "choices": ["this", "that"], "gold": 0}
    files = {
        "three": [question] * 3,
        "none": [],
        "blank": [{**question, "choices": ["this", ""]}],
        "passages": [{"text": "a", "value": "b"}],
    }
    for name, records in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {f"evaluation.choice.{name}": str(value).format(folder=tmp_path) for name, value in choice.items()}
    with pytest.raises(UserError, match=message):
        run_experiment(tiny_config(**changes), tmp_path / "run", paths)
    assert not (tmp_path / "run" / "config.json").exists(), REFUSED


@pytest.mark.fault(26)
@pytest.mark.parametrize("lengths", [(), (512, 1024)])
def test_lengths_that_no_model_reads_are_refused_before_training(tiny_config, lengths):
    config = tiny_config(
        tasks=Tasks(names=("parity",), eval_lengths=lengths, train_length=32),
        evaluation=Evaluation(every=2),
        meta_tokens=MetaTokens(),
        **{"model.position": "learned"},
    )
    with pytest.raises(UserError, match=r"tasks\.eval_lengths"):
        check_bins(config)
    check_bins(tiny_config())
