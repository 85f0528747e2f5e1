"""The measured programs: what they compute, how to build them, and how often each region of a kernel is visited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.bench.schedule import Visits

PASSES = ("forward", "both")  # both: the outputs and the gradient of every input


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of a program.

    name: part of its name in the compiled program. steps: grid steps. inside: visits of a step's regions, in program order.
    bytes: moved between HBM and the chip per call.
    """

    name: str
    steps: int
    inside: tuple[Visits, ...]
    bytes: int


@dataclass(frozen=True)
class Program:
    """One implementation of one operation at one shape. `build` returns the function and the shapes of its arguments."""

    op: str
    shape: str
    implementation: str
    passes: str
    build: Callable[[], tuple[Callable, tuple[Any, ...]]]
    kernels: tuple[Kernel, ...] = ()  # of a Pallas program; without kernels, XLA's estimate is used
    useful: float = 0.0  # attention: allowed pairs / computed pairs
    necessary: int = 0  # scan: vector-unit operations of a call that the recurrence needs
    note: str = ""

    @property
    def name(self) -> str:
        return "/".join((self.op, self.shape, self.implementation, self.passes))


def when(times: int, slight: bool = False) -> Visits:
    """Visits of the body of a `pl.when`."""
    return Visits("if", times, slight)


def loop(iterations: int) -> Visits:
    """Iterations of a loop's body, over the whole call."""
    return Visits("loop", iterations)


def array(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def both_passes(function: Callable) -> Callable:
    """The outputs and the gradients of all arguments, for cotangents of 1."""

    def run(*arguments: Any) -> Any:
        outputs, pull = jax.vjp(function, *arguments)
        return outputs, pull(jax.tree.map(jnp.ones_like, outputs))

    return run


def with_passes(passes: str, function: Callable) -> Callable:
    return both_passes(function) if passes == "both" else function
