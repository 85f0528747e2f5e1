"""The `checkpoints` verb: listed checkpoints, damaged ones, and those that may be deleted."""

import jax.numpy as jnp
import pytest

from metajax.training.checkpoints import Checkpoints
from metajax.training.inventory import inventory, prune
from metajax.training.state import State


@pytest.fixture
def workdir(tmp_path):
    """A run with checkpoints at steps 1, 2 and 3, one set aside."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(State({"w": jnp.full(9, step)}, {}, jnp.int32(step), jnp.zeros((), bool)), {"step": step})
    checkpoints.close()
    (tmp_path / "damaged" / "0-1").mkdir(parents=True)
    return tmp_path


def damage(workdir, step):
    path = max((p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


def test_all_are_listed_and_damage_is_found_by_reading(workdir):
    damage(workdir, 2)
    (workdir / "hashes" / "3-p0.json").rename(workdir / "aside.json")
    states = {one.step: one.state for one in inventory(workdir, read_all=False)}
    assert states == {1: "complete", 2: "complete", 3: "without hashes: cut off, or being written"}
    (workdir / "aside.json").rename(workdir / "hashes" / "3-p0.json")
    read = inventory(workdir, read_all=True)
    assert [one.damaged for one in read] == [False, True, False] and "has changed since it was written" in read[1].state
    assert all(one.bytes > 0 for one in read)


def test_the_newest_good_checkpoints_stay(workdir):
    damage(workdir, 3)
    assert sorted(path.name for path in prune(workdir, 1)) == ["1", "3", "damaged"]
    [left] = inventory(workdir, read_all=True)
    assert (left.step, left.damaged) == (2, False)
    assert [path.name for path in (workdir / "hashes").iterdir()] == ["2-p0.json"]


def test_without_a_good_checkpoint_nothing_is_deleted(workdir):
    for step in (1, 2, 3):
        damage(workdir, step)
    assert prune(workdir, 1) == [] and len(inventory(workdir, read_all=False)) == 3
