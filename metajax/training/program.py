"""The computation of a run on its devices: mesh, model, optimizer, shardings of state and batches, compiled train step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metajax.config import AnyConfig, Config
from metajax.core.errors import require
from metajax.distributed.hosts import is_first
from metajax.distributed.mesh import HostRows, make_mesh, row_shards
from metajax.distributed.rules import batch_sharding, param_shardings
from metajax.models.lm import LM
from metajax.training.objectives import Batch, Objective, objectives
from metajax.training.optimizers import make_optimizer, schedule
from metajax.training.state import State, initialiser
from metajax.training.step import DEVICE_FIELDS, Metrics, eval_step, train_step

Layout = Callable[[Any, Mesh], Any]  # (tree, mesh) -> its shardings


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Shardings that replicate every array of a tree on all devices."""
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def build_model(config: Config, vocab_size: int, key: jax.Array) -> LM:
    """The model of a config with fresh parameters. An imported checkpoint may have more vocabulary rows than the tokenizer."""
    length, imported = max(config.row_positions, config.model.max_positions), config.imported
    rows = vocab_size if imported is None else imported.table(vocab_size)
    options = {"meta": config.meta_tokens, "runtime": config.runtime, "imported": imported}
    return LM(config.model, vocab_size=rows, max_length=length, key=key, **options)


def abstract_model(config: Config, vocab_size: int) -> LM:
    """The model with shapes instead of parameters."""
    return jax.eval_shape(lambda: build_model(config, vocab_size, jax.random.key(0)))


def check_axes(config: Config, mesh: Mesh) -> None:
    """UserError if `context` does not divide the rows or `tensor` the heads; they would be replicated on every device."""
    positions, context, tensor = config.row_positions, mesh.shape["context"], mesh.shape["tensor"]
    for what, size, axis, shards in (
        ("positions of a row", positions, "context", context),
        ("heads (model.heads)", config.model.heads, "tensor", tensor),
        ("heads of keys (model.kv_heads)", config.model.num_kv_heads, "tensor", tensor),
    ):
        require(
            size % shards == 0, f"runtime.mesh: the {size} {what} do not divide by {axis} = {shards}; choose a divisor of {size}"
        )


@dataclass
class Program:
    """A model with its optimizer and its train step on a mesh. For a plan, all arrays may be abstract shapes."""

    config: AnyConfig
    mesh: Mesh
    create: Callable[[jax.Array], Any]  # key -> fresh trainable parameters
    tx: optax.GradientTransformation
    rate: optax.Schedule  # learning rate by step
    objective: Objective
    batch_size: int  # rows of a step over all hosts
    frozen: tuple[Any, ...] = ()  # shapes of the step's inputs besides state and batch
    layout: Layout = param_shardings
    fields: tuple[str, ...] | None = None  # fields of a batch that go to the devices; None: all
    vocab_size: int = 0  # of a language model
    beat: Callable[[], None] = lambda: None  # called for every batch that is put on the devices

    @classmethod
    def build(cls, config: Config, vocab_size: int, devices: list[jax.Device] | None = None) -> Program:
        """The program of a language model; UserError if the mesh does not divide its rows or heads."""
        mesh, abstract = make_mesh(config.runtime.mesh, devices), abstract_model(config, vocab_size)
        rows, shards = config.data.batch_size // config.training.accumulation_steps, row_shards(mesh)
        require(
            rows % shards == 0,
            f"data.batch_size / training.accumulation_steps = {rows} rows do not spread over the {shards} devices of data and fsdp in "
            f"runtime.mesh; choose a multiple of {shards}",
        )
        check_axes(config, mesh)
        objective = objectives.find("dpo" if config.dpo is not None else config.training.objective, "training.objective")
        return cls(
            config, mesh, partial(build_model, config, vocab_size), make_optimizer(config, abstract),
            schedule(config.optimizer, config.training.steps), objective, config.data.batch_size,
            frozen=(abstract,) if config.dpo is not None else (), fields=DEVICE_FIELDS, vocab_size=vocab_size,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ state

    def place(self, tree: Any) -> Any:
        """The shapes of a tree, with shardings."""
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, self.layout(tree, self.mesh))

    def abstract_state(self) -> State:
        """The state as shapes with shardings: moments are sharded like their parameters, scalars are replicated."""
        return self.place(jax.eval_shape(self._create, jax.random.key(0)))

    def create_state(self) -> State:
        """A fresh state, initialised already sharded, so that no device ever holds it whole."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        with jax.set_mesh(self.mesh):
            return jax.jit(self._create, out_shardings=shardings)(jax.random.key(self.config.seed))

    @property
    def _create(self) -> Any:
        return initialiser(self.create, self.tx)

    def whole(self, tree: Any) -> Any:
        """A tree whose arrays this process holds in full, gathered from all processes if there are several."""
        if jax.process_count() == 1:
            return tree
        gathered = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(tree)
        return jax.tree.map(lambda x: x.addressable_data(0), gathered)

    def put_everywhere(self, tree: Any) -> Any:
        """A tree that every process holds, as global arrays replicated on all devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        if jax.process_count() == 1:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)

    # ------------------------------------------------------------------------------------------------- step

    @property
    def step(self) -> Callable[..., tuple[State, Metrics]]:
        """The train step, (state, batch, *frozen) -> (state, metrics), not compiled."""
        return partial(train_step, config=self.config, tx=self.tx, rate=self.rate, objective=self.objective)

    def lower_step(self, state: State, batch: Batch) -> Any:
        """The train step lowered for these shapes; the state is donated."""
        frozen = self.place(self.frozen)
        shardings, held = (jax.tree.map(lambda x: x.sharding, tree) for tree in (state, frozen))
        jitted = jax.jit(
            self.step, donate_argnums=0, in_shardings=(shardings, self._rows_sharding, *held), out_shardings=(shardings, None),
            keep_unused=bool(frozen),  # a plan counts all frozen inputs
        )  # fmt: skip
        with jax.set_mesh(self.mesh):
            return jitted.lower(state, batch, *frozen)

    def compile_step(self, state: State, batch: Batch) -> Any:
        """The train step compiled ahead of time for these shapes; it can never be recompiled."""
        return self.lower_step(state, batch).compile()

    @cached_property
    def eval_step(self) -> Any:
        """The jitted evaluation step of a language model."""
        return jax.jit(eval_step)

    # ---------------------------------------------------------------------------------------------- batches

    @property
    def _spreads(self) -> bool:
        return self.batch_size % (self.config.training.accumulation_steps * row_shards(self.mesh)) == 0

    @property
    def _rows_sharding(self) -> NamedSharding:
        return batch_sharding(self.mesh) if self._spreads else NamedSharding(self.mesh, PartitionSpec())

    @cached_property
    def rows(self) -> HostRows:
        """The rows of a batch that this process reads; all of them if they are not sharded over the mesh."""
        return HostRows.of(self.mesh, jax.process_index()) if self._spreads else HostRows(0, 1, is_first())

    def local_rows(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This host's slice of a whole batch."""
        rows = len(next(iter(batch.values()))) // self.rows.count
        return {name: values[self.rows.index * rows :][:rows] for name, values in batch.items()}

    def on_devices(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The fields of a batch that go to the devices."""
        return {name: batch[name] for name in self.fields or batch if name in batch}

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """This host's slice of a batch as global arrays, with rows sharded over the data axes."""
        self.beat()
        put = partial(jax.make_array_from_process_local_data, self._rows_sharding)
        return {name: put(values) for name, values in self.on_devices(batch).items()}

    def abstract_batch(self, batch: dict[str, Any]) -> Batch:
        """The shapes of a whole batch, with shardings."""
        return {
            name: jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=self._rows_sharding)
            for name, values in self.on_devices(batch).items()
        }

    def feed(self, batches: Iterator[dict[str, np.ndarray]]) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """Yield (batch on the devices, batch on the host); the next batch is transferred while the current one is in use."""
        ahead: tuple[Batch, dict[str, np.ndarray]] | None = None
        for batch in batches:
            current, ahead = ahead, (self.put(batch), batch)
            if current is not None:
                yield current
        if ahead is not None:
            yield ahead
