"""Selects the implementation of an operation, by name or by the platform that the program is lowered for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from metajax.core.errors import UserError, nearest, require

ONLY_ON = {"pallas_tpu": "tpu"}  # implementation -> the one platform that it runs on
DTYPES = {"float32", "bfloat16"}  # that the implementations in ONLY_ON support


def dispatch(table: Mapping[str, Callable], auto: Mapping[str, str], implementation: str, *args: Any, **kwargs: Any) -> Any:
    """table[implementation](*args, **kwargs). "auto" means auto[platform], else "xla", chosen at lowering.

    Raises UserError for an unknown implementation and for a dtype that it does not support. Lowering raises it for a platform
    on which the implementation does not run.
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
    """`kernel` as a function of its positional arguments and its array keyword arguments."""
    return lambda args, arrays: kernel(*args, **(kwargs | arrays))


def _refuse(reason: str, like: Callable, *operands: Any) -> Any:
    """Zeros with the shapes and dtypes of like(*operands); lowering a program that contains them raises `reason`."""
    never = _not_here.bind(reason=reason)
    return jax.tree.map(lambda x: jnp.full(x.shape, never, x.dtype), jax.eval_shape(like, *operands))


_not_here = Primitive("not_here")
_not_here.def_abstract_eval(lambda *, reason: ShapedArray((), jnp.float32))


def _raise(context: mlir.LoweringRuleContext | None, *, reason: str) -> NoReturn:
    raise UserError(reason)


_not_here.def_impl(functools.partial(_raise, None))
mlir.register_lowering(_not_here, _raise)
