"""Folders whose files are checked: arrays whole, large ones block by block."""

import pickle

import numpy as np
import pytest

from metajax.core import sealed
from metajax.core.errors import UserError
from metajax.core.sealed import Blocks, Sealed, save_array, sealed_folder
from tests.damage import flip

pytestmark = pytest.mark.fault(8)


def test_blocks_are_checked_as_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "BLOCK", 1 << 10)
    values = np.arange(3000, dtype=np.int32)
    with sealed_folder(tmp_path / "a/b") as work:
        save_array(work / "x.npy", values)
    flip(tmp_path / "a/b/x.npy", tmp_path, at=0.5)
    found = Blocks(Sealed(tmp_path / "a/b"), "x.npy")
    assert len(found) == 3000
    for blocks in (found, pickle.loads(pickle.dumps(found))):
        np.testing.assert_array_equal(blocks[:1200], values[:1200])
        np.testing.assert_array_equal(blocks[1900:], values[1900:])
        for read in (lambda b: b[1490:1510], lambda b: b[1300:1301], np.asarray, lambda b: b.tolist()):
            with pytest.raises(UserError, match=r"x\.npy: changed or damaged"):
                read(blocks)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (5, 3), ()])
def test_arrays_come_back(tmp_path, shape):
    with sealed_folder(tmp_path / "a/b") as work:
        save_array(work / "x.npy", np.ones(shape, np.int16))
    found = Sealed(tmp_path / "a/b").array("x.npy")
    assert found.shape == shape and found.dtype == np.int16 and (found == 1).all()
