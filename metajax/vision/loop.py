"""The loop of image runs: restore, step, log one step behind, save; the same command again takes up where it stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metajax.config import ImageConfig, config_hash
from metajax.core.errors import require
from metajax.core.progress import progress, say
from metajax.core.quiet import told_once
from metajax.data.pipeline import read_batches
from metajax.distributed.mesh import HostRows, make_mesh
from metajax.distributed.preemption import Preemption
from metajax.distributed.rules import batch_sharding
from metajax.runs.directory import RunDirectory
from metajax.runs.metrics import Loggers, MetricsFile
from metajax.runs.pace import Phases
from metajax.training.checkpoints import Checkpoints
from metajax.training.loop import NonFinite, write_bundle
from metajax.training.state import State, initialiser
from metajax.vision.clips import whole
from metajax.vision.task import Task

Batch = dict[str, Any]


@dataclass
class Trained:
    """What training leaves for the report."""

    state: State
    time: dict[str, float]
    restarted_from: int


def train(task: Task, config: ImageConfig, run: RunDirectory, phases: Phases) -> Trained:
    """Run the steps that are left.

    Raises:
      NonFinite: a loss or gradient was not finite; the state before it and its batch have been written.
      Stopped: SIGTERM or Ctrl-C came; the state has been saved.
      UserError: a meta-net whose units are all dead, or a checkpoint of another configuration.
    """
    with contextlib.ExitStack() as closing:
        preemption = Preemption()
        closing.callback(preemption.close)  # last: what is being saved is saved first
        closing.enter_context(told_once())
        with phases.time("init"):
            checkpoints = Checkpoints(run.path, config.runtime.keep, run.warn, run.identity)
            closing.callback(checkpoints.close)
            state = jax.jit(initialiser(task.create, task.tx), out_shardings=whole(config))(jax.random.key(config.seed))
            state, choice, start = _restore(checkpoints, state, task, config, run)
        step_fn = _compiled(task, config, state, choice, start, phases)
        metrics = MetricsFile(run.path / "metrics.jsonl", start, run.logged, run.warn)
        closing.callback(metrics.close)
        loggers = Loggers(config, run.path, start)
        closing.callback(loggers.close)
        loop = _Loop(task, config, run, phases, checkpoints, metrics, loggers, preemption)
        began = time.monotonic()
        if preemption.reached(start):
            raise preemption.end(f"no step was made after step {start} of {task.steps}")
        if start < task.steps:
            state = loop.run(state, choice, start, step_fn)
        else:
            phases.finish(0.0)
        seconds = time.monotonic() - began
    if preemption.reached(task.steps):  # while the last save was being written
        raise preemption.end(f"saved at step {task.steps} of {task.steps}")
    here = task.steps - start
    # The first step is told apart: it waits for what the others find ready.
    step = (seconds - phases.seconds["first_step"]) / (here - 1) if here > 1 else None
    clock = {
        "train_seconds": seconds, "steps_here": here, "step_seconds": step,
        "images_per_second": step and len(task.batches[0]["pixels"]) / step,
    }  # fmt: skip
    return Trained(state, clock, start)


def _restore(
    checkpoints: Checkpoints, fresh: State, task: Task, config: ImageConfig, run: RunDirectory
) -> tuple[State, np.ndarray, int]:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)
    found = checkpoints.restore(abstract)
    if found is None:
        return fresh, task.choice, 0
    state, meta = found
    require(
        meta["config_hash"] == config_hash(config), "the checkpoint belongs to another configuration; choose another --workdir"
    )
    run.go_on_from(meta)
    say(f"resuming at step {meta['step']} of {task.steps}")
    return state, np.array(meta["choice"], np.float32), meta["step"]


def step_function(task: Task) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """(state, frozen, batch, choice, key) -> (state, metrics); a step that is not finite changes nothing and halts the state."""

    def step(state: State, frozen: Any, batch: Batch, choice: jax.Array, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(state.model, frozen, batch, choice, key)
        updates, opt_state = task.tx.update(grads, state.opt_state, state.model)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = finite & ~state.halted
        new = (optax.apply_updates(state.model, updates), opt_state, state.step + 1)
        kept = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, (state.model, state.opt_state, state.step))
        metrics = {"loss": loss, **metrics, "grad_norm": norm, "learning_rate": task.rate(state.step), "finite": finite}
        return State(*kept, ~keep), metrics

    return step


def compile_step(task: Task, mesh: Mesh, *arguments: Any) -> Any:
    """The step of a task compiled ahead of time for (state, frozen, batch, choice, key), arrays or shapes.

    Images are spread over the mesh where their number divides, prompts of classes always; what is trained and what is frozen is whole on
    every device.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = batch_sharding(mesh) if len(arguments[2]["pixels"]) % mesh.size == 0 else everywhere
    shardings = (everywhere, everywhere, spread, everywhere, everywhere)
    with jax.set_mesh(mesh):
        step = jax.jit(
            step_function(task), donate_argnums=0, in_shardings=shardings, out_shardings=everywhere,
            keep_unused=True,  # the frozen CLIP is there whole, so that a plan counts all of it
        )  # fmt: skip
        return step.lower(*arguments).compile()


def _compiled(task: Task, config: ImageConfig, state: State, choice: np.ndarray, start: int, phases: Phases) -> Any:
    """The step compiled ahead of time; None where no step is left."""
    if start >= task.steps:
        return None
    with phases.time("data"):
        batch = task.batches[start]
    with phases.time("compile"):
        mesh = make_mesh(config.runtime.mesh)
        return compile_step(task, mesh, state, task.frozen, batch, choice, jax.random.key(config.seed))


@dataclass
class _Loop:
    task: Task
    config: ImageConfig
    files: RunDirectory
    phases: Phases
    checkpoints: Checkpoints
    metrics: MetricsFile
    loggers: Loggers
    preemption: Preemption

    def run(self, state: State, choice: np.ndarray, start: int, step_fn: Any) -> State:
        task, runtime, key = self.task, self.config.runtime, jax.random.key(self.config.seed)
        stream, pending = read_batches(task.batches, start, runtime.workers), None
        self.since, self.counted = time.monotonic(), start
        title = f"training {self.config.name} (seed {self.config.seed})"
        with contextlib.closing(stream), progress(title, total=task.steps, plain_lines=False) as advance:
            advance(start)
            for step in range(start + 1, task.steps + 1):
                batch = next(stream)
                state, metrics = step_fn(state, task.frozen, batch, choice, key)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    self.phases.finish(time.monotonic() - self.since)
                if pending is not None:
                    self._log(*pending, state)
                pending = (step, metrics, batch)
                self.checkpoints.poll()
                advance(1)
                ends = step % task.epoch == 0 and step < task.steps and task.choose is not None
                asked = self.preemption.reached(step)
                if ends or asked or step % runtime.save_every == 0 or step == task.steps:
                    self._log(*pending, state)
                    pending = None
                    choice = task.choose(state.model) if ends else choice
                    if not ends or asked or step % runtime.save_every == 0:
                        self.save(state, choice)
                if asked:
                    raise self.preemption.end(f"saved at step {step} of {task.steps}")
        return state

    def save(self, state: State, choice: np.ndarray) -> None:
        self.files.require_there()
        meta = {"step": int(jax.device_get(state.step)), "config_hash": config_hash(self.config), "choice": choice.tolist()}
        meta |= {"metrics": self.metrics.mark(), "warnings": self.files.warnings}
        self.checkpoints.save(state, meta)

    def _log(self, step: int, metrics: Any, batch: Batch, state: State) -> None:
        """Read a step's metrics, which also paces the host to one step behind the device."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if not values.pop("finite"):
            raise NonFinite(self._bundle(step, values, batch, state))
        require(
            values.get("delta_norm", 1.0) > 0,
            f"step {step}: every delta token is 0, so the meta-net is dead; lower prompts.learning_rate or raise prompts.bottleneck",
        )
        self.metrics.write({"step": step, **values})
        if step % self.config.runtime.log_every == 0 or step == 1:
            self.loggers.write(step, values)
            pace = (time.monotonic() - self.since) / (step - self.counted)
            self.since, self.counted, left = time.monotonic(), step, (self.task.steps - step) * pace
            said = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            say(f"step {step}/{self.task.steps}  {said}  {pace * 1000:.1f} ms/step  ETA {int(left // 60)}:{int(left % 60):02d}")

    def _bundle(self, step: int, values: dict[str, float], batch: Batch, state: State) -> str:
        folder = write_bundle(self.files.path, step, values, batch, state, HostRows(0, 1, True))
        return f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; what led to it is in {folder}"
