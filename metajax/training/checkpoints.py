"""Orbax checkpoints that hold {path: array}, with hashes written after the commit and verified before a restore.

Orbax commits atomically but does not notice a file that changes afterwards. So after a save is committed, each host writes the
SHA-256 of its share of the files, in the background. A save is complete when its hashes exist. A complete checkpoint that
fails verification is moved aside, never deleted, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from metajax.core.errors import UserError, nearest, require
from metajax.core.progress import say, warn
from metajax.core.storage import files, hashes_of, home, literal, move, publish, steps_of
from metajax.distributed.hosts import gather, is_first, of_first
from metajax.runs.directory import identity_of, require_same_run
from metajax.runs.files import Damaged, read_json, write_json
from metajax.training.state import State, from_arrays, to_arrays

RUN = "run"  # key in a checkpoint's meta for the identity of its run
COMMIT_SECONDS = 600.0  # limit for process 0 to commit a save after all processes have written their parts
_say_once = functools.cache(say)


def folder_of(workdir: Path, step: int) -> Any:
    """The folder of a checkpoint, which may be on a bucket."""
    return home(workdir) / "checkpoints" / str(step)


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Re-raise the operating system's error from inside the writing library as the original OSError."""
    logging.getLogger("asyncio").addFilter(_is_news)
    try:
        yield
    except ValueError as error:
        code = _os_error(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(folder)) from error


def _os_error(error: BaseException | None) -> int | None:
    """The error number of the operating system inside an error of the writing library; None if there is none."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found.group(1)) if found else errno.ENOENT if str(error).startswith("NOT_FOUND") else None


def _is_news(record: logging.LogRecord) -> bool:
    """False for a failed write beside the one that was raised: arrays are written side by side and fail together."""
    return not (record.exc_info and isinstance(record.exc_info[1], ValueError) and _os_error(record.exc_info[1]))


class Checkpoints:
    """The checkpoints of one run: DIR/checkpoints/STEP, DIR/hashes/STEP-pHOST.json, and DIR/damaged/ for those that failed.

    Args:
      workdir: of the run; DIR is its home, which may be a bucket.
      keep: number of newest checkpoints to keep, at least two; the one with the best validation score is also kept.
      on_warning: called with the reason when a checkpoint is set aside.
      identity: of the run, written into every checkpoint; a checkpoint of another run is refused.
    """

    def __init__(
        self, workdir: Path, keep: int, on_warning: Callable[[str], None] = warn, identity: Mapping[str, Any] | None = None
    ):
        self._workdir, self._identity, self._warn = workdir, identity, on_warning
        self.folder, self.damaged = home(workdir) / "checkpoints", home(workdir) / "damaged"
        self._host, self._hosts = jax.process_index(), jax.process_count()
        score = {"get_metric_fn": lambda metrics: metrics["score"], "keep_checkpoints_without_metrics": False}
        newest = policies.LatestN(max(keep, 2))  # a save is complete when it is hashed; until then the previous one must exist
        kept = policies.AnyPreservationPolicy([newest, policies.BestN(reverse=True, n=1, **score)])
        options = ocp.CheckpointManagerOptions(preservation_policy=kept, cleanup_tmp_directories=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hashes")
        self._unhashed: int | None = None
        self._jobs: list[Future] = []
        self.blocked_seconds = 0.0

    def save(self, state: State, meta: dict[str, Any], score: float | None = None) -> None:
        """Start saving at state.step; returns when the arrays are copied off the devices. `meta` is JSON-ready.

        The checkpoint with the lowest `score` is also kept. `meta` is copied, because it is written in the background
        while the caller may change it.
        """
        started = time.monotonic()
        self.finish()
        step = int(jax.device_get(state.step))
        meta = copy.deepcopy(meta) | ({RUN: dict(self._identity)} if self._identity else {})
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(to_arrays(state)), meta=ocp.args.JsonSave(meta))
        with _storage_errors(self.folder):
            self._manager.save(step, args=arguments, metrics=None if score is None else {"score": score}, force=True)
        self._unhashed = step
        self.blocked_seconds += time.monotonic() - started

    def poll(self) -> None:
        """Hash a save that has been committed in the meantime; cheap, called between steps."""
        if self._unhashed is not None and not self._manager.is_saving_in_progress():
            self._hash()

    def finish(self) -> None:
        """Wait until every save is committed and hashed; errors of the background work surface here."""
        self._hash()
        while self._jobs:
            self._jobs.pop().result()

    def _hash(self) -> None:
        """Hash the newest save, if it has no hashes, in the background after it is committed. A failed save raises here once."""
        if (step := self._unhashed) is not None:
            self._unhashed = None
            with _storage_errors(self.folder):
                self._manager.wait_until_finished()
            self._jobs.append(self._hasher.submit(self._write_hashes, step))

    def close(self) -> None:
        """Finish and release the threads."""
        self.finish()
        self._hasher.shutdown()
        self._manager.close()

    def _write_hashes(self, step: int) -> None:
        folder, deadline = self.folder / str(step), time.monotonic() + COMMIT_SECONDS
        while not ocp.utils.is_checkpoint_finalized(folder):
            require(time.monotonic() < deadline, f"the save at step {step} was not committed within {COMMIT_SECONDS:g} s")
            time.sleep(0.02)
        mine = list(files(folder))[self._host :: self._hosts]
        hashes = {"hosts": self._hosts, "files": {name: _sha256(folder / name) for name in mine}}
        if is_first():
            publish(self._workdir)  # before the save is complete, because a resumed run does not repeat its steps
        write_json(home(self._workdir) / "hashes" / f"{step}-p{self._host}.json", hashes)
        for old in hashes_of(self._workdir) if is_first() else ():
            if not (self.folder / old.name.partition("-")[0]).exists():
                old.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first, as process 0 sees them."""
        return of_first(sorted(self._manager.all_steps()))

    def _problem(self, step: int) -> str | None:
        """None if every file is as committed, else a description of the damage; each process reads its share of the files."""
        found = gather(verify(self.folder / str(step), hashes_of(self._workdir, step), self._host, self._hosts) or "")
        return next(filter(None, found), None)

    def restore(self, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """The newest checkpoint that verifies as (state, meta), with the shardings of `abstract`; None if there are none.

        A save without all its hashes, because the process was killed before it wrote them, is incomplete and is ignored.
        UserError if there are checkpoints but none of them is good, or if the newest belongs to another run.
        """
        steps = self.steps()
        if steps and of_first(_cut_off(hashes_of(self._workdir, steps[-1]))):
            say(f"the save at step {steps[-1]} was cut off before it was complete; it is kept in {self.damaged}")
            self._set_aside(steps.pop())
        for step in reversed(steps):
            problem = self._problem(step)
            if problem is None:
                return self._read(step, abstract)
            kept = f"it is kept in {self.damaged} and the one before is used"
            self._warn(f"the checkpoint at step {step} is damaged ({problem}); {kept}")
            self._set_aside(step)
        remedy = "Start over with another --workdir, or restore the folder from a copy"
        damaged = f"the damaged ones are in {self.damaged}"
        require(not steps, f"no good checkpoint is left in {self.folder}; {damaged}. {remedy}")
        return None

    def _read(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        what, stored = f"the checkpoint at step {step}", self._manager.item_metadata(step)["state"]
        shapes = {path: jax.ShapeDtypeStruct(item.shape, item.dtype) for path, item in stored.items()}
        from_arrays(abstract, shapes, what)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(to_arrays(abstract)), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=arguments)
        if self._identity is not None:
            require_same_run(_whose(restored["meta"]), self._identity, f"checkpoint {step} in {self.folder}", self._workdir)
        return from_arrays(abstract, restored["state"], what), restored["meta"]

    def _set_aside(self, step: int) -> None:
        if is_first():
            target = self.damaged / f"{step}-{time.time_ns()}"
            if (self.folder / str(step)).exists():
                move(self.folder / str(step), target)
            for file in hashes_of(self._workdir, step):
                move(file, self.damaged / f"{target.name}-{file.name}")
        gather("")  # wait, so that no process looks before the move is done
        self._manager.reload()


def _cut_off(hash_files: list[Path]) -> bool:
    """Whether some hashes of a save are missing but none is damaged: the run was killed while it wrote them."""
    try:
        counts = [read_json(file)["hosts"] for file in hash_files]
    except Damaged:
        return False
    return len(counts) < max(counts, default=1)


def _whose(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """The identity of the run that saved a checkpoint; only the hash if an earlier version saved it."""
    return meta.get(RUN) or ({"hash": meta["config_hash"]} if "config_hash" in meta else {})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path, hash_files: list[Path], host: int = 0, hosts: int = 1) -> str | None:
    """A description of what is wrong with a checkpoint, or None. Host `host` checks every `hosts`-th file."""
    expected: dict[str, str] = {}
    writers = 1
    for file in hash_files:
        try:
            saved = read_json(file)
        except Damaged:
            return f"its hash file {file.name} is not readable"
        writers, expected = saved["hosts"], expected | saved["files"]
    if not hash_files:
        return "its hashes are missing"
    if len(hash_files) < writers:
        return f"the hashes of {writers - len(hash_files)} hosts are missing"
    if not (there := files(folder)):
        return "its folder is gone"
    for name, sha in sorted(expected.items())[host::hosts]:
        if name not in there:
            return f"{name} is missing"
        if _sha256(folder / name) != sha:
            return f"{name} has changed since it was written"
    if extra := sorted(there.keys() - expected.keys()):
        _say_once(f"{folder / extra[0]} is not of the checkpoint: it is left alone")
    return None


def save_arrays(folder: Path, tree: Any) -> None:
    """Write a pytree as {path: array} into a new folder, an absolute path; returns when it is written."""
    with _storage_errors(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, to_arrays(tree), force=True)


def load_arrays(folder: Path, abstract: Any) -> Any:
    """Read a pytree written by `save_arrays`, with the shardings of `abstract`."""
    with ocp.StandardCheckpointer() as checkpointer:
        return from_arrays(abstract, checkpointer.restore(literal(folder), to_arrays(abstract)), str(folder))


def newest_good(workdir: Path) -> int:
    """The step of a run's newest checkpoint that verifies; warns about each newer one. UserError if there is none, or if it belongs
    to another run."""
    skipped = []
    hashed = {int(path.name.partition("-")[0]) for path in hashes_of(workdir)}
    for step in sorted({*steps_of(workdir), *hashed}, reverse=True):
        problem = verify(folder_of(workdir, step), hashes_of(workdir, step))
        if problem is None:
            for text in skipped:
                warn(f"{text}; the one at step {step} is used")
            stranger = another_runs(workdir, step)
            require(stranger is None, str(stranger))
            return step
        skipped.append(f"the checkpoint at step {step} of {workdir} is damaged, or not complete ({problem})")
    remedy = f"{skipped[0]}, and no other is good; restore it from a copy" if skipped else "run the experiment first"
    raise UserError(f"{workdir} has no complete checkpoint yet; {remedy}")


def saved_identity(workdir: Path, step: int) -> Mapping[str, Any]:
    """The `RunDirectory.identity` of the run that saved a checkpoint."""
    folder = folder_of(workdir, step) / "meta"
    return _whose(ocp.JsonCheckpointHandler().restore(folder, args=ocp.args.JsonRestore()))


def another_runs(workdir: Path, step: int) -> str | None:
    """None if a checkpoint that verifies belongs to the run in whose folder it is, else a line that names its run."""
    saved = saved_identity(workdir, step)
    try:
        if saved:
            require_same_run(saved, identity_of(workdir), f"checkpoint {step} in {home(workdir) / 'checkpoints'}", workdir)
    except UserError as error:
        return str(error)
    return None


def read_parameters(
    workdir: Path, abstract_model: Any, parts: Mapping[str, str] | None = None, fresh: Any = None, step: int | None = None
) -> Any:
    """Parameters of the checkpoint at `step` (None: `newest_good`), on the mesh of `abstract_model`. The run's folder is not changed.

    Of `parts`, {part of this model: its name in the checkpoint}, only these are read, and all others come from `fresh`. UserError
    if this model lacks a part, or if a parameter of the checkpoint is missing, left over or has another shape.
    """
    folder: Any = folder_of(workdir, newest_good(workdir) if step is None else step)
    parts, mine, others = parts or {"": ""}, to_arrays(abstract_model), {} if fresh is None else to_arrays(fresh)
    for part in parts:
        known = sorted({"/".join(path.split("/")[:n]) for path in mine for n in (1, 2, 3, 4)})
        require(any(_below(path, part) for path in mine), f"init.from: this model has no part {part!r}{nearest(part, known)}")
    theirs = {path: there + path[len(here) :] for path in mine for here, there in parts.items() if _below(path, here)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
        named = {path.removeprefix("model/"): item for path, item in stored.items() if path.startswith("model/")}
        like = {there: mine[path] for path, there in theirs.items()}
        asked = {path: item for path, item in named.items() if any(_below(path, part) for part in parts.values())}
        from_arrays(like, asked, str(folder))
        wanted = {f"model/{path}": leaf for path, leaf in like.items()}
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        arguments = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        found = checkpointer.restore(folder / "state", args=arguments)
    return from_arrays(abstract_model, others | {path: found[f"model/{there}"] for path, there in theirs.items()}, str(folder))


def _below(path: str, part: str) -> bool:
    return not part or path == part or path.startswith(f"{part}/")
