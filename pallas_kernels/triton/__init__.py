"""Parallax attention as Pallas kernels lowered to Triton."""

import functools
import warnings

import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.block_sizes import TritonBlockSizes, triton_block_sizes
from pallas_kernels.triton import backward as _backward
from pallas_kernels.triton import forward as _forward


def unsupported(query, probe, key, value, mask, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if query.dtype == jnp.float64:
        return "query: float64 runs in 'reference' and 'xla' only"
    if block_sizes is not None and not isinstance(block_sizes, TritonBlockSizes):
        return f"block_sizes: needs TritonBlockSizes, got {type(block_sizes).__name__}"
    return None


_warned = False


def _warn_once() -> None:
    """JAX's own warning comes at every lowering and does not say what to do; this one comes once and does."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "implementation 'triton' rests on Pallas' Triton backend, which JAX has deprecated: a release after 0.12 "
            "may drop it. Until then nothing needs to be done, and then jax-triton 0.3, if installed, carries on. On "
            "Hopper 'mosaic_gpu' does not depend on it, and 'xla' runs everywhere.",
            FutureWarning,
            stacklevel=2,
        )


def _sizes(query, value, block_sizes) -> TritonBlockSizes:
    if block_sizes is not None:
        return block_sizes
    bits = 8 * query.dtype.itemsize
    return triton_block_sizes(device.target()[1], bits, query.shape[-1], value.shape[-1])


def forward(query, probe, key, value, mask, *, scale, block_sizes):
    """Returns (out, v_mean, lse, t_mean); see `pallas_kernels.tiles.finish`."""
    _warn_once()
    config = _sizes(query, value, block_sizes).forward
    return device.run(functools.partial(_forward.forward, scale=scale, config=config), query, probe, key, value, mask)


def backward(query, probe, key, value, mask, out, v_mean, lse, t_mean, dout, *, scale, block_sizes):
    """Returns (dquery, dprobe, dkey, dvalue)."""
    kernel = functools.partial(_backward.backward, scale=scale, block_sizes=_sizes(query, value, block_sizes))
    return device.run(kernel, query, probe, key, value, mask, out, v_mean, lse, t_mean, dout)
