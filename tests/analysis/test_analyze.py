"""Analyses from the command line and at the end of a run: files, pages, numbers for tables, one-line errors."""

import json

import pytest

from metajax.cli.main import main
from metajax.config import MetaTokens, Tasks
from metajax.experiment import run_experiment

TASKS = Tasks(names=("copying",), train_length=48, eval_lengths=(32,), eval_examples=12, span=3)
RUN = {"tasks": TASKS, "meta_tokens": MetaTokens(), "evaluation.documents": 0, "training.steps": 2, "model.layers": 1}
RUN |= {"data.tokenizer": "bpe:512+tasks", "data.sequence_length": 64}


def look_up(value, path):
    for key in path.split("."):
        value = value[key]
    return value


@pytest.fixture
def analyze(paths, tmp_path, capsys):
    def run(*words):
        code = main(["analyze", *words, "--runs-dir", str(tmp_path), "--cache-dir", str(paths.cache)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_at_the_end_of_a_run_and_from_the_command_line(tiny_config, paths, tmp_path, analyze):
    names = ("interventions", "sharpening", "caching", "theory")
    config = tiny_config(**RUN)
    assert run_experiment(config, tmp_path / "run", paths)["analyses"] == {}
    run_experiment(config, tmp_path / "run", paths, analyses=names[:2])
    report = run_experiment(config, tmp_path / "run", paths, analyses=names)
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    assert saved["analyses"].keys() == set(names)
    assert look_up(saved, "analyses.interventions.none.copying.32.exact") == look_up(saved, "eval.tasks.copying.32.exact")
    assert look_up(saved, "analyses.interventions.zero_token.copying.32.n") == 12
    paths_of_numbers = (
        "sharpening.boost.mean sharpening.drop.layers.layer_1.half caching.same_layer.near.mean theory.delta_0_5.met.rows"
    )
    for path in paths_of_numbers.split():
        assert isinstance(look_up(report, f"analyses.{path}"), float | int)
    assert not any("details" in numbers for numbers in saved["analyses"].values())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Sharpening" in page and "Zeroing at the meta-tokens" in page and "Attention maps" not in page

    code, out, _ = analyze("run", "--what", "attention,rate_distortion", "--examples", "20")
    folder, made = tmp_path / "run" / "analysis", (*names, "attention", "rate_distortion")
    assert code == 0 and "rate distortion" in out and "beta 0.1" in out
    assert {file.name for file in folder.iterdir()} == {*(f"{name}.json" for name in made), "analysis.html"}
    found = json.loads((folder / "rate_distortion.json").read_text())
    assert found["made_on"] == {"task": "copying", "length": 32, "prompts": 20}
    assert look_up(found["result"], "stated.meta_zero_position.beta_0_1.distortion") > 0
    assert found["result"]["examples"]["stated"] == {"training": 10, "validation": 10}
    page = (folder / "analysis.html").read_text()
    assert page.count("<h2>") == len(made) and page.count("<svg") >= 10
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page and "<script" not in page
    assert (tmp_path / "run" / "report.html").read_text().count("<svg") == page.count("<svg") + 2, "the report shows them too"


def test_mistakes_are_one_line(analyze):
    for words, message in (
        (("plan", "--what", "sharpning"), "unknown 'sharpning'; did you mean 'sharpening'"),
        (("plan", "--what", "sharpening"), "no run 'plan'"),
    ):
        code, _, err = analyze(*words)
        assert code == 2 and message in err and "Traceback" not in err
