"""Everything a run computes with, built from its config: mesh, model, optimiser, state and the compiled step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metajax.config import Config
from metajax.core.errors import require
from metajax.distributed.mesh import HostRows, make_mesh, row_shards
from metajax.distributed.rules import batch_sharding, param_shardings
from metajax.models.lm import LM, decay_mask
from metajax.training.optimizers import make_optimizer
from metajax.training.state import State, initialiser
from metajax.training.step import DEVICE_FIELDS, Batch, compile_train_step, eval_step


def build_model(config: Config, vocab_size: int, key: jax.Array) -> LM:
    """The model of a config with fresh parameters; an imported checkpoint may have more rows than the tokenizer's table."""
    length, imported = max(config.row_slots, config.model.max_positions), config.imported
    rows = vocab_size if imported is None else imported.table(vocab_size)
    options = {"meta": config.meta_tokens, "runtime": config.runtime, "imported": imported}
    return LM(config.model, vocab_size=rows, max_length=length, key=key, **options)


def abstract_model(config: Config, vocab_size: int) -> LM:
    """The model with shapes in place of parameters."""
    return jax.eval_shape(lambda: build_model(config, vocab_size, jax.random.key(0)))


def check_axes(config: Config, mesh: Mesh) -> None:
    """UserError where context does not divide the rows, or tensor the heads: they would be whole on every device then."""
    slots, context, tensor = config.row_slots, mesh.shape["context"], mesh.shape["tensor"]
    for what, size, axis, shards in (
        ("slots of a row", slots, "context", context),
        ("heads (model.heads)", config.model.heads, "tensor", tensor),
        ("heads of keys (model.kv_heads)", config.model.num_kv_heads, "tensor", tensor),
    ):
        require(
            size % shards == 0, f"runtime.mesh: the {size} {what} do not divide by {axis} = {shards}; choose a divisor of {size}"
        )


@dataclass(frozen=True)
class Program:
    """What a config compiles to on a mesh."""

    config: Config
    vocab_size: int
    mesh: Mesh
    tx: optax.GradientTransformation
    beat: Callable[[], None] = lambda: None  # called with every batch that is put on the devices

    @classmethod
    def build(
        cls, config: Config, vocab_size: int, devices: list[jax.Device] | None = None, beat: Callable[[], None] = lambda: None
    ) -> Program:
        mesh = make_mesh(config.runtime.mesh, devices)
        rows, shards = config.data.batch_rows // config.training.accumulate, row_shards(mesh)
        require(
            rows % shards == 0,
            f"data.batch_rows / training.accumulate = {rows} rows do not spread over the {shards} devices of data and fsdp in "
            f"runtime.mesh; choose a multiple of {shards}",
        )
        check_axes(config, mesh)
        return cls(config, vocab_size, mesh, make_optimizer(config, decay_mask(abstract_model(config, vocab_size))), beat)

    def abstract_state(self) -> State:
        """The state as shapes with their shardings: parameters by the rules, moments as their parameters, scalars whole."""
        abstract = jax.eval_shape(self._create, jax.random.key(0))
        shardings = param_shardings(abstract, self.mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)

    def create_state(self) -> State:
        """A fresh state, initialised directly in its sharded layout, so that no device ever holds it whole."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        with jax.set_mesh(self.mesh):
            return jax.jit(self._create, out_shardings=shardings)(jax.random.key(self.config.seed))

    @property
    def _create(self) -> Any:
        return initialiser(lambda key: build_model(self.config, self.vocab_size, key), self.tx)

    def compile_step(self, state: State, batch: Batch) -> Any:
        """The train step compiled ahead of time for these shapes: it can never be compiled a second time."""
        shardings = jax.tree.map(lambda x: x.sharding, state)
        with jax.set_mesh(self.mesh):
            step = compile_train_step(self.config, self.tx, shardings, self.mesh)
            return step.lower(state, batch, *self.frozen(state.model)).compile()

    def frozen(self, parent: Any) -> tuple[Any, ...]:
        """What the step reads beside state and batch: with `dpo` the model that training starts from."""
        return (parent,) if self.config.dpo is not None else ()

    @cached_property
    def eval_step(self) -> Any:
        """The jitted evaluation step."""
        return jax.jit(eval_step)

    @cached_property
    def _rows(self) -> HostRows:
        return HostRows.of(self.mesh, jax.process_index())

    def local_rows(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """This host's slice of a whole batch."""
        rows = len(batch["tokens"]) // self._rows.count
        return {name: values[self._rows.index * rows :][:rows] for name, values in batch.items()}

    def whole(self, tree: Any) -> Any:
        """A tree that this process holds whole, gathered from all of them where there are several."""
        if jax.process_count() == 1:
            return tree
        everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(tree)
        return jax.tree.map(lambda x: x.addressable_data(0), everywhere)

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """This host's slice of a batch as global arrays, rows spread over the data axes."""
        self.beat()
        sharding = batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in DEVICE_FIELDS if name in batch}

    def feed(self, batches: Iterator[dict[str, np.ndarray]]) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """(on the devices, on the host) for each batch, the next one always on its way while one is in use."""
        ahead: tuple[Batch, dict[str, np.ndarray]] | None = None
        for batch in batches:
            current, ahead = ahead, (self.put(batch), batch)
            if current is not None:
                yield current
        if ahead is not None:
            yield ahead
