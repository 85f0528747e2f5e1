"""Atomic writes: a file is complete or absent, even on a full disk."""

import errno
import os
from functools import partial

import pytest

from metajax.core.atomic import storage_errors, whole_folder, write_text

pytestmark = pytest.mark.fault(35)


def test_a_file_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []

    def note(name, act, *arguments):
        calls.append(name)
        act(*arguments)

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, partial(note, name, getattr(os, name)))
    write_text(tmp_path / "deep/a.json", "{}")
    assert calls == ["fsync", "replace", "fsync"] and (tmp_path / "deep/a.json").read_text() == "{}"
    calls.clear()
    with whole_folder(tmp_path / "folder") as work:
        (work / "inside").mkdir()
        (work / "inside/x").write_text("x")
    assert calls == ["fsync"] * 3 + ["replace", "fsync"], "the file, its folder, the folder itself; then the name"


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    with pytest.raises(OSError) as failed:
        write_text(tmp_path / "a.json", "new")
    assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, str(tmp_path / "a.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (OSError(errno.ENOSPC, "Error writing bytes to file"), errno.ENOSPC),
        (RuntimeError(f"write() failed: {os.strerror(errno.ENOSPC)}; writing x"), errno.ENOSPC),
        (RuntimeError(f"write() failed: {os.strerror(errno.EDQUOT)}"), errno.EDQUOT),
    ],
)
def test_a_library_error_of_a_full_disk_names_the_path(tmp_path, raised, number):
    with pytest.raises(OSError) as failed, storage_errors(tmp_path):
        raise raised
    assert failed.value.errno == number and failed.value.filename == str(tmp_path)


@pytest.mark.parametrize(
    "raised", [RuntimeError("something else"), FileNotFoundError(errno.ENOENT, "no such file", "x"), ValueError()]
)
def test_other_errors_pass_unchanged(tmp_path, raised):
    with pytest.raises(type(raised)) as failed, storage_errors(tmp_path):
        raise raised
    assert failed.value is raised
