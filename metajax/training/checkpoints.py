"""Orbax checkpoints that hold {path: array}, with hashes written after the commit and verified before a restore.

Orbax commits atomically but does not notice a file that changed afterwards. So each host writes the SHA-256 of its share
of the files once a save is committed, in the background; a save counts as complete when its hashes are there. A complete
checkpoint that fails verification is moved aside, never deleted, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
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

from metajax.atomic import write_text
from metajax.buckets import files, hashes_of, home, move, publish, steps_of
from metajax.config import UserError, require
from metajax.partial_restore import read_parts
from metajax.pods.hosts import gather, is_first, of_first
from metajax.progress import say, warn
from metajax.training.state import State, from_arrays, to_arrays


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


COMMIT_SECONDS = 600.0  # for process 0 to name a save, once all processes have written theirs


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """What the operating system said to the library that writes, as the OSError that it was."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code.group(1)), os.strerror(int(code.group(1))), str(folder)) from error


class Checkpoints:
    """The checkpoints of one run: DIR/checkpoints/STEP, DIR/hashes/STEP-pHOST.json, DIR/damaged/ for what failed.

    Args:
      workdir: of the run; DIR is its home, which may be a bucket.
      keep: newest checkpoints kept, two at least; the best by held-out bits per byte is kept besides.
      on_warning: told what was wrong with a checkpoint that had to be set aside.
    """

    def __init__(self, workdir: Path, keep: int, on_warning: Callable[[str], None] = warn):
        self._workdir, there = workdir, home(workdir)
        self.folder, self.hashes, self.damaged = there / "checkpoints", there / "hashes", there / "damaged"
        self._warn = on_warning
        self._host, self._hosts = jax.process_index(), jax.process_count()
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["score"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        newest = policies.LatestN(max(keep, 2))  # a save counts once it is hashed: until then the one before must be there
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([newest, best]), cleanup_tmp_directories=True
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hashes")
        self._unhashed: int | None = None
        self._jobs: list[Future] = []
        self.blocked_seconds = 0.0

    # ------------------------------------------------------------------------------------------------ saving

    def save(self, state: State, meta: dict[str, Any], score: float | None = None) -> None:
        """Start saving at state.step; returns when the arrays are copied off the devices. `meta` is JSON-ready;
        the checkpoint with the least `score` is kept too.

        `meta` is copied too: it is written in the background, while the caller goes on changing its own.
        """
        started = time.monotonic()
        self.finish()
        step = int(jax.device_get(state.step))
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(to_arrays(state)), meta=ocp.args.JsonSave(copy.deepcopy(meta)))
        with _storage_errors(self.folder):
            self._manager.save(step, args=arguments, metrics=None if score is None else {"score": score}, force=True)
        self._unhashed = step
        self.blocked_seconds += time.monotonic() - started

    def poll(self) -> None:
        """Hash a save that has been committed since; cheap, called between steps."""
        if self._unhashed is not None and not self._manager.is_saving_in_progress():
            self._hash()

    def finish(self) -> None:
        """Wait until every save is committed and hashed; errors of the background work surface here."""
        if self._unhashed is not None:
            self._hash()
        while self._jobs:
            self._jobs.pop().result()

    def _hash(self) -> None:
        """Hash the newest save in the background once it is committed; one that failed is an error here, once."""
        step, self._unhashed = self._unhashed, None
        with _storage_errors(self.folder):
            self._manager.wait_until_finished()
        self._jobs.append(self._hasher.submit(self._write_hashes, step))

    def close(self) -> None:
        """Finish, and let go of the threads."""
        self.finish()
        self._hasher.shutdown()
        self._manager.close()

    def _write_hashes(self, step: int) -> None:
        folder = self.folder / str(step)
        deadline = time.monotonic() + COMMIT_SECONDS
        while not ocp.utils.is_checkpoint_finalized(folder):
            require(time.monotonic() < deadline, f"the save at step {step} was not committed within {COMMIT_SECONDS:g} s")
            time.sleep(0.02)
        mine = list(files(folder))[self._host :: self._hosts]
        hashes = {"hosts": self._hosts, "files": {name: _sha256(folder / name) for name in mine}}
        if is_first():
            publish(self._workdir)  # before the save counts as complete, for its steps will not be made again
        write_text(self.hashes / f"{step}-p{self._host}.json", json.dumps(hashes))
        for old in self.hashes.glob("*.json") if is_first() else ():
            if not (self.folder / old.name.partition("-")[0]).exists():
                old.unlink(missing_ok=True)

    # ----------------------------------------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first, as process 0 sees them."""
        return of_first(sorted(self._manager.all_steps()))

    def verify(self, step: int) -> str | None:
        """None when every file is as it was committed, else what is wrong; each process reads its share of them."""
        found = gather(verify(self.folder / str(step), hashes_of(self._workdir, step), self._host, self._hosts) or "")
        return next(filter(None, found), None)

    def restore(self, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """The newest checkpoint that verifies as (state, meta), with the shardings of `abstract`; None if there are none.

        The newest may lack its hashes because the process was killed while it wrote them: such a save never counted.

        Raises:
          UserError: there are checkpoints and none of them is good.
        """
        steps = self.steps()
        if steps and of_first(_cut_off(hashes_of(self._workdir, steps[-1]))):
            say(f"the save at step {steps[-1]} was cut off before it was complete; it is kept in {self.damaged}")
            self._set_aside(steps.pop())
        for step in reversed(steps):
            problem = self.verify(step)
            if problem is None:
                return self._read(step, abstract)
            self._warn(
                f"the checkpoint at step {step} is damaged ({problem}); it is kept in {self.damaged} and the one before is used"
            )
            self._set_aside(step)
        if steps:
            raise UserError(
                f"no good checkpoint is left in {self.folder}; the damaged ones are in {self.damaged}. "
                "Start over with another --workdir, or restore the folder from a copy"
            )
        return None

    def _read(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        arrays = to_arrays(abstract)
        stored = self._manager.item_metadata(step)["state"]
        shapes = {path: jax.ShapeDtypeStruct(item.shape, item.dtype) for path, item in stored.items()}
        from_arrays(abstract, shapes, f"the checkpoint at step {step}")
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(arrays), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=arguments)
        return from_arrays(abstract, restored["state"], f"the checkpoint at step {step}"), restored["meta"]

    def _set_aside(self, step: int) -> None:
        if is_first():
            target = self.damaged / f"{step}-{time.time_ns()}"
            if (self.folder / str(step)).exists():
                move(self.folder / str(step), target)
            for file in hashes_of(self._workdir, step):
                move(file, self.damaged / f"{target.name}-{file.name}")
        gather("")  # no one looks before it is done
        self._manager.reload()


def _cut_off(hash_files: list[Path]) -> bool:
    """Whether the hashes of a save are not all there, though none of them is damaged: the run was killed while it wrote them."""
    try:
        counts = [int(json.loads(file.read_text())["hosts"]) for file in hash_files]
    except (ValueError, KeyError, TypeError):
        return False
    return len(counts) < max(counts, default=1)


def verify(folder: Path, hash_files: list[Path], host: int = 0, hosts: int = 1) -> str | None:
    """What is wrong with a checkpoint, None for nothing; of the hashes those of every `hosts`-th file are looked at."""
    expected: dict[str, str] = {}
    if not hash_files:
        return "its hashes are missing"
    for file in hash_files:
        try:
            saved = json.loads(file.read_text())
            expected |= saved["files"]
            writers = int(saved["hosts"])
        except (ValueError, KeyError, TypeError):
            return f"its hash file {file.name} is not readable"
    if len(hash_files) < writers:
        return f"the hashes of {writers - len(hash_files)} hosts are missing"
    if not (there := files(folder)):
        return "its folder is gone"
    for name, sha in sorted(expected.items())[host::hosts]:
        if name not in there:
            return f"{name} is missing"
        if _sha256(folder / name) != sha:
            return f"{name} has changed since it was written"
    extra = sorted(set(there) - set(expected))
    return f"{extra[0]} was not there when it was written" if extra else None


def save_arrays(folder: Path, tree: Any) -> None:
    """Write a pytree as {path: array} into a folder of its own, an absolute path, at once (replay bundles)."""
    with _storage_errors(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, to_arrays(tree), force=True)


def load_arrays(folder: Path, abstract: Any) -> Any:
    """Read a pytree written by `save_arrays` in the layout of `abstract`."""
    with ocp.StandardCheckpointer() as checkpointer:
        return from_arrays(abstract, checkpointer.restore(folder.absolute(), to_arrays(abstract)), str(folder))


def newest_good(workdir: Path) -> int:
    """The step of the newest checkpoint of a finished or running experiment that verifies; UserError where there is none."""
    for step in reversed(steps_of(workdir)):
        found = hashes_of(workdir, step)
        if found and verify(home(workdir) / "checkpoints" / str(step), found) is None:
            return step
    raise UserError(f"{workdir} has no complete checkpoint yet; run the experiment first")


def read_parameters(
    workdir: Path, abstract_model: Any, parts: Mapping[str, str] | None = None, fresh: Any = None, step: int | None = None
) -> Any:
    """Parameters of a checkpoint, read without changing the run's folder.

    Args:
      parts: {part of this model: its name there} to read these alone (`Init.parts`); the others are those of `fresh`, another such model.
      step: of the checkpoint, which `newest_good` has given; None asks it.

    Raises:
      UserError: no checkpoint there, or none that verifies or fits `abstract_model`.
    """
    folder = home(workdir) / "checkpoints" / str(newest_good(workdir) if step is None else step)
    return read_parts(folder, abstract_model, parts or {"": ""}, {} if fresh is None else to_arrays(fresh))
