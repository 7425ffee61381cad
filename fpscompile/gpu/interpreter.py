"""Right numbers from Triton's interpreter (``TRITON_INTERPRET=1``) for the types that our kernels use.

The interpreter runs a kernel block by block in numpy and keeps bfloat16 and FP8 as raw bits. In Triton 3.6 and 3.7
some operations on those bits are wrong, and :func:`repaired_interpreter` replaces exactly these:

1. float32 to FP8: a carry out of the mantissa is lost (values just below a power of two halve), subnormals are
   truncated, large values wrap instead of saturating.
2. float32 to bfloat16 truncates, and integers become bfloat16 by their bits; a GPU rounds to nearest even.
3. FP8 to wider floats loses NaN; arithmetic, comparisons and reductions of bfloat16 and FP8 work on the raw bits.
4. ``tl.dot`` of bfloat16 multiplies raw bits, that of FP8 goes through (3).
5. ``tl.maximum``, ``tl.minimum`` and ``tl.clamp`` spread NaN by default, a GPU drops it; ``tl.fma`` rounds twice.
6. The FP8 types of AMD's gfx94x have no conversion.
7. Triton 3.6 with numpy >= 2.4: a loop bound or index that was computed or loaded raises TypeError.
8. A kernel that calls a device function (all of ``tl.max``, ``tl.sum``, ...) leaves ``triton.language`` patched.

Overflow when casting to FP8 is what the conversion instructions make of it: E4M3 and E5M2 saturate, infinities too
(``satfinite`` of PTX ``cvt``); the FNUZ formats of gfx94x give NaN, since saturation is a mode of that hardware: clamp
in the kernel.
Conversions go through float32, so float64 values within half a float32 step of a tie may round the other way.

Not modelled: the shorter accumulators of tensor cores, the approximations of ``ex2`` and ``rsqrt``, TF32 operands,
inline assembly, ``libdevice`` functions.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fpscompile.errors import UnsupportedError

_lock = threading.RLock()
_depth = 0


def interpreting() -> bool:
    """Whether kernels decorated now run in the interpreter; False where Triton is not installed."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


@contextlib.contextmanager
def repaired_interpreter() -> Iterator[None]:
    """Launches of interpreted kernels inside this context compute what the module's docstring promises.

    Does nothing when kernels are compiled (:func:`interpreting` is False). The interpreter keeps its state in global
    variables, so only one thread at a time is let in; the same thread may nest. On leaving, ``triton.language`` and
    the interpreter are as they were.

    Raises:
        UnsupportedError: Triton's interpreter has other internals than these repairs know, or TRITON_INTERPRET was
            set only after Triton was imported.
    """
    if not interpreting():
        yield
        return
    global _depth
    with _lock, contextlib.ExitStack() as stack:
        if _depth == 0:
            _enter(stack)
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def _enter(stack: contextlib.ExitStack) -> None:
    from triton.runtime import interpreter

    _check(interpreter)
    for owner, name, value in _repairs(interpreter):
        _replace(stack, owner, name, value)
    _replace(stack, interpreter, "_patch_lang", _patch_once(interpreter, stack))
    # -inf - -inf, exp2 of large numbers and the like are the kernels' business, and silent on a GPU.
    stack.enter_context(np.errstate(all="ignore"))


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


_INTERNALS = {
    "InterpreterBuilder.cast_impl": ("self", "src", "dst_type"),
    "InterpreterBuilder.create_fp_to_fp": ("self", "src", "dst_type", "rounding_mode"),
    "InterpreterBuilder.create_dot": ("self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"),
    "InterpreterBuilder.binary_op": ("self", "lhs", "rhs", "op"),
    "InterpreterBuilder.create_maxnumf": ("self", "lhs", "rhs"),
    "InterpreterBuilder.create_minnumf": ("self", "lhs", "rhs"),
    "InterpreterBuilder.create_clampf": ("self", "arg", "lo", "hi", "propagate_nans"),
    "InterpreterBuilder.create_fma": ("self", "x", "y", "z"),
    "ReduceOps.sum": ("self", "input"),
    "ReduceOps.min_max": ("self", "input", "val_reduce_op", "idx_reduce_op"),
    "TensorHandle": ("data", "dtype", "attr"),
    "_LangPatchScope.set_attr": ("self", "obj", "name", "value"),
    "_LangPatchScope.restore": ("self",),
    "_patch_lang": ("fn",),
    "_patch_builtin": ("pkg", "builder", "scope"),
    "_patch_lang_tensor": ("tensor", "scope"),
    "_patch_lang_core": ("lang", "scope"),
}
"""What the repairs replace or call, with the parameters they count on."""


def _check(interpreter: Any) -> None:
    import triton
    import triton.language as tl

    for path, parameters in _INTERNALS.items():
        found: Any = interpreter
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is None or tuple(inspect.signature(found).parameters) != parameters:
            raise UnsupportedError(
                f"the interpreter of Triton {triton.__version__} has no {path}({', '.join(parameters)}), which its "
                "repairs rely on; use Triton 3.6 or 3.7, or unset TRITON_INTERPRET"
            )
    if not isinstance(tl.max, interpreter.InterpretedFunction):
        raise UnsupportedError(
            "TRITON_INTERPRET was set after triton had been imported, so tl.max and its like would be compiled; "
            "set it before the process starts"
        )


def _repairs(interpreter: Any) -> list[tuple[Any, str, Callable[..., Any]]]:
    """(owner, attribute, replacement) of every repair but the language's."""
    import triton.language as tl

    builder, reduce_ops, handle = interpreter.InterpreterBuilder, interpreter.ReduceOps, interpreter.TensorHandle
    formats = _formats()
    old_cast, old_fp_to_fp, old_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    old_binary, old_sum, old_min_max = builder.binary_op, reduce_ops.sum, reduce_ops.min_max
    rtne = interpreter._ir.ROUNDING_MODE.RTNE

    def raw(dtype: Any) -> bool:
        return dtype.scalar.name in formats

    def read(x: Any) -> np.ndarray:
        """A handle's values in an arithmetic dtype: float32 for the raw ones."""
        return formats[x.dtype.scalar.name].decode(x.data) if raw(x.dtype) else x.data

    def write(values: np.ndarray, dtype: Any) -> Any:
        """A handle of ``dtype`` that holds ``values``, rounded to nearest even."""
        if raw(dtype):
            return handle(formats[dtype.scalar.name].encode(values), dtype.scalar)
        return handle(values.astype(interpreter._get_np_dtype(dtype)), dtype.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        return write(read(src), dst_type) if raw(src.dtype) or raw(dst_type) else old_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if rounding_mode in (None, rtne) and (raw(src.dtype) or raw(dst_type)):
            return write(read(src), dst_type)
        if raw(dst_type) and dst_type.scalar != tl.bfloat16:
            raise UnsupportedError(f"rounding mode {rounding_mode} to {dst_type.scalar} is not emulated; use 'rtne'")
        return old_fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if d.data.dtype == np.float32 and a.dtype.scalar.is_floating():
            # float16 too: its products are exact in float32, and numpy has no fast matmul for it.
            product = np.matmul(read(a).astype(np.float32, copy=False), read(b).astype(np.float32, copy=False))
            return handle(product + d.data, d.dtype.scalar)
        if raw(a.dtype) or raw(b.dtype):
            a, b = write(read(a), tl.float32), write(read(b), tl.float32)
            product = np.matmul(a.data, b.data) + read(d)
            return write(product, d.dtype)
        return old_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not raw(lhs.dtype):
            return old_binary(self, lhs, rhs, op)
        output = op(read(lhs), read(rhs))
        return handle(output, lhs.dtype.scalar) if output.dtype == np.bool_ else write(output, lhs.dtype)

    def create_maxnumf(self: Any, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self: Any, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(self: Any, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        keep = propagate_nans == interpreter._ir.PROPAGATE_NAN.ALL
        at_least, at_most = (np.maximum, np.minimum) if keep else (np.fmax, np.fmin)
        return write(at_most(at_least(read(arg), read(lo)), read(hi)), arg.dtype)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # float64 holds a product of float32 exactly; its sum is rounded twice, which differs in one case in 2^29.
        wide = np.result_type(read(z).dtype, np.float64)
        return write(read(x).astype(wide) * read(y) + read(z), z.dtype)

    def wide(x: Any) -> Any:
        """A tensor of float32 values in place of one of raw bits."""
        return tl.tensor(handle(read(x.handle), tl.float32), tl.block_type(tl.float32, list(x.handle.data.shape)))

    def narrow(x: Any, dtype: Any) -> Any:
        out = write(np.asarray(x.handle.data), dtype)
        return tl.tensor(out, tl.block_type(dtype.scalar, list(x.shape)) if x.type.is_block() else dtype.scalar)

    def reduce_sum(self: Any, input: Any) -> Any:  # noqa: A002 (the replaced method's name)
        return narrow(old_sum(self, wide(input)), input.dtype) if raw(input.dtype) else old_sum(self, input)

    def reduce_min_max(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:  # noqa: A002
        first = input[0] if isinstance(input, tuple) else input
        # Same values as nanmax and nanmin, without their warning about rows of NaN.
        val_reduce_op = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}.get(val_reduce_op, val_reduce_op)
        if not raw(first.dtype):
            return old_min_max(self, first, val_reduce_op, idx_reduce_op)
        result = old_min_max(self, wide(first), val_reduce_op, idx_reduce_op)
        if isinstance(result, tuple):
            return narrow(result[0], first.dtype), result[1]
        return result if val_reduce_op is None else narrow(result, first.dtype)

    return [
        (builder, "cast_impl", cast_impl),
        (builder, "create_fp_to_fp", create_fp_to_fp),
        (builder, "create_dot", create_dot),
        (builder, "binary_op", binary_op),
        (builder, "create_maxnumf", create_maxnumf),
        (builder, "create_minnumf", create_minnumf),
        (builder, "create_clampf", create_clampf),
        (builder, "create_fma", create_fma),
        (reduce_ops, "sum", reduce_sum),
        (reduce_ops, "min_max", reduce_min_max),
    ]


def _patch_once(interpreter: Any, stack: contextlib.ExitStack) -> Callable[[Any], Any]:
    """A stand-in for ``_patch_lang`` that patches each language module once and undoes it when ``stack`` closes.

    The original patches again at every call of a device function, and never undoes what only such a call patched.
    """
    import triton.language as tl

    scope = interpreter._LangPatchScope()
    stack.callback(scope.restore)
    builder = interpreter.interpreter_builder
    done: set[int] = set()

    class Nothing:
        def restore(self) -> None:
            """What a launch calls when it ends; the language stays patched until the context does."""

    def patch_lang(fn: Any) -> Any:
        for lang in (tl, tl.core):
            if id(lang) in done or not any(value is lang for value in fn.__globals__.values()):
                continue
            done.add(id(lang))
            interpreter._patch_builtin(lang, builder, scope)
            if lang is tl:
                interpreter._patch_builtin(tl.math, builder, scope)
            if len(done) == 1:  # classes and modules that both share
                interpreter._patch_builtin(tl.tensor, builder, scope)
                interpreter._patch_lang_tensor(tl.tensor, scope)
                scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
                interpreter._patch_builtin(tl.core.tensor_descriptor_base, builder, scope)
            interpreter._patch_lang_core(lang, scope)
            _patch_to_ir(tl, scope)
        return Nothing()

    return patch_lang


def _patch_to_ir(tl: Any, scope: Any) -> None:
    """Let ``dtype.to_ir`` know the FP8 formats of gfx94x."""
    patched = tl.dtype.to_ir

    def to_ir(self: Any, builder: Any) -> Any:
        if self.name == "fp8e4b8":
            return builder.get_fp8e4b8_ty()
        if self.name == "fp8e5b16":
            return builder.get_fp8e5b16_ty()
        return patched(self, builder)

    scope.set_attr(tl.dtype, "to_ir", to_ir)


class _Format:
    """Conversions between the raw bits of one narrow float type and float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.bits = torch.uint8 if dtype.itemsize == 1 else torch.uint16
        saturates = dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        self.limit = torch.finfo(dtype).max if saturates else None
        codes = torch.arange(256**dtype.itemsize, dtype=torch.int32).to(self.bits)
        self.table = codes.view(dtype).to(torch.float32).numpy()

    def decode(self, data: np.ndarray) -> np.ndarray:
        """Unsigned integers of any shape to float32; exact."""
        return np.asarray(self.table[data])

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Numbers of any shape and dtype to unsigned integers, through float32, to nearest even; NaN stays NaN."""
        values = np.ascontiguousarray(values, dtype=np.float32).reshape(values.shape)
        if self.limit is not None:
            values = np.clip(values, -self.limit, self.limit)
        return torch.from_numpy(values).to(self.dtype).view(self.bits).numpy()


@functools.cache
def _formats() -> dict[str, _Format]:
    """The types that the interpreter keeps as raw bits, by Triton's names."""
    return {
        "bf16": _Format(torch.bfloat16),
        "fp8e4nv": _Format(torch.float8_e4m3fn),
        "fp8e5": _Format(torch.float8_e5m2),
        "fp8e4b8": _Format(torch.float8_e4m3fnuz),
        "fp8e5b16": _Format(torch.float8_e5m2fnuz),
    }
