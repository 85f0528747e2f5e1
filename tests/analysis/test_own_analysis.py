"""A user's analysis: one file in a package of experiments, run from the command line."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from metajax import registry
from metajax.analysis import analysis
from metajax.cli.main import main
from metajax.core.errors import UserError
from metajax.experiment import run_experiment
from metajax.vision.analyses import check_analyses, image_analysis


@pytest.fixture
def package(own_registry, tmp_path, monkeypatch):
    """A package of experiments with nothing but that file."""
    folder = tmp_path / "of_mine"
    folder.mkdir()
    (folder / "__init__.py").touch()
    shutil.copy(Path(__file__).parents[1] / "own" / "letters.py", folder)
    monkeypatch.syspath_prepend(tmp_path)
    for held in ("_known", "_modules_of"):
        monkeypatch.setattr(analysis, held, dict(getattr(analysis, held)))
    yield "of_mine"
    for name in [name for name in sys.modules if name.partition(".")[0] == "of_mine"]:
        del sys.modules[name]


def test_one_file_is_a_whole_analysis(package, tiny_config, paths, tmp_path, capsys):
    workdir = tmp_path / "runs" / "run"
    run_experiment(tiny_config(**{"training.steps": 1, "model.layers": 1, "evaluation.documents": 2}), workdir, paths)
    where = ["--runs-dir", str(tmp_path / "runs"), "--cache-dir", str(paths.cache)]
    code = main(["analyze", str(workdir), "--what", "letters", "--examples", "3", "--length", "8", *where], packages=(package,))
    numbers = json.loads((workdir / "analysis" / "letters.json").read_text())["result"]
    line = f"{numbers['distinct']} distinct tokens"
    assert code == 0 and 1 < numbers["distinct"] <= 24 and line in capsys.readouterr().out
    for page in (workdir / "report.html", workdir / "analysis" / "analysis.html"):
        text = page.read_text()
        assert "Letters of the prompts" in text and "How many distinct tokens" in text and line in text and "Lengths." in text


def test_unknown_and_repeated_names_are_refused(package):
    registry.load(package)
    assert {"letters", "sharpening", "theory"} <= set(analysis.names())
    assert set(image_analysis.names()) == {"attention", "overhead"}
    with pytest.raises(UserError, match="unknown 'leters'; did you mean 'letters'"):
        check_analyses("table mine", ("leters",))
    with pytest.raises(UserError, match="has one of that name"):
        analysis("theory", title="another")(check_analyses)


@pytest.mark.parametrize("known", [analysis, image_analysis])
def test_every_module_is_the_analysis_of_its_name(known):
    for name in known.names():
        found = known[name]
        assert found.name == name and found.title and found.about
