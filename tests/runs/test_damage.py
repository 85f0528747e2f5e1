"""Every file of a run, damaged in every way: commands give the same numbers, report what is missing, or refuse in one line."""

import json

import pytest

from tests.damage import DAMAGES

NAMES = ("config.json", "data.json", "environment.json", "metrics.jsonl", "time.json", "tokenizer.json")
RUN = [(name, damage) for name in (*NAMES, "warnings.json") for damage in ("flip", "missing", "others", "folder")]
COMPLETE = [(name, damage) for name in (*NAMES, "report.json") for damage in DAMAGES]
LATER = [("checkpoints/{}/_CHECKPOINT_METADATA", "others"), ("checkpoints/{}/state/manifest.ocdbt", "flip")]
LATER += [("hashes/{}-p0.json", "cut"), ("hashes/{}-p0.json", "others")]


def damaged(copy, run, another, name, damage):
    workdir = copy(run)
    if (another / name).exists() and (workdir / name).exists():
        DAMAGES[damage](workdir / name, another / name)
    return workdir


def told(code, said):
    """The lines of warnings and errors; an error is one line."""
    errors = [line for line in said if line.startswith("error: ")]
    assert code in (0, 2) and len(errors) == (code == 2), said
    return errors or [line for line in said if line.startswith("warning: ") and "other code" not in line]


@pytest.mark.fault(25)
@pytest.mark.parametrize(("name", "damage"), RUN + [(name.format(6), damage) for name, damage in LATER])
def test_a_resumed_run_reports_damage(runs, here, copy, name, damage):
    workdir = damaged(copy, runs.cut_one, runs.cut_other, name, damage)
    code, said = here.train(workdir)
    about = told(code, said)
    if code == 0:
        report, whole = (json.loads((run / "report.json").read_text()) for run in (workdir, runs.one))
        assert report["eval"] == whole["eval"] and report["counts"] == whole["counts"]
        same = (workdir / "metrics.jsonl").read_text() == (runs.one / "metrics.jsonl").read_text()
        assert same or any("metrics.jsonl" in warning for warning in report["warnings"])
    assert about or damage == "missing" or name.startswith(("tokenizer", "hashes")), "the tokenizer is written anew"


@pytest.mark.fault(25)
@pytest.mark.parametrize(("name", "damage"), COMPLETE + [(name.format(8), damage) for name, damage in LATER])
def test_commands_on_a_complete_run_report_damage(runs, here, copy, name, damage):
    workdir, sound = damaged(copy, runs.one, runs.other, name, damage), copy(runs.other, "sound")
    bpb = "{:.4f}".format(json.loads((runs.one / "report.json").read_text())["eval"]["none"]["bpb"])
    for words in (("runs",), ("compare", workdir, sound), ("compare", sound, sound, workdir)):
        code, said = here(*words, "--runs-dir", sound.parent)
        assert any(bpb in line for line in said) or told(code, said) or damage == "missing"
        assert words[0] != "runs" or (code == 0 and any("sound" in line for line in said)), "the others are listed"
    code, said = here.eval(workdir)
    assert any(bpb in line for line in said) or told(code, said)
    code, said = here.train(workdir)
    assert code == 2 or json.loads((workdir / "report.json").read_text())["eval"]["none"]["bpb"] == pytest.approx(
        float(bpb), abs=1e-4
    )
    told(code, said)
