"""Lost lines of metrics.jsonl before the step from which a run resumes: always reported and recorded."""

import json

import pytest

from metajax.runs.files import read_lines
from metajax.runs.metrics import MetricsFile


def edited(change):
    def damage(path):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(change(lines)))

    return damage


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "cut before the step": edited(lambda lines: lines[:3]),
    "a line less": edited(lambda lines: lines[:2] + lines[3:]),
    "a line twice": edited(lambda lines: lines[:3] + lines[2:]),
    "NULs": edited(lambda lines: [*lines[:2], b"\x00" * 40 + b"\n", *lines[3:]]),
    "NULs without a line end": edited(lambda lines: [b"".join(lines[:4]), b"\0" * 4000]),
    "another number": edited(lambda lines: [*lines[:2], lines[2].replace(b'"loss": ', b'"loss": 1'), *lines[3:]]),
    "another order": edited(lambda lines: lines[::-1]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.fault(9)
@pytest.mark.parametrize("damage", DAMAGES)
def test_lines_lost_before_the_step_are_recorded(tmp_path, damage):
    path, said = tmp_path / "metrics.jsonl", []
    file = MetricsFile(path, 0)
    for step in range(1, 7):
        file.write({"step": step, "loss": 1 / step})
    mark = file.mark()
    file.write({"step": 7, "loss": 0.5})
    file.close()
    whole = path.read_bytes().splitlines(keepends=True)
    DAMAGES[damage](path)
    file = MetricsFile(path, 6, mark, said.append)
    file.write({"step": 7, "loss": 0.25})
    assert len(said) == 1 and str(path) in said[0] and "until step 6" in said[0]
    steps = [line["step"] for line in read_lines(path)]
    assert steps[-1] == 7 and len(set(steps)) == len(steps), "the remaining lines stay, each step once"
    assert damage == "deleted" or any((tmp_path / "damaged").iterdir()), "the damaged file is kept"
    assert (
        file.mark()["lines"] == len(steps) and set(path.read_bytes().splitlines(keepends=True)[:-1]) <= set(whole)
    ) or damage == "another number"
    file.close()
    said.clear()
    MetricsFile(path, 7, file._mark | {"sha256": file._hash.hexdigest()}, said.append).close()
    assert not said, "reported once"


@pytest.mark.fault(9)
def test_lines_after_the_step_are_dropped_silently(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    file = MetricsFile(path, 0)
    file.write({"step": 1, "loss": 2.0})
    mark = file.mark()
    file.write({"step": 2, "loss": 1.0})
    file.close()
    with path.open("ab") as more:
        more.write(b'{"step": 3, "lo\0\0\n\xff')
    MetricsFile(path, 1, mark, said.append).close()
    assert read_lines(path) == [{"step": 1, "loss": 2.0}] and not said


@pytest.mark.fault(9)
def test_a_checkpoint_of_an_earlier_version_has_no_mark(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "left_out": "spike"},
        {"step": 2, "validation_bpb": 3.0},
        {"step": 3, "loss": 1.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    MetricsFile(path, 2, None, said.append).close()
    assert read_lines(path) == lines[:3] and not said
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    MetricsFile(path, 2, None, said.append).close()
    assert len(said) == 1 and "1 of these steps" in said[0]


@pytest.mark.fault(9)
@pytest.mark.parametrize("lines", [0, 3])
def test_the_report_of_a_run_says_that_its_curves_lack_steps(runs, here, copy, lines):
    workdir = copy(runs.cut_one)
    edited(lambda all_of_them: all_of_them[:lines])(workdir / "metrics.jsonl")
    code, _ = here.train(workdir)
    report = json.loads((workdir / "report.json").read_text())
    assert code == 0 and sum("metrics.jsonl" in warning for warning in report["warnings"]) == 1
    assert [line["step"] for line in read_lines(workdir / "metrics.jsonl")] == [*range(1, lines + 1), 7, 8]
    assert "metrics.jsonl" in (workdir / "report.html").read_text()


@pytest.mark.fault(9)
def test_warnings_and_times_that_are_lost(runs, here, copy):
    workdir = copy(runs.cut_one)
    (workdir / "time.json").unlink()
    (workdir / "warnings.json").unlink(missing_ok=True)
    code, _ = here.train(workdir)
    report = json.loads((workdir / "report.json").read_text())
    assert code == 0 and any("time.json is missing" in warning for warning in report["warnings"])
    assert report["goodput"]["starts"] == 1
