"""Training: restore, step, log one step behind, save, evaluate. The same command again takes up where it stopped."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import Config, config_hash
from metajax.core.atomic import write_text
from metajax.core.errors import Stopped, UserError
from metajax.core.progress import progress, say, warn
from metajax.core.quiet import told_once
from metajax.core.storage import home
from metajax.data.pipeline import Corpora, Paths, open_corpora, read_batches, training_batches
from metajax.data.tokenizers import load as load_tokenizer
from metajax.distributed.hosts import agree, is_first, together
from metajax.distributed.mesh import HostRows, make_mesh
from metajax.distributed.preemption import Preemption
from metajax.distributed.watchdog import Watchdog
from metajax.models.flops import peak_flops, step_flops
from metajax.runs.directory import RunDirectory, check_data, find_run
from metajax.runs.goodput import Goodput
from metajax.runs.metrics import Loggers, MetricsFile, Nowhere, memory_use
from metajax.runs.pace import Counts, LeftOut, Pace, Phases
from metajax.training.checkpoints import Checkpoints, load_arrays, newest_good, read_parameters, save_arrays, saved_identity
from metajax.training.program import Program
from metajax.training.state import State

LN2 = math.log(2.0)


class NonFinite(Exception):
    """The loss or the gradient stopped being finite, or went over `runtime.max_grad_norm`, in one step or, with `runtime.on_bad_step` "skip",
    in too many in a row; the message names the replay bundle."""


class Evaluator(NamedTuple):
    """What a run is evaluated by while it trains.

    check: raises UserError before the first step for what could not be evaluated. score: (score, lower is better; numbers for the metrics)
    of a model.
    """

    check: Callable[[Corpora], None]
    score: Callable[[Program, Corpora, Any], tuple[float, dict[str, float]]]


@dataclass
class Trained:
    """What training leaves for evaluation and the report."""

    state: State
    program: Program
    corpora: Corpora
    counts: Counts  # of all processes
    startup: dict[str, float]
    time: dict[str, float]
    goodput: Goodput
    restarted_from: int
    left_out: LeftOut


class Trainer:
    """One run of one config in one directory."""

    def __init__(self, config: Config, run: RunDirectory, paths: Paths, phases: Phases, evaluator: Evaluator):
        self.config, self.run, self.paths, self.phases, self.evaluator = config, run, paths, phases, evaluator
        self.frozen: tuple[Any, ...] = ()  # what the step reads beside state and batch
        self.left_out = LeftOut()
        self.goodput = Goodput(run.path / "time.json" if is_first() else None, time.monotonic() - phases.started, run)
        with phases.time("data"):
            together(self._open)
            agree("configuration", config_hash(config))
            agree("corpus or tokenizer", f"{self.corpora.key} {self.corpora.tokenizer.fingerprint()[:12]}")
        self.vocab_size = self.corpora.tokenizer.vocabulary.size

    def _open(self) -> None:
        self.corpora = open_corpora(self.config, self.paths)
        notes: list[str] = []
        self.rows = HostRows.of(make_mesh(self.config.runtime.mesh), jax.process_index())
        self.batches = training_batches(self.corpora, host=self.rows.index, hosts=self.rows.count, note=notes.append)
        self.batches[0]
        self.evaluator.check(self.corpora)
        self.run.begin(self.corpora.key, self.corpora.tokenizer.fingerprint())
        for note in notes:
            self.run.warn(note)
        if is_first():
            self.corpora.tokenizer.save(self.run.path)

    def train(self) -> Trained:
        """Run the steps that are left.

        Raises:
          NonFinite: a loss or gradient was not finite; a replay bundle has been written.
          Stopped: SIGTERM or Ctrl-C came; the state has been saved.
        """
        runtime, steps = self.config.runtime, self.config.training.steps
        with contextlib.ExitStack() as closing:
            self.preemption = Preemption()
            closing.callback(self.preemption.close)  # last: what is being saved is saved first
            closing.enter_context(told_once())
            with self.phases.time("init"):
                stacks = self.run.path / f"stacks-p{jax.process_index()}.txt"
                self.watchdog = Watchdog(runtime.hang_seconds, stacks, runtime.startup_seconds)
                closing.callback(self.watchdog.close)
                self.program = Program.build(self.config, self.vocab_size, beat=self.watchdog.beat)
                state = self.program.create_state()
                self.checkpoints = Checkpoints(self.run.path, runtime.keep, self.run.warn, self.run.identity)
                closing.callback(self.checkpoints.close)
                state, self.counts, start = self._restore(state)
            with self.phases.time("compile"), self.goodput.spend("compile"):
                step_fn = None
                if start < steps:
                    step_fn = self.program.compile_step(state, self.program.put(self.batches[start]))
            logged = self.run.path / "metrics.jsonl"
            self.metrics = MetricsFile(logged, start, self.run.logged, self.run.warn) if is_first() else Nowhere()
            closing.callback(self.metrics.close)
            self.loggers = Loggers(self.config, self.run.path, start) if is_first() else Nowhere()
            closing.callback(self.loggers.close)
            self.goodput.begin_steps(start)
            began = time.monotonic()
            if self.preemption.reached(start):
                raise self.preemption.end(f"no step was made after step {start} of {steps}")
            if step_fn is not None:
                with _lost_peers_stop():
                    state = self._steps(state, step_fn, start)
            else:
                self.phases.finish(0.0)
        if jax.process_count() == 1 and self.preemption.reached(steps):  # while the last save was being written
            raise self.preemption.end(f"saved at step {steps} of {steps}")
        if self.left_out.count:
            self.run.warn(str(self.left_out))
        seconds = time.monotonic() - began
        clock = {
            "train_seconds": seconds,
            "steps_here": steps - start,
            "data_wait_share": self.goodput.apart["data_wait"] / seconds if seconds else 0.0,
            "checkpoint_blocking_share": self.checkpoints.blocked_seconds / seconds if seconds else 0.0,
        }
        counts = self.counts.of_all()
        return Trained(
            state, self.program, self.corpora, counts, dict(self.phases.seconds), clock, self.goodput, start, self.left_out
        )

    def _restore(self, fresh: State) -> tuple[State, Counts, int]:
        abstract = self.program.abstract_state()
        found, config = self.checkpoints.restore(abstract), self.config
        if config.init.from_ and (found is None or config.dpo is not None):
            parent = self._parent_parameters(abstract.model, fresh.model)
            self.frozen = self.program.frozen(parent)
            if found is None:  # a copy, for the step writes over its state and leaves the reference
                fresh = fresh.replace(model=jax.tree.map(jnp.copy, parent) if self.frozen else parent)
        if found is None:
            return fresh, Counts(), 0
        state, meta = found
        if meta["config_hash"] != config_hash(config):
            raise UserError(f"{self.run.path} belongs to another configuration ({meta['config_hash']}); choose another --workdir")
        if self.frozen and meta["parent_step"] != self._parent_step:
            raise UserError(
                f"init.from = {config.init.run} has gone on, and the reference with it: step {self._parent_step} now, {meta['parent_step']} when "
                "this run began; start a new run with another --workdir"
            )
        if self.frozen and meta.get("parent", self._parent) != self._parent:
            raise UserError(
                f"init.from = {config.init.run} is another run ({self._parent}) than when this run began ({meta['parent']}); put that one back, or "
                "start a new run with another --workdir"
            )
        self.run.go_on_from(meta)
        self.watchdog.saved, self.left_out = meta["step"], LeftOut(**meta.get("left_out", {}))
        say(f"resuming at step {meta['step']} of {self.config.training.steps}")
        return state, Counts(**meta["counts"]) if is_first() else Counts(), meta["step"]

    def _parent_parameters(self, abstract: Any, fresh: Any) -> Any:
        init = self.config.init
        parent = find_run(init.run, self.paths.runs)
        self._parent_step = newest_good(parent)
        self._parent = dict(saved_identity(parent, self._parent_step))
        theirs, ours = load_tokenizer(parent).fingerprint(), self.corpora.tokenizer.fingerprint()
        check_data(parent, tokenizer=theirs)
        if theirs != ours and not init.parts:
            raise UserError(
                f"init.from = {init.run}: its tokenizer ({theirs[:12]}) is not this run's ({ours[:12]}), so its parameters "
                f"mean other tokens; use data.tokenizer=run:{parent}, or name the parts to take, such as RUN?blocks"
            )
        return read_parameters(parent, abstract, init.parts, fresh, self._parent_step)

    def _steps(self, state: State, step_fn: Any, start: int) -> State:
        config, steps = self.config, self.config.training.steps
        pending: tuple[int, Any, dict[str, np.ndarray]] | None = None
        self._pace = Pace(hosts=self.rows.count)
        reader, title = read_batches(self.batches, start, config.runtime.workers), f"training {config.name} (seed {config.seed})"
        with contextlib.closing(reader), progress(title, total=steps, plain_lines=False) as advance:
            stream = self.program.feed(self._timed(reader, steps - start))
            advance(start)
            for step, (batch, on_host) in enumerate(stream, start + 1):
                self._profile(step, start + 1)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch, *self.frozen)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    self.phases.finish(time.monotonic() - self._pace.since)
                    self.watchdog.begin_steps()
                if pending is not None:
                    self._log(*pending, state)
                pending = (step, metrics, on_host)
                self.checkpoints.poll()
                advance(1)
                ends = self.preemption.reached(step)
                saves = step % config.runtime.save_every == 0 or step == steps or self._evaluates(step) or ends
                if saves or self._may_be_the_last_left_out():
                    self._log(*pending, state)
                    pending = None
                if saves:
                    with self._pace.paused():
                        self._save(state, self._evaluate(state, step) if self._evaluates(step) else None)
                if ends:
                    raise self.preemption.end(f"saved at step {step} of {steps}")
                self.watchdog.beat()
            self._profile(steps + 1, start + 1)
        return state

    def _may_be_the_last_left_out(self) -> bool:
        """Whether the run stops if this step is a bad one: then it is read before a later step changes the state."""
        runtime = self.config.runtime
        return runtime.on_bad_step == "skip" and self.left_out.in_a_row + 1 >= runtime.max_skipped

    def _profile(self, step: int, first: int) -> None:
        """Start or end the profile of the steps that `runtime.profile` names."""
        window, folder = self.config.runtime.profile, self.run.path / "profile"
        if not window:
            return
        begins, ends = max(window[0], first), min(window[1], self.config.training.steps)
        if step == begins <= ends:
            jax.profiler.start_trace(folder)
        elif step == ends + 1 > begins:
            jax.profiler.stop_trace()
            say(f"profile of steps {begins} to {ends}: pip install xprof; xprof --logdir {folder}")

    def _timed(self, batches: Iterator[dict[str, np.ndarray]], count: int) -> Iterator[dict[str, np.ndarray]]:
        """The next `count` batches; the time spent waiting for them is the input path's cost."""
        batches = itertools.islice(batches, count)
        while True:
            with self.goodput.spend("data_wait"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _evaluates(self, step: int) -> bool:
        every = self.config.evaluation.every
        return every > 0 and step % every == 0 and step < self.config.training.steps

    def _evaluate(self, state: State, step: int) -> float:
        """The validation score, lower is better; it is written with the metrics."""
        with self.goodput.spend("evaluation"), self.watchdog.patient():
            score, record = self.evaluator.score(self.program, self.corpora, state.model)
        self.metrics.write({"step": step, **record})
        self.loggers.write(step, {name: value for name, value in record.items() if value is not None})
        return score

    def _save(self, state: State, score: float | None) -> None:
        self.run.require_there()
        meta = {
            "step": int(jax.device_get(state.step)),
            "config_hash": config_hash(self.config),
            "counts": vars(self.counts.of_all()),
            "left_out": vars(self.left_out),
            "metrics": self.metrics.mark(),
            "warnings": self.run.warnings,
            **({"parent_step": self._parent_step, "parent": self._parent} if self.frozen else {}),
        }
        with self.goodput.spend("checkpoint"):
            self.checkpoints.save(state, meta, score)
        self.watchdog.saved = meta["step"]
        self.goodput.saved(meta["step"])
        self.goodput.write()

    def _log(self, step: int, metrics: Any, batch: dict[str, np.ndarray], state: State) -> None:
        """Read a step's metrics, which also paces the host to one step behind the devices."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        finite, kept = values.pop("finite"), values.pop("kept")
        self.left_out.add(step, kept)
        runtime = self.config.runtime
        if not kept and (runtime.on_bad_step == "stop" or self.left_out.in_a_row >= runtime.max_skipped):
            raise NonFinite(self._replay_bundle(step, values, batch, state))
        flops = step_flops(self.config, self.vocab_size, batch)
        if self.rows.counts:
            self.counts.add(batch, flops)
        self._pace.add(batch["tokens"].size, flops)
        if step % runtime.log_every == 0 and self.left_out.last > step - runtime.log_every:
            warn(str(self.left_out))
        if not kept:
            self.metrics.write({"step": step, "left_out": "spike" if finite else "not finite"})
            return
        record = {"step": step, **values}
        if self.config.tasks is None:  # the body of an answer is not text of a corpus
            record["bpb"] = values["body_nll"] / LN2 / self.corpora.bytes_per_token
        self.metrics.write(record)
        if step % runtime.log_every == 0 or step == 1:
            speed, seconds = self._pace.read(peak_flops(list(self.program.mesh.devices.flat)))
            speed |= memory_use() | {"goodput": self.goodput.shares()["productive"]}
            self.goodput.write()
            self.loggers.write(step, record | speed)
            say(_log_line(step, self.config.training.steps, record, speed, seconds))

    def _replay_bundle(self, step: int, values: dict[str, float], batch: dict[str, np.ndarray], state: State) -> str:
        folder = write_bundle(self.run.path, step, values, batch, state, self.rows, self.frozen)
        row = f"{self.left_out.in_a_row} steps in a row were left out (runtime.max_skipped), the last one " * (
            self.left_out.in_a_row > 1
        )
        return (
            f"{row}step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; the parameters before that step and its batch are in "
            f"{folder} (metajax.training.loop.replay reproduces it). Look for the cause there, then lower optimizer.learning_rate or raise optimizer.warmup_steps"
        )


@contextlib.contextmanager
def _lost_peers_stop() -> Iterator[None]:
    """A collective that fails for the want of another process ends this one as a preemption does."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise Stopped(f"another process of this run is gone ({str(error).splitlines()[0]}); the same command goes on") from error


def write_bundle(
    workdir: Path,
    step: int,
    values: dict[str, float],
    batch: dict[str, np.ndarray],
    state: State,
    rows: HostRows,
    frozen: tuple[Any, ...] = (),
) -> Any:
    """Write the state before a step, which kept it because it was not finite, what the step reads beside it, and the batch; their folder."""
    folder = home(workdir) / f"replay-step-{step}"
    save_arrays(folder / "state", state.model)
    if frozen:
        save_arrays(folder / "frozen", frozen)
    if rows.counts:
        with (folder / f"batch-p{rows.index}.npz").open("wb") as file:
            np.savez(file, **batch)
    if is_first():
        write_text(folder / "metrics.json", json.dumps({"step": step, **{k: str(v) for k, v in values.items()}}))
    return folder


def replay(folder: Path, config: Config, vocab_size: int) -> dict[str, float]:
    """Loss and gradient norm of the step kept in a replay bundle, computed anew on one device; of a bucket's a local copy."""
    program = Program.build(config, vocab_size, jax.devices()[:1])
    abstract = program.abstract_state().model
    state = program.create_state().replace(model=load_arrays(folder / "state", abstract))
    frozen = load_arrays(folder / "frozen", (abstract,)) if program.frozen(abstract) else ()
    slices = [
        np.load(path) for path in sorted(Path(folder).glob("batch-p*.npz"), key=lambda path: int(path.stem.partition("-p")[2]))
    ]
    batch = program.put({name: np.concatenate([part[name] for part in slices]) for name in slices[0].files})
    _, metrics = program.compile_step(state, batch)(state, batch, *frozen)
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def _log_line(step: int, steps: int, record: dict[str, float], speed: dict[str, float], seconds: float) -> str:
    left = (steps - step) * seconds
    parts = [
        f"step {step}/{steps}",
        f"loss {record['loss']:.4f}",
        f"bits/byte {record['bpb']:.4f}" if "bpb" in record else f"nats/answer token {record['body_nll']:.4f}",
        f"lr {record['learning_rate']:.2e}",
        f"grad {record['grad_norm']:.3f}",
        f"{speed['tokens_per_second']:,.0f} tokens/s",
    ]
    parts += [f"{name} {record[name]:.3f}" for name in ("margin", "accuracy") if name in record]
    if "mfu" in speed:
        parts.append(f"MFU {speed['mfu']:.1%}")
    if "hbm_gib" in speed:
        parts.append(f"HBM {speed['hbm_gib']:.1f} GiB ({speed['hbm_share']:.0%})")
    if "goodput" in speed:
        parts.append(f"goodput {speed['goodput']:.0%}")
    return "  ".join([*parts, f"ETA {int(left // 60)}:{int(left % 60):02d}"])
