"""The computation of a run on its devices: mesh, model, optimizer, shardings of state and batches, compiled train step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metajax.config import AUTO_MESH, AnyConfig, Config
from metajax.core.errors import require
from metajax.distributed.hosts import is_first
from metajax.distributed.mesh import HostRows, MeshOption, auto_meshes, make_mesh, row_shards
from metajax.distributed.rules import batch_sharding, param_shardings
from metajax.models.lm import LM, param_count
from metajax.training.compiled import CompiledStep, on_leaves
from metajax.training.objectives import Batch, Objective, objectives
from metajax.training.optimizers import make_optimizer, schedule
from metajax.training.state import State
from metajax.training.step import DEVICE_FIELDS, Metrics, eval_step, train_step

Layout = Callable[[Any, Mesh], Any]  # (tree, mesh) -> its shardings
HostBatch = dict[str, np.ndarray]


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
    model = config.model
    for what, size, axis in (
        ("positions of a row", config.row_positions, "context"),
        ("heads (model.heads)", model.heads, "tensor"),
        ("heads of keys (model.kv_heads)", model.num_kv_heads, "tensor"),
    ):
        remedy = f"do not divide by {axis} = {mesh.shape[axis]}; choose a divisor of {size}"
        require(size % mesh.shape[axis] == 0, f"runtime.mesh: the {size} {what} {remedy}")


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
    meshes: tuple[MeshOption, ...] = ()  # that `runtime.mesh=auto` considered, the chosen one first
    beat: Callable[[], None] = lambda: None  # called for every batch that is put on the devices

    @classmethod
    def build(cls, config: Config, vocab_size: int, devices: list[Any] | None = None) -> Program:
        """The program of a language model; UserError if the mesh does not divide its rows or heads."""
        abstract, pieces = abstract_model(config, vocab_size), config.training.accumulation_steps
        rows, meshes = config.data.batch_size // pieces, []
        if config.runtime.mesh == AUTO_MESH:
            costs = {"gathers": 1 + (config.runtime.remat != "none"), "pieces": pieces}
            costs["weight_bytes"] = jnp.dtype(config.model.compute_dtype).itemsize
            meshes = auto_meshes(param_count(abstract)["total"], rows, devices or jax.devices(), **costs)
        mesh = make_mesh(meshes[0].mesh if meshes else config.runtime.mesh, devices)
        shards = row_shards(mesh)
        spread = f"do not spread over the {shards} devices of data and fsdp in runtime.mesh; choose a multiple of {shards}"
        require(rows % shards == 0, f"data.batch_size / training.accumulation_steps = {rows} rows {spread}")
        check_axes(config, mesh)
        learns_pairs = config.dpo is not None
        return cls(
            config,
            mesh,
            create=partial(build_model, config, vocab_size),
            tx=make_optimizer(config, abstract),
            rate=schedule(config.optimizer, config.training.steps),
            objective=objectives.find("dpo" if learns_pairs else config.training.objective, "training.objective"),
            batch_size=config.data.batch_size,
            frozen=(abstract,) if learns_pairs else (),
            fields=DEVICE_FIELDS,
            vocab_size=vocab_size,
            meshes=tuple(meshes),
        )

    def place(self, tree: Any) -> Any:
        """The shapes of a tree, with shardings."""
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, self.layout(tree, self.mesh))

    def fresh_state(self, key: jax.Array) -> State:
        """The state before the first step, on one device; `create_state` shards it."""
        model = self.create(key)
        return State(model, self.tx.init(model), jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    def abstract_state(self) -> State:
        """The state as shapes with shardings: moments are sharded like their parameters, scalars are replicated."""
        return self.place(jax.eval_shape(self.fresh_state, jax.random.key(0)))

    def create_state(self) -> State:
        """A fresh state, initialised already sharded, so that no device ever holds it whole."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        with jax.set_mesh(self.mesh):
            return jax.jit(self.fresh_state, out_shardings=shardings)(jax.random.key(self.config.seed))

    @cached_property
    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def whole(self, tree: Any) -> Any:
        """A tree whose arrays this process holds in full, gathered from all processes if there are several."""
        if jax.process_count() == 1:
            return tree
        return jax.tree.map(lambda x: x.addressable_data(0), jax.jit(lambda x: x, out_shardings=self._replicated)(tree))

    def put_everywhere(self, tree: Any) -> Any:
        """A tree that every process holds, as global arrays replicated on all devices."""
        if jax.process_count() == 1:
            return jax.device_put(tree, self._replicated)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._replicated, np.asarray(x)), tree)

    @property
    def step(self) -> Callable[..., tuple[State, Metrics]]:
        """The train step, (state, batch, *frozen) -> (state, metrics), not compiled."""
        return partial(train_step, config=self.config, tx=self.tx, rate=self.rate, objective=self.objective)

    def lower_step(self, state: State, batch: Mapping[str, Any]) -> jax.stages.Lowered:
        """The train step on leaves (see `on_leaves`) lowered for these shapes; the state is donated."""
        frozen = self.place(self.frozen)
        leaves, held = jax.tree.leaves(state), jax.tree.leaves(frozen)
        of_state, of_frozen = ([x.sharding for x in arrays] for arrays in (leaves, held))
        shardings = {"in_shardings": (of_state, self._rows_sharding, of_frozen), "out_shardings": (of_state, self._replicated)}
        options = {"donate_argnums": 0, "keep_unused": bool(held)}  # a plan counts all frozen inputs
        with jax.set_mesh(self.mesh):
            return jax.jit(on_leaves(self.step, state, frozen), **options, **shardings).lower(leaves, batch, held)

    def compile_step(self, state: State, batch: Mapping[str, Any]) -> CompiledStep:
        """The train step compiled ahead of time for these shapes."""
        return CompiledStep(self.lower_step(state, batch).compile(), jax.tree.structure(state))

    @cached_property
    def eval_step(self) -> Any:
        """The jitted evaluation step of a language model."""
        return jax.jit(eval_step)

    @property
    def _spreads(self) -> bool:
        return self.batch_size % (self.config.training.accumulation_steps * row_shards(self.mesh)) == 0

    @cached_property
    def _rows_sharding(self) -> NamedSharding:
        return batch_sharding(self.mesh) if self._spreads else self._replicated

    @cached_property
    def rows(self) -> HostRows:
        """The rows of a batch that this process reads; all of them if they are not sharded over the mesh."""
        return HostRows.of(self.mesh, jax.process_index()) if self._spreads else HostRows(0, 1, is_first())

    def local_rows(self, batch: HostBatch) -> HostBatch:
        """This host's slice of a whole batch."""
        rows = len(next(iter(batch.values()))) // self.rows.count
        return {name: values[self.rows.index * rows :][:rows] for name, values in batch.items()}

    def _on_devices(self, put: Callable[[Any], Any], batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: put(batch[name]) for name in self.fields or batch if name in batch}

    def put(self, batch: HostBatch) -> Batch:
        """This host's slice of a batch as global arrays, with rows sharded over the data axes."""
        self.beat()
        if jax.process_count() == 1:
            return jax.device_put(self._on_devices(lambda x: x, batch), self._rows_sharding)
        return self._on_devices(partial(jax.make_array_from_process_local_data, self._rows_sharding), batch)

    def abstract_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The shapes of a whole batch, with shardings."""
        return self._on_devices(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._rows_sharding), batch)

    def feed(self, batches: Iterator[HostBatch]) -> Iterator[tuple[Batch, HostBatch]]:
        """Yield (batch on the devices, batch on the host); the next batch is transferred while the current one is in use."""
        ahead: list[tuple[Batch, HostBatch]] = []
        for batch in batches:
            ahead.append((self.put(batch), batch))
            if len(ahead) == 2:
                yield ahead.pop(0)
        yield from ahead
