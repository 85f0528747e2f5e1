"""How an operation finds its implementation, by name or by the platform that is lowered for, and how rows spread over a mesh."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, PartitionSpec

from metajax.config import UserError, nearest, require
from metajax.parallel.rules import partition_spec

ONLY_ON = {"pallas_tpu": "tpu"}  # implementation -> the one platform that it runs on
DTYPES = {"float32", "bfloat16"}  # what the implementations in ONLY_ON compute with


def dispatch(table: Mapping[str, Callable], auto: Mapping[str, str], implementation: str, *args: Any, **kwargs: Any) -> Any:
    """table[implementation](*args, **kwargs). "auto" is auto[platform], else "xla", settled when the program is lowered.

    Raises UserError for an unknown implementation, for a dtype that it does not take, and, when the program is lowered, for a
    platform that it does not run on.
    """
    known = ("auto", *table)
    require(
        implementation in known,
        f"implementation = {implementation!r}: unknown{nearest(implementation, known)}; known: {', '.join(known)}",
    )
    arrays = {name: x for name, x in kwargs.items() if hasattr(x, "dtype")}
    dtypes = {str(x.dtype) for x in (*args, *arrays.values()) if jnp.issubdtype(x.dtype, jnp.floating)} - DTYPES
    calls = {name: _call(kernel, kwargs) for name, kernel in table.items()}
    if implementation == "auto":
        chosen = {platform: calls[name] for platform, name in auto.items() if not (dtypes and name in ONLY_ON)}
        return jax.lax.platform_dependent(args, arrays, default=calls["xla"], **chosen)
    if implementation not in ONLY_ON:
        return calls[implementation](args, arrays)
    require(not dtypes, f"{implementation} takes {' or '.join(sorted(DTYPES))}, not {', '.join(dtypes)}; choose xla or auto")
    platform = ONLY_ON[implementation]
    refuse = functools.partial(_refuse, f"{implementation} runs on {platform} only; choose xla or auto", calls["xla"])
    return jax.lax.platform_dependent(args, arrays, default=refuse, **{platform: calls[implementation]})


def _call(kernel: Callable, kwargs: Mapping[str, Any]) -> Callable:
    """`kernel` as a function of its positional arguments and of the arrays among its keywords."""
    return lambda args, arrays: kernel(*args, **(kwargs | arrays))


def _refuse(reason: str, like: Callable, *operands: Any) -> Any:
    """Zeros in the form of like(*operands), in a program that cannot be lowered."""
    never = _not_here.bind(reason=reason)
    return jax.tree.map(lambda x: jnp.full(x.shape, never, x.dtype), jax.eval_shape(like, *operands))


_not_here = Primitive("not_here")
_not_here.def_abstract_eval(lambda *, reason: jax.core.ShapedArray((), jnp.float32))


def _raise(context: mlir.LoweringRuleContext | None, *, reason: str) -> None:
    raise UserError(reason)


_not_here.def_impl(functools.partial(_raise, None))
mlir.register_lowering(_not_here, _raise)


def over_rows(kernel: Callable, rows: Collection[str]) -> Callable:
    """`kernel` on the rows that each device holds: the compiler cannot split a Pallas call over a mesh by itself.

    rows: names of the parameters whose first axis is the batch, as that of all outputs is; other arrays are whole on every device.
    The batch axes are those of the mesh in use (`jax.set_mesh`); rows that do not divide by them are whole on every device too.
    Inside `jax.shard_map`, or without a mesh of several devices, it is `kernel` itself.
    """
    signature = inspect.signature(kernel)

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
            return kernel(*args, **kwargs)
        arrays = {name: x for name, x in given.items() if hasattr(x, "dtype")}
        (count,) = {x.shape[0] for name, x in arrays.items() if name in rows}
        split = partition_spec(("batch",), (count,), mesh)
        specs = {name: split if name in rows else PartitionSpec() for name in arrays}
        local = lambda arrays: kernel(**(given | arrays))  # noqa: E731
        return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=split, check_vma=False)(arrays)

    return call
