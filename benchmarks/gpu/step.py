"""The whole train step at GPT-2 small size (recipe of learned meta-tokens): the Trainer's step beside PyTorch's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.clock import Case, Side, compile_all
from metajax import registry
from metajax.config import Config
from metajax.core.fields import override
from metajax.models.flops import peak_flops, step_flops
from metajax.models.lm import named_params
from metajax.planning.plan import whole_batch
from metajax.training.program import Program

ARMS = {  # the paper's recipe, and the changes to it
    "plain": ("plain_rope", {}),
    "meta, gathered": ("meta_rope", {}),
    "meta, dense": ("meta_rope", {"meta_tokens.attention": "dense"}),
}
# Ways to compile the same step. The recipe's setting ("full", 1) is for the smaller chips of a pod.
RUNTIMES = {
    "ours": {"runtime.remat": "none", "runtime.unroll": 1},
    "ours, layers unrolled": {"runtime.remat": "none", "runtime.unroll": 0},
    "ours, as in the recipe (recomputing)": {},
}
ROWS, VOCABULARY = 16, 50_304
TINY = {  # weights and steps are large enough for a wrong mask, gradient or update to show in the losses
    "model.init_std": 0.3,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 1,
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.mlp_width": 64,
    "model.compute_dtype": "float32",
    "data.sequence_length": 64,
    "model.max_positions": 0,
}
TURN_SECONDS = 0.25  # several steps: as in training, the next is launched while one runs
CHECKED = 3  # steps whose losses must agree
CLOSE = {"bfloat16": 0.02, "float32": 1e-4}  # greatest difference of two losses in nats


def config_of(arm: str, tiny: bool) -> Config:
    row, changes = ARMS[arm]
    base = registry.find_experiment(f"learned_meta_tokens/pretrain/{row}").build("paper")
    return override(base, changes | {"data.batch_size": 2 if tiny else ROWS} | (TINY if tiny else {}))


def random_batch(config: Config, vocab_size: int) -> dict[str, np.ndarray]:
    """Full rows of random tokens, with meta-tokens at random positions. Rows of one token would all update one embedding."""
    rng, batch = np.random.default_rng(0), whole_batch(config)
    changed = {name: rng.integers(vocab_size, size=batch[name].shape, dtype=np.int32) for name in ("tokens", "targets")}
    if "meta_positions" in batch:
        rows, count = batch["meta_positions"].shape
        meta_positions = [np.sort(rng.choice(config.row_positions, count, replace=False)) for _ in range(rows)]
        changed["meta_positions"] = np.stack(meta_positions).astype(np.int32)
    return batch | changed


class Ours:
    """The compiled step with its state, which every call updates."""

    def __init__(self, config: Config, vocab_size: int, batch: dict[str, np.ndarray]):
        self.program = Program.build(config, vocab_size)
        self.batch = self.program.put(batch)
        self.run = self.program.compile_step(self.program.abstract_state(), self.batch)

    def start(self, leaves: list[np.ndarray]) -> None:
        """Start from the leaves of a fresh state, which are the same however the step is compiled."""
        like, tree = jax.tree.flatten(self.program.abstract_state())
        placed = [jax.device_put(jnp.array(x), shape.sharding) for x, shape in zip(leaves, like, strict=True)]
        self.state = jax.tree.unflatten(tree, placed)

    def step(self) -> jax.Array:
        with jax.set_mesh(self.program.mesh):
            self.state, metrics = self.run(self.state, self.batch)
        return metrics["loss"]

    def memory(self) -> int:
        """Bytes that the compiled step needs, with state and batch, as counted by the compiler."""
        found = self.run.compiled.memory_analysis()
        outputs = found.output_size_in_bytes - found.alias_size_in_bytes
        return found.argument_size_in_bytes + outputs + found.temp_size_in_bytes


def measure(tiny: bool, torch_lm: Any) -> Iterator[Case]:
    """Yield every arm when it is done. torch_lm: the module benchmarks.gpu.torch_lm, None without PyTorch."""
    vocab_size, configs = 256 if tiny else VOCABULARY, {arm: config_of(arm, tiny) for arm in ARMS}
    batches = {arm: random_batch(config, vocab_size) for arm, config in configs.items()}
    jobs = {
        (arm, name): functools.partial(Ours, override(config, changes), vocab_size, batches[arm])
        for arm, config in configs.items()
        for name, changes in RUNTIMES.items()
        if arm == "plain" or name != "ours, as in the recipe (recomputing)"
    }
    print(f"step: compiling {len(jobs)} programs", flush=True)
    ready = compile_all(jobs)
    for arm, config in configs.items():
        flops, peak = step_flops(config, vocab_size, batches[arm]), peak_flops(jax.devices()[:1])
        facts = {"flops": flops, "tokens": batches[arm]["tokens"].size, "peak_flops": peak}
        case = Case("step", f"{arm}: {config.data.batch_size} rows of {config.row_positions}", facts)
        fresh = functools.cache(functools.partial(_fresh, config, vocab_size))
        losses: dict[str, list[float]] = {}
        makers = {name: functools.partial(_ours, name, made, fresh, losses) for (of, name), made in ready.items() if of == arm}
        if torch_lm is not None:
            build = functools.partial(torch_lm.Trainer, config, vocab_size, batches[arm])
            close = CLOSE[config.model.compute_dtype]
            makers["torch"] = functools.partial(_torch, torch_lm, build, fresh, losses, close)
        case.race(makers, turn_seconds=TURN_SECONDS)
        yield case


def _fresh(config: Config, vocab_size: int) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """(leaves of a state before its first step, parameters by name), on the host; every side starts from these."""
    state = Program.build(config, vocab_size).create_state()
    return [np.array(x) for x in jax.tree.leaves(state)], {k: np.array(x[...]) for k, x in named_params(state.model).items()}


def _ours(name: str, made: Callable[[], Ours], fresh: Callable, losses: dict[str, list[float]]) -> Side:
    ours = made()
    ours.start(fresh()[0])
    losses[name] = [float(ours.step()) for _ in range(CHECKED)]
    parameters = sum(x.size for x in jax.tree.leaves(ours.state.model))
    facts = {"parameters": parameters, "memory_bytes": ours.memory(), "losses": losses[name]}
    return Side(name, ours.step, jax.block_until_ready, None, facts)


def _torch(torch_lm: Any, build: Callable, fresh: Callable, losses: dict[str, list[float]], close: float) -> Side:
    before = torch_lm.forget_peak()
    trainer = build(fresh()[1])
    found = [float(trainer.step()) for _ in range(CHECKED)]
    memory = None if before is None else torch_lm.peak_memory() - before
    parameters = sum(p.numel() for p in trainer.parameters)
    facts = {"parameters": parameters, "memory_bytes": memory, "losses": found}
    for name, own in losses.items():
        worst = max(abs(a - b) for a, b in zip(found, own, strict=True))
        if not worst < close:
            raise ValueError(f"losses {found} are not those of {name}, {own}: {worst:.3g} nats apart, {close} is rounding")
    return Side("torch", trainer.step, trainer.wait, None, facts)
