"""The training loop: restore, step, log one step later, save, evaluate. The same command resumes from the newest checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from metajax.config import config_hash
from metajax.core.errors import Stopped
from metajax.core.progress import progress, say, warn
from metajax.core.quiet import told_once
from metajax.data.pipeline import read_batches
from metajax.distributed.hosts import agree, is_first, together
from metajax.distributed.preemption import Preemption
from metajax.distributed.watchdog import Watchdog
from metajax.models.flops import peak_flops
from metajax.runs.directory import RunDirectory
from metajax.runs.metrics import Loggers, MetricsFile, Nowhere, memory_use
from metajax.runs.pace import Counts, Goodput, LeftOut, Pace, Phases
from metajax.training.checkpoints import Checkpoints
from metajax.training.compiled import CompiledStep, Leaves, Scalars
from metajax.training.program import HostBatch
from metajax.training.replay import write_bundle
from metajax.training.state import State
from metajax.training.task import Task


class NonFinite(Exception):
    """The loss or gradient was not finite, or the gradient norm exceeded `runtime.max_grad_norm`. The message names the replay
    bundle. With `runtime.on_bad_step` "skip" this is raised only after too many such steps in a row."""


@dataclass
class Trained:
    """The result of training, for evaluation and the report."""

    state: State
    counts: Counts  # of all processes
    startup: dict[str, float]
    time: dict[str, float]
    goodput: Goodput
    restarted_from: int
    left_out: LeftOut


class Trainer:
    """Trains a task in the open folder of one run, the same way for every family. `phases` has the seconds of the start-up so far.

    UserError if the processes differ in their config or data.
    """

    def __init__(self, task: Task, run: RunDirectory, phases: Phases):
        self.task, self.run, self.phases = task, run, phases
        self.config, self.program = task.config, task.program
        self.left_out, self.counts = LeftOut(), Counts()
        self.goodput = Goodput(run.path / "time.json" if is_first() else None, time.monotonic() - phases.started, run)
        agree("configuration", config_hash(self.config))
        agree("corpus or tokenizer", f"{task.data} {task.tokenizer.fingerprint()[:12]}")
        together(lambda: run.begin(task.data, task.tokenizer.fingerprint()))
        for note in task.notes:
            run.warn(note)
        if is_first():
            task.save_inputs(run.path)

    def train(self) -> Trained:
        """Run the remaining steps. After a step that is not finite, write a replay bundle and raise NonFinite. On SIGTERM or Ctrl-C,
        save the state and raise Stopped."""
        steps, step_fn = self.task.steps, None
        with contextlib.ExitStack() as closing:
            self.preemption = Preemption()
            closing.callback(self.preemption.close)  # closed last, after a started save is finished
            closing.enter_context(told_once())
            with self.phases.time("init"):
                state, start = self._open(closing)
            with self.phases.time("compile"), self.goodput.spend("compile"):
                if start < steps:
                    say("compiling the train step ...")
                    step_fn = self.program.compile_step(state, self.program.put(self.task.batches[start]))
            if step_fn is not None:
                say(f"compiled in {self.phases.seconds['compile']:.1f} s")
            self._open_metrics(closing, start)
            self.goodput.begin_steps(start)
            began = time.monotonic()
            if self.preemption.reached(start):
                raise self.preemption.end(f"no step was made after step {start} of {steps}")
            if step_fn is not None:
                with _lost_peers_stop():
                    state = self._steps(state, step_fn, start)
            else:
                self.phases.finish(0.0)
        if jax.process_count() == 1 and self.preemption.reached(steps):  # during the last save
            raise self.preemption.end(f"saved at step {steps} of {steps}")
        if self.left_out.count:
            self.run.warn(str(self.left_out))
        seconds = time.monotonic() - began
        waits = {"data_wait": self.goodput.apart["data_wait"], "checkpoint_blocking": self.checkpoints.blocked_seconds}
        shares = {f"{name}_share": spent / seconds if seconds else 0.0 for name, spent in waits.items()}
        clock = {"train_seconds": seconds, "steps_here": steps - start, **shares}
        return Trained(state, self.counts.of_all(), dict(self.phases.seconds), clock, self.goodput, start, self.left_out)

    def _open(self, closing: contextlib.ExitStack) -> tuple[State, int]:
        """(state, its step) to continue from: the newest checkpoint or a fresh state."""
        runtime = self.config.runtime
        stacks = self.run.path / f"stacks-p{jax.process_index()}.txt"
        self.watchdog = Watchdog(runtime.hang_seconds, stacks, runtime.startup_seconds)
        closing.callback(self.watchdog.close)
        self.program.beat = self.watchdog.beat
        self.checkpoints = Checkpoints(self.run.path, runtime.keep, self.run.warn, self.run.identity)
        closing.callback(self.checkpoints.close)
        found = self.checkpoints.restore(self.program.abstract_state())
        state, meta = found if found is not None else (self.program.create_state(), None)
        model, self.frozen = self.task.start(state.model, meta)
        if meta is None:
            return state.replace(model=model), 0
        self.run.go_on_from(meta)
        self.watchdog.saved, self.left_out = meta["step"], LeftOut(**meta.get("left_out", {}))
        self.counts = Counts(meta["counts"] if is_first() else {})
        say(f"resuming at step {meta['step']} of {self.task.steps}")
        return state, meta["step"]

    def _open_metrics(self, closing: contextlib.ExitStack, start: int) -> None:
        self.metrics = self.loggers = Nowhere()
        if is_first():
            self.metrics = MetricsFile(self.run.path / "metrics.jsonl", start, self.run.logged, self.run.warn)
            closing.callback(self.metrics.close)
            self.loggers = Loggers(self.config, self.run.path, start)
            closing.callback(self.loggers.close)

    def _steps(self, state: State, step_fn: CompiledStep, start: int) -> State:
        config, steps = self.config, self.task.steps
        pending: tuple[int, Scalars, HostBatch] | None = None
        self._state_of, leaves, held = step_fn.state, jax.tree.leaves(state), jax.tree.leaves(self.frozen)
        self._pace = Pace(self.task.unit, self.task.counted, hosts=self.program.rows.count)
        title = f"training {config.name} (seed {config.seed})"
        reader = read_batches(self.task.batches, start, config.runtime.workers)
        with contextlib.closing(reader), progress(title, total=steps, plain_lines=False) as advance:
            stream = self.program.feed(self._timed(reader, steps - start))
            advance(start)
            for step, (batch, on_host) in enumerate(stream, start + 1):
                self._profile(step, start + 1)
                with jax.transfer_guard("disallow"):
                    leaves, metrics = step_fn.run(leaves, batch, held)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    self.phases.finish(time.monotonic() - self._pace.since)
                    self.watchdog.begin_steps()
                if pending is not None:
                    self._log(*pending, leaves)
                pending = (step, metrics, on_host)
                self.checkpoints.poll()
                advance(1)
                ends = self.preemption.reached(step)
                saves = step % config.runtime.save_every == 0 or step == steps or self._evaluates(step) or ends
                if saves or self.task.ends_epoch(step) or self._may_be_the_last_left_out():
                    self._log(*pending, leaves)
                    pending = None
                if self.task.ends_epoch(step):
                    self.frozen = self.task.next_epoch(step_fn.state(leaves).model, self.frozen)
                    held = jax.tree.leaves(self.frozen)
                if saves:
                    state = step_fn.state(leaves)
                    with self._pace.paused():
                        self._save(state, self._evaluate(state, step) if self._evaluates(step) else None)
                if ends:
                    raise self.preemption.end(f"saved at step {step} of {steps}")
                self.watchdog.beat()
            self._profile(steps + 1, start + 1)
        return step_fn.state(leaves)

    def _may_be_the_last_left_out(self) -> bool:
        """Whether a bad step now would stop the run. If so, its metrics are read before a later step changes the state."""
        runtime = self.config.runtime
        return runtime.on_bad_step == "skip" and self.left_out.in_a_row + 1 >= runtime.max_skipped

    def _profile(self, step: int, first: int) -> None:
        """Start or stop the profiler at the steps of `runtime.profile`."""
        window, folder = self.config.runtime.profile, self.run.path / "profile"
        if not window:
            return
        begins, ends = max(window[0], first), min(window[1], self.task.steps)
        if step == begins <= ends:
            jax.profiler.start_trace(folder)
        elif step == ends + 1 > begins:
            jax.profiler.stop_trace()
            say(f"profile of steps {begins} to {ends}: pip install xprof; xprof --logdir {folder}")

    def _timed(self, batches: Iterator[HostBatch], count: int) -> Iterator[HostBatch]:
        """Yield the next `count` batches and record the time spent waiting for them as the cost of the input pipeline."""
        for _ in range(count):
            with self.goodput.spend("data_wait"):
                batch = next(batches)
            yield batch

    def _evaluates(self, step: int) -> bool:
        every = self.task.evaluates_every
        return every > 0 and step % every == 0 and step < self.task.steps

    def _evaluate(self, state: State, step: int) -> float:
        """The validation score, lower is better; it is also written to the metrics."""
        with self.goodput.spend("evaluation"), self.watchdog.patient():
            score, record = self.task.score(state.model)
        self.metrics.write({"step": step, **record})
        self.loggers.write(step, {name: value for name, value in record.items() if value is not None})
        return score

    def _save(self, state: State, score: float | None) -> None:
        self.run.require_there()
        meta = {
            "step": int(jax.device_get(state.step)),
            "config_hash": self.run.hash,
            "counts": self.counts.of_all(),
            "left_out": vars(self.left_out),
            "metrics": self.metrics.mark(),
            "warnings": self.run.warnings,
            **self.task.meta(),
        }
        with self.goodput.spend("checkpoint"):
            self.checkpoints.save(state, meta, score)
        self.watchdog.saved = meta["step"]
        self.goodput.saved(meta["step"])
        self.goodput.write()

    def _log(self, step: int, metrics: Scalars, batch: HostBatch, leaves: Leaves) -> None:
        """Read a step's metrics. The wait keeps the host at most one step ahead of the devices."""
        values = dict(zip(metrics.names, jax.device_get(metrics.values).tolist(), strict=True))
        finite, kept = values.pop("finite"), values.pop("kept")
        self.left_out.add(step, kept)
        runtime = self.config.runtime
        if not kept and (runtime.on_bad_step == "stop" or self.left_out.in_a_row >= runtime.max_skipped):
            raise NonFinite(self._write_bundle(step, values, batch, self._state_of(leaves)))
        read = self.task.count(batch)
        if self.program.rows.counts:
            self.counts.update(read)
        self._pace.add(read)
        if step % runtime.log_every == 0 and self.left_out.last > step - runtime.log_every:
            warn(str(self.left_out))
        if not kept:
            self.metrics.write({"step": step, "left_out": "spike" if finite else "not finite"})
            return
        record = self.task.record(step, values)
        self.metrics.write({"step": step, **record})
        if step % runtime.log_every == 0 or step == 1:
            speed, seconds = self._pace.read(peak_flops(list(self.program.mesh.devices.flat)))
            speed |= memory_use() | {"goodput": self.goodput.shares()["productive"]}
            self.goodput.write()
            self.loggers.write(step, {"step": step, **record} | speed)
            left = (self.task.steps - step) * seconds
            ends = f"ETA {int(left // 60)}:{int(left % 60):02d}"
            say("  ".join([f"step {step}/{self.task.steps}", *self.task.line(record), *speed_parts(speed), ends]))

    def _write_bundle(self, step: int, values: dict[str, float], batch: HostBatch, state: State) -> str:
        """Write a replay bundle; returns a message that says what happened and names the bundle."""
        metrics = {"step": step, **{name: str(value) for name, value in values.items()}}
        folder = write_bundle(self.run.path, self.program, state, self.frozen, batch, metrics)
        count = self.left_out.in_a_row
        before = f"{count} steps in a row were left out (runtime.max_skipped), the last one " if count > 1 else ""
        found = f"{before}step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}"
        where = f"the parameters before that step and its batch are in {folder} (metajax.training.replay.replay reproduces it)"
        return f"{found}; {where}. Look for the cause there, then lower the learning rate or lengthen its warm-up"


@contextlib.contextmanager
def _lost_peers_stop() -> Iterator[None]:
    """If a collective fails because another process is gone, end this process like a preemption."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise Stopped(f"another process of this run is gone ({reason}); the same command continues the run") from error


def speed_parts(speed: dict[str, float]) -> list[str]:
    """The parts of a log line that report speed, memory and goodput."""
    rates = {name.removesuffix("_per_second"): value for name, value in speed.items() if name.endswith("_per_second")}
    parts = [f"{value:,.0f} {unit}/s" for unit, value in rates.items()]
    if "mfu" in speed:
        parts.append(f"MFU {speed['mfu']:.1%}")
    if "hbm_gib" in speed:
        parts.append(f"HBM {speed['hbm_gib']:.1f} GiB ({speed['hbm_share']:.0%})")
    if "goodput" in speed:
        parts.append(f"goodput {speed['goodput']:.0%}")
    return parts
