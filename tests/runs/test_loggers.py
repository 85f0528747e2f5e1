"""Weights & Biases: a run's id is made once and stored in its folder, and two folders never share an id."""

import shutil
import sys
from types import SimpleNamespace

import pytest

from metajax.runs.metrics import Loggers, logger_id

pytestmark = pytest.mark.fault(17)


def test_folders_of_the_same_name_have_ids_of_their_own(tmp_path):
    folders = [tmp_path / where / "lr" / "cpu" / "0a-s0" for where in ("first", "second")]
    for folder in folders:
        folder.mkdir(parents=True)
    ids = [logger_id(folder) for folder in folders]
    assert ids[0] != ids[1] and [logger_id(folder) for folder in folders] == ids


def test_a_moved_folder_keeps_its_id_and_a_copy_gets_another(tmp_path):
    (tmp_path / "a").mkdir()
    made = logger_id(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    other = logger_id(tmp_path / "copy")
    assert other != made and logger_id(tmp_path / "copy") == other and logger_id(tmp_path / "a") == made
    (tmp_path / "a").rename(tmp_path / "b")
    assert logger_id(tmp_path / "b") == made
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert logger_id(tmp_path / "link") == made == logger_id(tmp_path / "b"), "the same folder by another name"


def test_a_damaged_id_is_reported_and_replaced(tmp_path, capsys):
    made = logger_id(tmp_path)
    (tmp_path / "wandb.json").write_text("{")
    assert logger_id(tmp_path) != made and "wandb.json is damaged" in capsys.readouterr().err


def test_weights_and_biases_gets_the_stored_id(tmp_path, tiny_config, monkeypatch):
    calls = []
    fake = SimpleNamespace(init=lambda **given: calls.append(given) or SimpleNamespace(log=None, finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        Loggers(tiny_config(**{"runtime.loggers": "wandb"}), tmp_path, 0).close()
    assert [call["id"] for call in calls] == [logger_id(tmp_path)] * 2 and calls[0]["resume"] == "allow"
