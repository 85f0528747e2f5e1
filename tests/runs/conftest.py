"""A tiny run, one with another seed, and both in the state after a kill; tests use copies."""

import shutil
from types import SimpleNamespace

import jax
import pytest

from metajax.cli.main import main
from metajax.runs.files import write_json
from tests.faults.suite import command, write_corpus

STEPS, SAVED = 8, 6


class Commands:
    """The command line in this process: `here(WORDS)` gives (exit code, lines that were printed)."""

    def __init__(self, home, capsys):
        self.home, self._capsys = home, capsys

    def __call__(self, *words):
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        said = self._capsys.readouterr()
        return code, [*said.out.splitlines(), *said.err.splitlines()]

    def train(self, workdir, *changes):
        return self(*train_command(self.home, workdir, *changes))

    def eval(self, workdir):
        return self("eval", workdir, "--cache-dir", self.home / "cache", "--runs-dir", workdir.parent)


def train_command(home, workdir, *changes):
    return command(home, workdir, f"training.steps={STEPS}", "runtime.save_every=2", "runtime.keep=3", *changes)


def kill(run, target):
    """A copy of a complete run in the state after a kill following the save at SAVED."""
    shutil.copytree(run, target)
    for name in ("report.json", "report.html", f"hashes/{STEPS}-p0.json"):
        (target / name).unlink()
    shutil.rmtree(target / "checkpoints" / str(STEPS))
    write_json(target / "warnings.json", {"warnings": ["an earlier warning"]})
    return target


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """home, one, other (another seed), and copies of both after a kill, which have a warning."""
    home = tmp_path_factory.mktemp("runs")
    write_corpus(home / "corpus.jsonl")
    folders = {name: home / "runs" / name for name in ("one", "other")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metajax.cli.common.start_jax", lambda cache: None)
        for name, workdir in folders.items():
            words = train_command(home, workdir)
            assert main([*words, *(("--seed", "1") if name == "other" else ())]) == 0
    return SimpleNamespace(home=home, **folders, **{f"cut_{name}": kill(folders[name], home / f"cut_{name}") for name in folders})


@pytest.fixture
def here(runs, capsys, monkeypatch):
    """Run the command line in this process, with programs that are compiled once for all tests."""
    monkeypatch.setattr("metajax.cli.common.start_jax", lambda cache: None)
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield Commands(runs.home, capsys)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture
def copy(tmp_path):
    """copy(run, name="run") -> a copy of a run's folder that the test may damage."""

    def made(run, name="run"):
        return shutil.copytree(run, tmp_path / "runs" / name)

    return made
