"""The reader of a run's files: detected damage, warnings, and commands that continue without the file."""

import json
import pickle
import shutil

import pytest

from metajax.core.errors import UserError
from metajax.runs.directory import read_config
from metajax.runs.files import Damaged, find_json, parse_lines, read_json, read_lines, recall, write_json

REPORT = {"eval": {"none": {"bpb": 1.5}}, "parameters": {"total": 3}, "counts": {"positions": 8}}
BROKEN = [b"", b"\0" * 40, b'{"eval": \xff}', b'{"eval"', b"[" * 100_000, b"1" * 5000, b"null", b"3", b'"text"', b"[]", b"{}"]
CHANGES = [
    {"eval": {"none": {"bpb": "1.5"}}},
    {"eval": {"tasks": {"parity": {"64": {}}}}},
    {"parameters": {}},
    {"counts": {"positions": None}},
    {"warnings": "none"},
    {"metrics": {"lines": 1}},
]
MISFITS = [{"eval": []}, *({**REPORT, **change} for change in CHANGES)]


@pytest.fixture
def folder(tmp_path):
    """The folder of a run with an id."""
    write_json(tmp_path / "config.json", {"id": "1f", "hash": "0", "config": {"name": "x"}})
    return tmp_path


@pytest.mark.fault(25)
@pytest.mark.parametrize("content", [*BROKEN, *(json.dumps(value).encode() for value in MISFITS)], ids=lambda c: repr(c[:30]))
def test_a_false_report_is_one_line_with_file_and_remedy(folder, content):
    (folder / "report.json").write_bytes(content)
    with pytest.raises(Damaged) as error:
        find_json(folder / "report.json")
    assert str(folder / "report.json") in str(error.value) and "again" in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.fault(25)
def test_a_folder_of_that_name_or_a_missing_file(folder):
    assert find_json(folder / "report.json") is None
    with pytest.raises(UserError, match=r"report\.json is missing"):
        read_json(folder / "report.json")
    (folder / "report.json").mkdir()
    with pytest.raises(Damaged, match="a folder in its place"):
        find_json(folder / "report.json")


@pytest.mark.fault(25)
def test_every_flipped_bit_of_a_number_or_a_name_is_noticed(folder):
    path = folder / "report.json"
    write_json(path, REPORT)
    written = path.read_bytes()
    for place in range(len(written)):
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        try:
            assert find_json(path) in (REPORT, REPORT | {"sha257": json.loads(written)["sha256"]}) or "sha256" not in find_json(
                path
            )
        except Damaged:
            continue
    path.write_bytes(written)
    assert find_json(path) == REPORT


@pytest.mark.fault(25)
def test_a_file_belongs_to_its_run(folder, tmp_path):
    other = tmp_path / "other"
    write_json(other / "config.json", {"id": "2f", "hash": "0", "config": {"name": "x"}})
    for name in ("report.json", "analysis/probes.json"):
        value = REPORT if name == "report.json" else {"name": "probes", "result": {}}
        write_json(folder / name, value)
        assert find_json(folder / name) == value
        (other / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / name, other / name)
        with pytest.raises(Damaged, match="of another run"):
            find_json(other / name)


def test_files_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hash": "0", "config": {}}))
    (tmp_path / "warnings.json").write_text('["a"]')
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert find_json(tmp_path / "warnings.json") == {"warnings": ["a"]} and find_json(tmp_path / "report.json") == REPORT


@pytest.mark.fault(25)
def test_a_run_resumes_without_a_damaged_file_and_keeps_it(folder):
    said, path = [], folder / "warnings.json"
    path.write_bytes(b"\0\0")
    assert recall(path, said.append, "they are lost") is None
    assert len(said) == 1 and str(path) in said[0] and "they are lost" in said[0] and not path.exists()
    assert [kept.read_bytes() for kept in (folder / "damaged").iterdir()] == [b"\0\0"]


@pytest.mark.fault(25)
def test_false_lines_of_metrics_are_reported(tmp_path):
    good = b'{"step": 1, "loss": 2.5}\n'
    bad = [
        b"\0\0\n",
        b"\xff\n",
        b"[]\n",
        b"\n",
        b'{"loss": 1}\n',
        b'{"step": "1"}\n',
        b'{"step": true}\n',
        b'{"step": 2, "loss": null}\n',
    ]
    assert parse_lines(good + b"".join(bad) + good + b'{"step": 3') == ([{"step": 1, "loss": 2.5}] * 2, list(range(2, 10)))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(good + b'{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1, "loss": 2.5}]
    path.write_bytes(good + bad[0])
    with pytest.raises(Damaged, match="line 2 is no record"):
        read_lines(path)


@pytest.mark.fault(25)
@pytest.mark.parametrize("change", [{"models": {}}, {"model": {"layer": 2}}, {"model": 3}])
def test_a_config_of_another_version_names_file_and_field(runs, copy, change):
    workdir = copy(runs.one)
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({"config": saved["config"] | change}))
    with pytest.raises(UserError) as error:
        read_config(workdir)
    assert str(workdir / "config.json") in str(error.value) and next(iter(change)) in str(error.value)
