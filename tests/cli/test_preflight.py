"""Preflight: hosts that meet, fail to meet or differ; storage; a check that never returns."""

import socket
import sys
import threading
import time

import pytest

from metajax.cli import preflight
from metajax.cli.main import main
from metajax.core.errors import UserError


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def meet(address, facts, count=None, seconds=4.0):
    """The findings of each process, started with these facts."""
    found = [None] * len(facts)

    def one(i):
        arguments = {
            "coordinator": address,
            "processes": count or len(facts),
            "process": i,
            "facts": facts[i],
            "seconds": seconds,
        }
        try:
            found[i] = preflight._hosts(arguments)["text"]
        except UserError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_equal_hosts_pass_every_check(address):
    first, *others = meet(address, [{"jax": "1", "code": "abc"}] * 3)
    assert first.startswith("all 3 processes met: ") and set(others) == {first}


def test_a_host_that_differs_is_named_on_every_host(address):
    for said in meet(address, [{"jax": "1"}, {"jax": "1"}, {"jax": "2"}]):
        assert "process 2 (" in said and "has jax 2, process 0 (" in said and "install the same code" in said


def test_a_missing_host_is_named_on_the_present_hosts(address):
    began = time.monotonic()
    for said in meet(address, [{}, {}], count=4):
        assert said.startswith("of 4 processes 2, 3 did not reach") and "start the same command there" in said
    assert time.monotonic() - began < 4.0


def test_an_unreachable_coordinator_is_named(address):
    arguments = {"coordinator": address, "processes": 2, "process": 1, "facts": {}, "seconds": 2.3}
    with pytest.raises(UserError, match=r"process 1 .* does not reach the coordinator .*open that port"):
        preflight._hosts(arguments)


def test_storage_is_written_and_read_back(tmp_path):
    assert "written, read back and deleted" in preflight._storage({"workdir": str(tmp_path / "new")})["text"]
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*another --workdir"):
        preflight._storage({"workdir": str(tmp_path / "file")})


def test_a_hanging_check_is_ended_and_a_failing_check_is_reported(monkeypatch):
    monkeypatch.setitem(preflight.REMEDIES, "storage", "mount it")
    began = time.monotonic()
    good, text, _ = preflight._bounded("storage", {}, seconds=0.05)
    assert not good and "no answer within 0.05 s; mount it" in text and time.monotonic() - began < 10
    monkeypatch.setattr(sys, "executable", "/bin/false")
    good, text, _ = preflight._bounded("storage", {}, seconds=5.0)
    assert not good and "ended with 1; mount it" in text


def test_preflight_writes_to_the_folder_of_the_runs(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(preflight, "preflight", lambda arguments, seconds: seen.update(arguments) or [])
    assert main(["preflight", "--runs-dir", str(tmp_path)]) == 0 and seen["workdir"] == str(tmp_path)
    assert main(["preflight", "--workdir", "elsewhere", "--runs-dir", str(tmp_path)]) == 0 and seen["workdir"] == "elsewhere"
