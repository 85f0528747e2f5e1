"""Checks before a run on several hosts: all hosts answer with the same code and data, and so does the storage.

Every check runs in a separate process with a time limit, because reading a bucket without credentials, or a collective with a
missing host, can hang forever. Run the same command on all hosts at about the same time; on one host it checks that machine.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metajax.core.errors import Stopped, UserError, require
from metajax.core.progress import echo
from metajax.core.storage import SCHEME, outages, require_bucket

REMEDIES = {  # remedy for a check that does not return
    "place": "ask the launcher: outside Cloud TPU, GKE and Slurm give --coordinator, --processes and --process-id",
    "data": "is its bucket readable from this host (gcloud auth application-default login), its file system mounted?",
    "hosts": "are all hosts running this command, and is the coordinator's port open between them?",
    "storage": "is the bucket writable from this host (gcloud auth application-default login), the file system mounted?",
    "collective": "is another program using the chips of some host (sudo fuser /dev/accel* /dev/vfio/*)? else restart that host",
}


def preflight(arguments: dict[str, Any], seconds: float) -> list[tuple[str, bool, str]]:
    """Run all checks in order; each reads the findings of the earlier ones.

    Args:
      arguments: coordinator, processes, process (None: from the environment), workdir, sources, data_dir, cache_dir, and `facts`
        that must agree on all hosts, such as the hash of the configuration.
      seconds: the time limit of each check.

    Returns:
      (check, whether it passed, the finding or the error with its remedy) of each check.
    """
    findings = []
    for check in CHECKS:
        good, text, found = _bounded(check, arguments, seconds)
        arguments = {**arguments, **found, "facts": {**arguments["facts"], **found.get("facts", {})}}
        findings.append((check, good, text))
    return findings


def _bounded(check: str, arguments: dict[str, Any], seconds: float) -> tuple[bool, str, dict[str, Any]]:
    """Whether a check passed, its text, and what it found for the later ones."""
    command = [sys.executable, "-m", "metajax.cli.preflight", check, json.dumps({**arguments, "seconds": seconds})]
    here, remedy = socket.gethostname(), REMEDIES[check]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False, f"{here}: no answer within {seconds:g} s; {remedy}", {}
    if done.returncode == 0:
        answer = json.loads(done.stdout.splitlines()[-1])
        return True, answer.pop("text"), answer
    last = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
    return False, last if done.returncode == 2 else f"{here}: {last}; {remedy}", {}


def _place(arguments: dict[str, Any]) -> dict[str, Any]:
    from metajax.distributed.hosts import find_place

    place = find_place(arguments["coordinator"], arguments["processes"], arguments["process"])
    if place is None or place.processes == 1:
        return {"text": "one process", "coordinator": None, "processes": 1, "process": 0}
    found = {"coordinator": place.coordinator, "processes": place.processes, "process": place.process}
    return {"text": f"process {place.process} of {place.processes}, coordinator {place.coordinator}"} | found


def _data(arguments: dict[str, Any]) -> dict[str, Any]:
    from etils import epath

    from metajax.data.cache import digest
    from metajax.data.sources import open_source

    folder, cache = arguments["data_dir"], Path(arguments["cache_dir"])
    sources = [open_source(spec, cache_dir=cache, data_dir=folder and epath.Path(folder)) for spec in arguments["sources"]]
    for source in sources:
        source[0], source[len(source) - 1]
    sizes = ", ".join(f"{source.spec}: {len(source):,} documents" for source in sources)
    return {"text": sizes or "no experiment named", "facts": {"data": digest([source.fingerprint() for source in sources])}}


def _hosts(arguments: dict[str, Any]) -> dict[str, Any]:
    count, me, address = arguments["processes"], arguments["process"], arguments["coordinator"]
    if count == 1:
        return {"text": "no others"}
    facts = {**arguments["facts"], "host": socket.gethostname()}
    everyone = _meet(address, count, me, facts, time.monotonic() + arguments["seconds"] - 2.0)
    missing = ", ".join(str(i) for i, other in enumerate(everyone) if other is None)
    remedy = "start the same command there, and check that these machines are up"
    require(not missing, f"of {count} processes {missing} did not reach {address}; {remedy}")
    first = everyone[0]
    for i, other in enumerate(everyone):
        here, there = f"process {i} ({other['host']})", f"process 0 ({first['host']})"
        remedy = f"install the same code, requirements and data on {other['host']}, and give the same command"
        for name in first:
            alike = name == "host" or other[name] == first[name]
            require(alike, f"{here} has {name} {other[name]}, {there} {first[name]}; {remedy}")
    return {"text": f"all {count} processes met: " + ", ".join(other["host"] for other in everyone)}


def _meet(address: str, count: int, me: int, facts: dict[str, Any], deadline: float) -> list[Any]:
    """The facts of all processes; None for those that did not report to process 0 before the deadline.

    By plain sockets: JAX would not name the missing processes, and its versions may differ between the hosts.
    """
    host, _, port = address.rpartition(":")
    if me == 0:
        return _collect(int(port), count, facts, deadline)
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=max(0.1, deadline - time.monotonic())) as line:
                line.settimeout(max(0.1, deadline + 1.0 - time.monotonic()))
                line.sendall(json.dumps([me, facts]).encode() + b"\n")
                return json.loads(line.makefile().readline())
        except OSError as error:
            if time.monotonic() >= deadline:
                remedy = "start the command on process 0 too, and open that port between the hosts"
                where = f"process {me} ({facts['host']})"
                raise UserError(f"{where} does not reach the coordinator {address} ({error}); {remedy}") from None
            time.sleep(0.1)


def _collect(port: int, count: int, facts: dict[str, Any], deadline: float) -> list[Any]:
    """On process 0: collect the facts of all processes that report in time, and send all facts to these processes."""
    everyone, guests = [facts, *[None] * (count - 1)], []
    with socket.create_server(("", port), backlog=count) as server:
        while None in everyone and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                guest, _ = server.accept()
            except TimeoutError:
                break
            guest.settimeout(max(0.1, deadline - time.monotonic()))
            number, its_facts = json.loads(guest.makefile().readline())
            require(0 < number < count, f"a process has number {number} of {count}; give each process its own --process-id")
            everyone[number] = its_facts
            guests.append(guest)
        for guest in guests:
            with guest:
                guest.sendall(json.dumps(everyone).encode() + b"\n")
    return everyone


def _storage(arguments: dict[str, Any]) -> dict[str, Any]:
    from etils import epath

    began, content, here = time.monotonic(), secrets.token_hex(8), socket.gethostname()
    probe, on_bucket = epath.Path(arguments["workdir"]) / f".probe-{content}", arguments["workdir"].startswith(SCHEME)
    try:
        if on_bucket:
            require_bucket(arguments["workdir"])
        else:
            probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text(content)
        found = _read_as_checkpoints(probe) if on_bucket else probe.read_text()
        probe.unlink()
    except OSError as error:
        remedy = "free space or permissions there, or another --workdir"
        raise UserError(f"{here}: {probe.parent} cannot be written ({error}); {remedy}") from None
    require(found == content, f"{here}: {probe} reads back as something else; use another --workdir")
    return {"text": f"{probe.parent}: written, read back and deleted in {time.monotonic() - began:.2f} s"}


def _read_as_checkpoints(path: Any) -> str:
    """Read a file of a bucket through TensorStore, which authenticates itself."""
    import tensorstore

    return tensorstore.KvStore.open(f"{path.parent}/").result().read(path.name).result().value.decode()


def _collective(arguments: dict[str, Any]) -> dict[str, Any]:
    import jax

    from metajax.distributed.hosts import Place, connect, gather

    if arguments["processes"] > 1:
        place = Place(arguments["coordinator"], arguments["processes"], arguments["process"])
        connect(place, seconds=max(1, int(arguments["seconds"]) - 2))
    gather("compile")
    began = time.monotonic()
    gather("go")
    took = time.monotonic() - began
    devices = f"{jax.device_count()} devices ({jax.devices()[0].device_kind}) in {jax.process_count()} processes"
    return {"text": f"{devices}, a gather over all in {1000 * took:.1f} ms"}


CHECKS = {"place": _place, "data": _data, "hosts": _hosts, "storage": _storage, "collective": _collective}


def main(words: Sequence[str]) -> int:
    """Run one check in this process: print its finding as a line of JSON, or the error as one line with exit code 2."""
    try:
        with outages():
            echo(json.dumps(CHECKS[words[0]](json.loads(words[1]))))
    except (UserError, Stopped) as error:
        echo(str(error), stream=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
