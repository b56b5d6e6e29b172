"""Triton's interpreter on numpy arrays: numerics without a GPU. Slow, for tests."""

import threading
import warnings

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# Gaps of Triton 3.6's interpreter, closed here: loop bounds under NumPy 2.5, which no longer converts arrays of one
# element, and bfloat16, which it keeps as uint16, multiplies as such and rounds towards zero.
_patch_tensor = interpreter._patch_lang_tensor
_cast = interpreter.InterpreterBuilder.cast_impl
_dot = interpreter.InterpreterBuilder.create_dot


def _patch_tensor_for_numpy(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _cast_bfloat16(self, source, dtype):
    if source.dtype.scalar == tl.bfloat16 and dtype.scalar == tl.float32:
        return interpreter.TensorHandle(source.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        return interpreter.TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
    return _cast(self, source, dtype)


def _dot_bfloat16(self, a, b, *others):
    if a.dtype.scalar == tl.bfloat16:
        a, b = (_cast_bfloat16(self, x, tl.float32) for x in (a, b))
    return _dot(self, a, b, *others)


_one_at_a_time = threading.Lock()  # the interpreter keeps the running program in global variables

interpreter._patch_lang_tensor = _patch_tensor_for_numpy
interpreter.InterpreterBuilder.cast_impl = _cast_bfloat16
interpreter.InterpreterBuilder.create_dot = _dot_bfloat16


class _HostArray:
    """As much of a torch tensor as the interpreter asks of one."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return _HostArray(self.array)

    def set_(self, *_):
        return self

    def copy_(self, _):
        return self

    storage_offset = size = stride = lambda self: None


def interpret(kernel, outputs, programs: int, constants: dict, *arrays) -> tuple[np.ndarray, ...]:
    """Runs a kernel's programs in turn, on numpy; outputs that no one wrote are NaN."""
    arrays = [np.ascontiguousarray(x) for x in arrays]
    results = [np.full(x.shape, np.nan, x.dtype) for x in outputs]
    with _one_at_a_time, np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # maxima of rows that hold NaN alone
        kernel[(programs,)](*map(_HostArray, (*arrays, *results)), **constants)
    return tuple(results)
