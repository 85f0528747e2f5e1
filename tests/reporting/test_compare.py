"""Runs side by side, of any kind."""

from rich.console import Console

from metajax import registry
from metajax.config import config_hash
from metajax.core.fields import to_dict
from metajax.reporting.terminal import print_comparison
from metajax.runs.files import write_json


def made(folder, name, report):
    """A run's folder with its config, and its report if there is one."""
    config = registry.find_experiment(name).build("cpu")
    write_json(folder / "config.json", {"hash": config_hash(config), "config": to_dict(config)})
    if report:
        write_json(folder / "report.json", report)
    return folder


def test_runs_on_images_text_and_unfinished_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("metajax.reporting.lines.console", Console(width=200))
    registry.load()
    images = {"eval": {"base": {"accuracy": 0.25}}, "parameters": {"total": 12}, "counts": {"images": 320}}
    text = {"eval": {"none": {"bpb": 1.5}, "choice": {"average": 0.5}}, "parameters": {"total": 1000}}
    text["counts"] = {"positions": 400, "body": 380}
    runs = [
        made(tmp_path / "a-s0", "prompt_learning/base_to_new/cocoop/emoji", images),
        made(tmp_path / "b-s0", "prompt_learning/base_to_new/aapl/emoji", images | {"eval": {"base": {"accuracy": 0.75}}}),
        made(tmp_path / "c-s0", "quickstart/plain", text),
        made(tmp_path / "d-s0", "quickstart/metadata", None),
    ]
    print_comparison(runs[:2])
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["accuracy,", "base", "25.0%", "75.0%"] in said and ["prompts.alpha", "0.0", "0.2"] in said
    assert ["images", "320", "320"] in said and not any(line[0] in ("positions", "state") for line in said)
    print_comparison(runs)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["state", "complete", "complete", "complete", "not", "complete"] in said
    assert ["multiple", "choice,", "mean", "-", "-", "50.0%", "-"] in said and ["images", "320", "320", "-", "-"] in said
