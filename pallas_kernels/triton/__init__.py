"""Parallax attention as Pallas kernels lowered to Triton."""

import functools

import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.block_sizes import TritonBlockSizes
from pallas_kernels.triton import backward as _backward
from pallas_kernels.triton import forward as _forward


def unsupported(query, probe, key, value, mask, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if query.dtype == jnp.float64:
        return "query: float64 runs in 'reference' and 'xla' only"
    if block_sizes is not None and not isinstance(block_sizes, TritonBlockSizes):
        return f"block_sizes: needs TritonBlockSizes, got {type(block_sizes).__name__}"
    return None


def forward(query, probe, key, value, mask, *, scale, block_sizes):
    """Returns (out, v_mean, lse, t_mean); see `pallas_kernels.tiles.finish`."""
    sizes = block_sizes or TritonBlockSizes()
    return device.run(
        functools.partial(_forward.forward, scale=scale, config=sizes.forward), query, probe, key, value, mask
    )


def backward(query, probe, key, value, mask, out, v_mean, lse, t_mean, dout, *, scale, block_sizes):
    """Returns (dquery, dprobe, dkey, dvalue)."""
    sizes = block_sizes or TritonBlockSizes()
    kernel = functools.partial(_backward.backward, scale=scale, block_sizes=sizes)
    return device.run(kernel, query, probe, key, value, mask, out, v_mean, lse, t_mean, dout)
