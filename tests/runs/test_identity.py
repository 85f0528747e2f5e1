"""A checkpoint stores its run; every reader of checkpoints refuses one of another run, by name."""

import shutil

import pytest

from metajax.core.errors import UserError
from metajax.runs.directory import identity_of, require_same_run
from metajax.training.checkpoints import newest_good, saved_identity
from metajax.training.inventory import inventory, prune

pytestmark = pytest.mark.fault(10)


def put(source, workdir, step):
    """Put another run's checkpoint, with its hashes, in the place of this run's."""
    shutil.rmtree(workdir / "checkpoints" / str(step))
    shutil.copytree(source / "checkpoints" / str(step), workdir / "checkpoints" / str(step))
    shutil.copy(source / "hashes" / f"{step}-p0.json", workdir / "hashes")


def refused(code, said):
    [line] = [line for line in said if line.startswith("error: ")]
    assert code == 2 and "seed 1" in line and "seed 0" in line and "another run" in line
    return line


def test_a_resumed_run_refuses_anothers_checkpoint(runs, here, copy):
    workdir = copy(runs.cut_one)
    put(runs.cut_other, workdir, 6)
    assert "checkpoint 6" in refused(*here.train(workdir))
    shutil.rmtree(workdir / "checkpoints" / "6")
    code, _ = here.train(workdir)
    assert code == 0 and (workdir / "metrics.jsonl").read_text() == (runs.one / "metrics.jsonl").read_text()


def test_eval_generate_and_export_refuse_anothers_checkpoint(runs, here, copy):
    workdir = copy(runs.one)
    put(runs.other, workdir, 8)
    refused(*here.eval(workdir))
    refused(*here("generate", workdir, "--prompt", "one", "--tokens", "2"))
    refused(*here("export", "gpt2", workdir, workdir.parent / "out"))


def test_a_run_that_starts_from_it_refuses_anothers_checkpoint(runs, here, copy, tmp_path):
    parent = copy(runs.one, "parent")
    put(runs.other, parent, 8)
    refused(*here.train(tmp_path / "child", f"init.from={parent}"))


def test_the_inventory_shows_it_and_prune_does_not_count_it(runs, copy):
    workdir = copy(runs.one)
    put(runs.other, workdir, 8)
    assert [kept.damaged for kept in inventory(workdir, read_all=True)] == [False, False, True]
    prune(workdir, 1)
    assert (workdir / "checkpoints" / "6").is_dir() and not (workdir / "checkpoints" / "4").exists()


def test_a_copied_folder_is_the_same_run(runs, here, copy):
    workdir = copy(runs.cut_one, "elsewhere")
    (workdir / ".lock").write_text("4711")  # of a process that is gone
    code, _ = here.train(workdir)
    assert code == 0 and (workdir / "metrics.jsonl").read_text() == (runs.one / "metrics.jsonl").read_text()


def test_a_checkpoint_stores_the_identity_of_its_run(runs):
    assert saved_identity(runs.one, newest_good(runs.one)) == identity_of(runs.one)
    assert identity_of(runs.one).keys() == {"name", "scale", "seed", "hash", "key", "tokenizer"}


def test_a_checkpoint_of_an_earlier_version_has_only_its_hash(runs):
    mine = identity_of(runs.one)
    require_same_run({"hash": mine["hash"]}, mine, "it", runs.one)
    require_same_run({}, mine, "it", runs.one)
    with pytest.raises(UserError, match="hash 0; this run: hash"):
        require_same_run({"hash": "0"}, mine, "it", runs.one)
    for name, value in (("name", "x"), ("scale", "gpu"), ("seed", 7), ("key", "x"), ("tokenizer", "x")):
        with pytest.raises(UserError):
            require_same_run(mine | {name: value}, mine, "it", runs.one)


def test_without_data_json_the_data_is_still_checked(runs, here, copy):
    workdir = copy(runs.cut_one)
    (workdir / "data.json").unlink()
    changed = runs.home / "changed.jsonl"
    changed.write_text((runs.home / "corpus.jsonl").read_text().replace("seven", "eight"))
    code, said = here.train(workdir, f"data.sources=jsonl:{changed}?origin=module")
    assert code == 2, said
