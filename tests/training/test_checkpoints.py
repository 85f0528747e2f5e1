"""Checkpoints: round trip, which are kept, and damage of every kind."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import Init
from metajax.core.errors import UserError
from metajax.training.checkpoints import Checkpoints, read_parameters
from metajax.training.state import State, from_arrays, to_arrays

WARNINGS: list[str] = []


def make_state(value):
    return State(
        {"w": jnp.full((64, 8), value), "b": jnp.arange(3.0)}, {"mu": jnp.full(5, value)}, jnp.int32(value), jnp.zeros((), bool)
    )


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0))


@pytest.fixture
def saved(tmp_path):
    """Checkpoints at steps 1, 2 and 3 of a run that keeps three."""
    checkpoints = Checkpoints(tmp_path, keep=3, on_warning=lambda m: None)
    for step in (1, 2, 3):
        checkpoints.save(make_state(step), {"step": step})
    checkpoints.close()
    return tmp_path


def reopen(folder):
    WARNINGS.clear()
    return Checkpoints(folder, keep=3, on_warning=WARNINGS.append)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_round_trip_is_exact(saved):
    state, meta = reopen(saved).restore(abstract())
    assert meta == {"step": 3} and not WARNINGS
    for path, value in to_arrays(make_state(3)).items():
        np.testing.assert_array_equal(to_arrays(state)[path], value)


def test_changes_after_a_save_are_not_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in range(1, 6):
        meta = {"counts": {"positions": step}}
        checkpoints.save(make_state(step), meta)
        meta["counts"]["positions"] = -1
    checkpoints.close()
    checkpoints = reopen(tmp_path)
    assert checkpoints.restore(abstract())[1] == {"counts": {"positions": 5}}


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, bpb in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, None)):
        checkpoints.save(make_state(step), {"step": step}, bpb)
    checkpoints.finish()
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.close()


def test_without_scores_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(1, 5):
        checkpoints.save(make_state(step), {"step": step})
    checkpoints.finish()
    assert checkpoints.steps() == [3, 4], "also the checkpoint before the newest, which counts only after hashing"
    checkpoints.close()


def flip_a_bit(folder):
    file = largest_file(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(folder):
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[:-7])


def remove_a_file(folder):
    largest_file(folder).unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, remove_a_file])
def test_damage_is_set_aside_and_the_checkpoint_before_is_used(saved, damage):
    damage(saved / "checkpoints" / "3")
    checkpoints = reopen(saved)
    _, meta = checkpoints.restore(abstract())
    assert meta == {"step": 2}
    assert len(WARNINGS) == 1 and "step 3 is damaged" in WARNINGS[0]
    assert any((saved / "damaged").iterdir()) and checkpoints.steps() == [1, 2]
    checkpoints.save(make_state(3), {"step": 3, "again": True})
    checkpoints.close()
    assert reopen(saved).restore(abstract())[1] == {"step": 3, "again": True}


@pytest.mark.parametrize("content", ["", '{"hosts": 1}', None])
def test_damaged_or_missing_hashes_of_an_older_checkpoint(saved, content):
    flip_a_bit(saved / "checkpoints" / "3")
    file = saved / "hashes" / "2-p0.json"
    file.unlink() if content is None else file.write_text(content)
    _, meta = reopen(saved).restore(abstract())
    assert meta == {"step": 1} and len(WARNINGS) == 2
    assert len([p for p in (saved / "damaged").iterdir() if p.is_dir()]) == 2, "nothing is deleted"


def test_lost_hashes_lose_no_checkpoint(saved):
    for file in (saved / "hashes").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no good checkpoint is left"):
        reopen(saved).restore(abstract())
    assert len([p for p in (saved / "damaged").iterdir() if p.is_dir()]) == 3


def test_a_save_without_hashes_does_not_count(saved):
    (saved / "hashes" / "3-p0.json").unlink()
    _, meta = reopen(saved).restore(abstract())
    assert meta == {"step": 2} and not WARNINGS


def test_without_a_good_checkpoint_an_error_deletes_nothing(saved):
    for step in ("1", "2", "3"):
        flip_a_bit(saved / "checkpoints" / step)
    with pytest.raises(UserError, match="no good checkpoint is left"):
        reopen(saved).restore(abstract())
    assert len(WARNINGS) == 3
    kept = [p for p in (saved / "damaged").iterdir() if p.is_dir()]
    assert len(kept) == 3


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert reopen(tmp_path).restore(abstract()) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace(model={**s.model, "extra": jnp.zeros(2)}), "lacks model/extra"),
        (lambda s: s.replace(model={"w": s.model["w"]}), "has model/b, which this model does not have"),
        (lambda s: s.replace(model={**s.model, "b": jnp.zeros(4)}), r"model/b has shape \(3,\), this model needs \(4,\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_named(saved, change, message):
    other = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), change(make_state(0)))
    with pytest.raises(UserError, match=message):
        reopen(saved).restore(other)
    assert (saved / "checkpoints" / "3").exists()


def test_parameters_can_be_read_alone_and_damage_is_skipped(saved):
    like = abstract().model
    assert float(read_parameters(saved, like)["w"][0, 0]) == 3.0
    flip_a_bit(saved / "checkpoints" / "3")
    before = sorted(str(p) for p in saved.rglob("*"))
    assert float(read_parameters(saved, like)["w"][0, 0]) == 2.0
    assert sorted(str(p) for p in saved.rglob("*")) == before, "reading changes nothing"
    shutil.rmtree(saved / "checkpoints")
    with pytest.raises(UserError, match="no complete checkpoint"):
        read_parameters(saved, like)


def test_parts_of_the_parameters_are_read_under_other_names(saved):
    like = {"body": {"w": abstract().model["w"]}, "b": abstract().model["b"]}
    fresh = {"body": {"w": jnp.zeros((64, 8))}, "b": jnp.full(3, 7.0)}
    found = read_parameters(saved, like, Init("run?body/w=w").parts, fresh)
    assert float(found["body"]["w"][0, 0]) == 3.0 and float(found["b"][0]) == 7.0, "other parameters stay fresh"
    assert Init("run?b&body=x/y").parts == {"b": "b", "body": "x/y"} and Init("run?b").run == "run" and not Init("run").parts


@pytest.mark.parametrize(
    ("like", "parts", "message"),
    [
        ({"w": jnp.zeros((64, 9)), "b": jnp.zeros(3)}, {}, r"w has shape \(64, 8\), this model needs \(64, 9\)"),
        ({"w": jnp.zeros((64, 8))}, {}, "has b, which this model does not have"),
        ({"head": {"w": jnp.zeros((64, 8))}}, {"head": "tail"}, "lacks tail/w"),
        ({"w": jnp.zeros((64, 8))}, {"v": "w"}, "this model has no part 'v'"),
    ],
)
def test_parameters_that_do_not_fit_are_named(saved, like, parts, message):
    with pytest.raises(UserError, match=message):
        read_parameters(saved, like, parts, like)


def test_parameter_paths_are_plain_names(saved):
    hashes = json.loads((saved / "hashes" / "3-p0.json").read_text())
    assert hashes["files"]
    arrays = to_arrays({"blocks": {"w": jnp.zeros(2)}, "count": (jnp.zeros(()),)})
    assert sorted(arrays) == ["blocks/w", "count/0"]
    with pytest.raises(UserError, match="lacks blocks/w"):
        from_arrays({"blocks": {"w": jnp.zeros(2)}}, {}, "it")
