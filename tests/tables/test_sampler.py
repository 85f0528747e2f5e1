"""A sample of all tables: every table in turn, within the time, with failures and empty columns."""

import json

import pytest

from metajax import registry
from metajax.cli.main import main
from metajax.config import Config
from metajax.core.errors import UserError
from metajax.registry import Column, Row
from metajax.reporting.terminal import print_sample
from metajax.runs.files import write_json
from metajax.tables.sampler import budget_seconds, sample, summary

pytestmark = pytest.mark.usefixtures("own_registry")
REPORT = {"parameters": {"total": 1000}, "flops_per_token": {"mlp": 10.0}, "warnings": [], "analyses": {}}
REPORT["counts"] = {"positions": 400, "body": 380, "metadata": 0, "meta_tokens": 0, "padding": 20, "flops": 1.5e6}
REPORT["eval"] = {"none": {"bpb": 2.0}}


@pytest.fixture
def tables(monkeypatch):
    """Two tables whose rows take two minutes each; two rows of the first start from a run of five minutes."""
    monkeypatch.setattr("metajax.tables.page.write_table_page", lambda folder, result, root: folder)
    base = lambda scale: Config(name="lab")  # noqa: E731
    registry.experiment("lab/start", summary="pre-training", minutes={"cpu": 5})(base)
    rows = [
        Row("plain", {"init.from": "lab/start"}),
        Row("meta", {"init.from": "lab/start", "model.layers": 6}),
        Row("scratch", {"training.steps": 50}),
    ]
    rows.append(Row("others", lacks="their weights"))
    good, typo = Column("bits/byte", "eval.none.bpb"), Column("typo", "eval.non.bpb")
    common = {"summary": "s", "baseline": None, "minutes": {"cpu": 2}}
    return registry.table("lab/one", rows=rows, columns=[good], **common)(base), registry.table(
        "lab/other", rows=rows[2:], columns=[good, typo], **common
    )(base)


class Runs:
    """Stands in for training."""

    def __init__(self, fail=""):
        self.made, self.fail = [], fail

    def __call__(self, config, workdir, analyses):
        if (workdir / "report.json").exists():
            return json.loads((workdir / "report.json").read_text())
        if config.name == self.fail:
            raise FloatingPointError("loss nan")
        self.made.append(config.name)
        write_json(workdir / "report.json", REPORT)
        return REPORT


def test_a_line_of_every_table_in_turn(tables, tmp_path, capsys):
    runs = Runs(fail="lab/one/meta")
    made = sample(tables, "cpu", 3600, 3, tmp_path, runs)
    assert sorted(one.table for one in made[:2]) == ["lab/one", "lab/other"]
    lines = ["lab/one/meta", "lab/one/plain", "lab/one/scratch", "lab/other/scratch"]
    assert sorted(f"{one.table}/{one.row}" for one in made) == lines
    found = {line["table"]: line for line in summary(made)}
    assert found["lab/one"]["failed"] == ["meta: FloatingPointError: loss nan"] and found["lab/one"]["empty"] == []
    other = {"table": "lab/other", "lines": 1, "minutes": 0, "failed": [], "empty": ["typo"]}
    assert found["lab/other"] | {"minutes": 0} == other
    assert sorted(runs.made) == ["lab/one/plain", "lab/one/scratch", "lab/other/scratch", "lab/start"], (
        "the shared parent is run once"
    )
    print_sample(summary(made), ["lab/one", "lab/other", "lab/third"])
    said = " ".join(capsys.readouterr().out.split())
    assert "failed: lab/one/meta: FloatingPointError: loss nan 2 of 3 tables reached; not reached: lab/third" in said
    assert "typo" in said
    assert [one["row"] for one in json.loads((tmp_path / "sample" / "cpu.json").read_text())] == [one.row for one in made]


def test_complete_runs_take_no_time_and_the_budget_holds(tables, tmp_path):
    made = sample(tables, "cpu", 3600, 3, tmp_path, Runs(fail="lab/one/meta"))
    again = Runs()
    assert [one.row for one in sample(tables, "cpu", 130, 3, tmp_path, again)] == [one.row for one in made]
    assert again.made == ["lab/one/meta"]
    assert sample(tables, "cpu", 100, 4, tmp_path, Runs()) == [], "no line takes less than two minutes"
    with pytest.raises(UserError, match="no table has scale 'paper'"):
        sample(tables, "paper", 100, 4, tmp_path, Runs())


@pytest.mark.parametrize("text", ["60", "m", "1d", "-5m", ""])
def test_a_budget_is_a_time(text):
    assert (budget_seconds("90s"), budget_seconds("60m"), budget_seconds("1.5h")) == (90, 3600, 5400)
    with pytest.raises(UserError, match="expected a time such as 60m"):
        budget_seconds(text)


@pytest.mark.parametrize(
    "words", ["--set training.steps=1", "--rows core", "--jobs 2", "--sweep model.layers=1,2", "--seeds 3", "--render"]
)
def test_options_of_one_table_are_refused_with_all(words, capsys):
    assert main(["table", "--all", *words.split()], packages=()) == 2
    assert f"{words.split()[0]} does not go with --all" in capsys.readouterr().err
