"""A train step of GPT-2 on the CPU: metajax beside hand-written JAX with optax, PyTorch, and torch.compile, with the same
architecture, optimizer and batch.

    python -m benchmarks.cpu_step [--size small|medium] [--rounds 16] [--only metajax,jax,...]

PyTorch: pip install torch==2.13.0. Numbers are ratios of workers that take turns; above 1 is slower than metajax.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.turns import ratios, take_turns, work


class Size(NamedTuple):
    layers: int
    width: int
    heads: int
    vocabulary: int
    rows: int
    length: int
    repeat: int  # steps of one turn


SIZES = {"small": Size(4, 128, 4, 512, 8, 128, 8), "medium": Size(6, 384, 6, 2048, 2, 256, 2)}  # 0.87M and 11.5M parameters
RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0


def tokens_of(size: Size) -> np.ndarray:
    return np.random.default_rng(0).integers(0, size.vocabulary, (size.rows, size.length + 1)).astype(np.int32)


def metajax_step(size: Size) -> Callable[[], float]:
    from metajax import registry
    from metajax.core.fields import override
    from metajax.models.presets import gpt2
    from metajax.training.program import Program

    registry.load("experiments")
    optimizer = {"learning_rate": RATE, "betas": BETAS, "weight_decay": DECAY, "clip_norm": CLIP}
    changes = {"model": gpt2(size.layers, size.heads, size.width), "meta_tokens": None, "data.sequence_length": size.length}
    changes |= {"data.batch_size": size.rows} | {f"optimizer.{name}": value for name, value in optimizer.items()}
    program = Program.build(override(registry.find_experiment("quickstart/plain").build("cpu"), changes), size.vocabulary)
    tokens, shape = tokens_of(size), (size.rows, size.length)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    }
    batch |= {"segment_ids": np.ones(shape, np.int32), "loss_weights": np.ones(shape, np.float32)}
    batch |= {"is_body": np.ones(shape, bool), "asks_metadata": np.zeros(shape, bool)}
    placed, state = program.put(batch), program.create_state()
    step = program.compile_step(state, placed)
    import jax

    leaves = jax.tree.leaves(state)

    def run() -> float:
        nonlocal leaves
        leaves, metrics = step.run(leaves, placed, [])
        return jax.device_get(metrics)["loss"]

    return run


def jax_step(size: Size) -> Callable[[], float]:
    import jax
    import jax.numpy as jnp
    import optax

    layers, width, heads, vocabulary, rows, length, _ = size
    causal, tokens = jnp.tril(jnp.ones((length, length), bool)), tokens_of(size)

    def init(key: jax.Array) -> Any:
        keys = iter(jax.random.split(key, 3 + 6 * layers))
        normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)  # noqa: E731
        shapes = {"qkv": (width, 3 * width), "o": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
        ones = lambda *names: {name: jnp.ones(width) for name in names}  # noqa: E731
        blocks = [{name: normal(*shape) for name, shape in shapes.items()} | ones("n1", "n2") for _ in range(layers)]
        return {"wte": normal(vocabulary, width), "wpe": normal(length, width), "blocks": blocks, "nf": jnp.ones(width)}

    def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain

    def loss(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        h = (p["wte"][x] + p["wpe"]).reshape(rows * length, width)
        for b in p["blocks"]:
            split = jnp.split(norm(h, b["n1"]) @ b["qkv"], 3, -1)
            q, k, v = (part.reshape(rows, length, heads, width // heads) for part in split)
            scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width // heads)
            mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(causal, scores, -1e30), -1), v)
            h = h + mixed.reshape(rows * length, width) @ b["o"]
            h = h + jax.nn.gelu(norm(h, b["n2"]) @ b["up"], approximate=False) @ b["down"]
        return optax.softmax_cross_entropy_with_integer_labels(norm(h, p["nf"]) @ p["wte"].T, y.reshape(-1)).mean()

    params = init(jax.random.key(0))
    decays = jax.tree.map(lambda a: a.ndim > 1, params)
    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(RATE, *BETAS, weight_decay=DECAY, mask=decays))
    moments = tx.init(params)

    def step(p: Any, s: Any, x: jax.Array, y: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(p, x, y)
        updates, s = tx.update(grads, s, p)
        return optax.apply_updates(p, updates), s, value

    x, y = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, moments, x, y).compile()

    def run() -> float:
        nonlocal params, moments
        params, moments, value = compiled(params, moments, x, y)
        return float(value)

    return run


def torch_step(size: Size, compiled: bool = False) -> Callable[[], float]:
    import torch
    import torch.nn.functional as F
    from torch import nn

    from benchmarks.torch_gpt2 import GPT2

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = GPT2(size.layers, size.width, size.heads, size.vocabulary, size.length)
    params = list(model.parameters())
    groups = [
        {"params": [w for w in params if (w.ndim > 1) == decays], "weight_decay": DECAY * decays} for decays in (True, False)
    ]
    optimizer, called = torch.optim.AdamW(groups, lr=RATE, betas=BETAS), torch.compile(model) if compiled else model
    tokens = torch.from_numpy(tokens_of(size).astype(np.int64))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)

    def run() -> float:
        loss = F.cross_entropy(called(x).view(-1, size.vocabulary), y)
        loss.backward()
        nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


WORKERS: dict[str, Callable[[Size], Callable[[], float]]] = {
    "metajax": metajax_step,
    "jax": jax_step,
    "torch": torch_step,
    "torch-compile": lambda size: torch_step(size, compiled=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--only", default=",".join(WORKERS))
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SIZES[options.size]
    if options.worker:
        work(WORKERS[options.worker](size), size.repeat)
        return
    command = ("-m", "benchmarks.cpu_step", "--size", options.size, "--worker")
    found = take_turns({name: (*command, name) for name in options.only.split(",")}, options.rounds)
    print("\n".join(ratios(found, options.only.partition(",")[0])))


if __name__ == "__main__":
    main()
