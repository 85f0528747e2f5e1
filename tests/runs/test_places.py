"""Folders of runs: names that look like patterns, foreign files, and folders that disappear during a run."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from metajax.cli.main import main
from metajax.core import storage as buckets
from metajax.core.errors import UserError
from metajax.runs.directory import Gone, Place, list_runs
from metajax.runs.metrics import MetricsFile
from metajax.training.checkpoints import Checkpoints, load_arrays, newest_good, save_arrays, verify
from metajax.training.state import State
from tests.runs.conftest import train_command

ODD = ["lr=[1e-3]", "a*b", "what?", "{a,b}", "two words", "100%", "a#b", "ünï", "a\nb", "a::b", "~", "[!x]", "%2e%2e", "-x"]
FOREIGN = [".DS_Store", "._state", "Thumbs.db", "desktop.ini", "manifest.ocdbt~", "#x#", ".nfs0000000000a1b2c3"]
FOREIGN += ["notes (1).txt", "commit_success.txt.bak", "process_0~", "process_0 copy"]


def state(value):
    return State({"w": jnp.full(9, value)}, {}, jnp.int32(value), jnp.zeros((), bool))


@pytest.fixture
def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def saved(workdir):
    """Checkpoints at steps 1 and 2."""
    checkpoints = Checkpoints(workdir, keep=2)
    for step in (1, 2):
        checkpoints.save(state(step), {"step": step})
    checkpoints.close()
    return workdir


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", ODD)
def test_a_folder_name_is_no_pattern(tmp_path, abstract, name):
    workdir, said = saved(tmp_path / name / "w"), []
    assert buckets.steps_of(workdir) == [1, 2] and newest_good(workdir) == 2
    checkpoints = Checkpoints(workdir, 2, said.append)
    restored, meta = checkpoints.restore(abstract)
    checkpoints.close()
    assert meta == {"step": 2} and restored.model["w"].tolist() == [2.0] * 9 and not said
    save_arrays(buckets.home(workdir) / "replay-step-1" / "state", {"w": jnp.ones(3)})
    assert load_arrays(workdir / "replay-step-1" / "state", {"w": jnp.ones(3)})["w"].tolist() == [1.0] * 3


@pytest.mark.fault(21)
def test_a_run_in_a_folder_with_brackets_resumes(runs, here, tmp_path):
    workdir = tmp_path / "odd" / "lr=[1e-3]*?" / "w"
    shutil.copytree(runs.cut_one, workdir)
    code, said = here.train(workdir)
    assert code == 0 and not any("damaged" in line for line in said)
    assert (workdir / "metrics.jsonl").read_text() == (runs.one / "metrics.jsonl").read_text()
    code, said = here("runs", "--runs-dir", tmp_path / "odd")
    assert code == 0 and any(line.startswith("w ") and "complete" in line for line in said)


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", ["a\\b", "/gs/run"])
def test_a_name_that_a_library_cannot_take_is_refused_before_training(runs, here, tmp_path, name):
    code, said = here.train(tmp_path / name)
    assert code == 2 and said[-1].startswith("error: ") and "name another" in said[-1]


@pytest.mark.fault(21)
def test_a_pattern_in_the_path_of_a_bucket_is_refused(tmp_path):
    for url in ("gs://bucket/a[b]", "gs://bucket/a*", "gs://bucket/a?", "gs://bucket/a#1"):
        with pytest.raises(UserError, match="taken for patterns"):
            buckets.stage(url, tmp_path)


@pytest.mark.fault(22)
def test_foreign_files_in_a_run_are_ignored(tmp_path, abstract, capsys):
    workdir, said = saved(tmp_path / "w"), []
    places = [
        workdir,
        workdir / "checkpoints",
        workdir / "hashes",
        *(p for p in (workdir / "checkpoints" / "2").rglob("*") if p.is_dir()),
    ]
    for folder in [*places, workdir / "checkpoints" / "2"]:
        for name in FOREIGN:
            (folder / name).write_bytes(b"\0\1")
    (workdir / "hashes" / "2-p0.json~").write_text("{")
    (workdir / "hashes" / "2-p0 copy.json").write_text("{")
    (workdir / "checkpoints" / "3").write_text("no folder")
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / "1 copy")
    assert (
        verify(buckets.home(workdir) / "checkpoints" / "2", buckets.hashes_of(workdir, 2)) is None and newest_good(workdir) == 2
    )
    assert capsys.readouterr().err.count("is not of the checkpoint") == 1, "reported once"
    checkpoints = Checkpoints(workdir, 2, said.append)
    restored, meta = checkpoints.restore(abstract)
    assert meta == {"step": 2} and restored.model["w"].tolist() == [2.0] * 9 and not said
    checkpoints.save(state(4), {"step": 4})
    checkpoints.close()
    assert newest_good(workdir) == 4 and (workdir / "hashes" / "2-p0 copy.json").exists()


@pytest.mark.fault(22)
def test_foreign_files_beside_runs_are_ignored(runs, copy, here):
    root = copy(runs.one).parent
    for name in FOREIGN:
        (root / name).write_bytes(b"\0")
    assert [run.name for run in list_runs(root)] == ["run"]


@pytest.mark.fault(38)
def test_a_replaced_folder_is_recognised(tmp_path):
    folder = tmp_path / "w"
    folder.mkdir()
    place = Place(folder)
    place.require_there()
    folder.rename(tmp_path / "v")
    folder.mkdir()
    with pytest.raises(Gone, match="moved, deleted or replaced"):
        place.require_there()
    folder.rmdir()
    (tmp_path / "v").rename(folder)
    place.require_there()
    with pytest.raises(Gone, match=r"gone\.txt"), place.while_there():
        (folder / "gone.txt").read_text()
    place.close()


def remove(folder):
    shutil.rmtree(folder, ignore_errors=True)  # a save that is being written adds to it meanwhile


def move(folder):
    folder.rename(folder.with_name("moved"))


def replace(folder):
    move(folder)
    folder.write_text("a file")


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    ("goes", "how"), [("", remove), ("", move), ("", replace), ("..", move), ("checkpoints", move), ("cache", move)]
)
def test_a_folder_lost_during_a_run_ends_it(runs, here, tmp_path, monkeypatch, goes, how):
    workdir, write, gone = tmp_path / "a" / "w", MetricsFile.write, []
    shutil.copytree(runs.cut_one, workdir)
    shutil.copytree(runs.home / "cache", tmp_path / "cache")

    def watched(self, record):
        write(self, record)
        if record["step"] == 7 and not gone:
            gone.append(tmp_path / "cache" if goes == "cache" else (workdir / goes).resolve())
            how(gone[0])

    monkeypatch.setattr(MetricsFile, "write", watched)
    code, said = here(*train_command(runs.home, workdir), "--cache-dir", tmp_path / "cache")
    errors = [line for line in said if line.startswith("error: ")]
    if code == 0:
        report, whole = (json.loads((run / "report.json").read_text()) for run in (workdir, runs.one))
        assert gone and goes in ("cache", "checkpoints") and report["eval"] == whole["eval"]
    else:
        assert code == 2 and len(errors) == 1 and str(gone[0]) in errors[0]


@pytest.mark.fault(38)
def test_a_table_whose_folder_is_lost_ends_in_one_line(own_registry, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("metajax.cli.common.start_jax", lambda cache: None)
    root = tmp_path / "runs"

    def run_experiment(config, workdir, paths, **_):
        workdir.mkdir(parents=True)
        move(root)
        raise FileNotFoundError(2, "No such file or directory", str(workdir))

    monkeypatch.setattr("metajax.experiment.run_experiment", run_experiment)
    assert main(["quickstart", "--runs-dir", str(root), "--cache-dir", str(tmp_path)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(root) in errors[0]
