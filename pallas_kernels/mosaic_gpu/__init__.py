"""Parallax attention for Hopper as Pallas Mosaic GPU kernels."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sizes import MosaicGpuBlockSizes
from pallas_kernels.mosaic_gpu import backward as _backward
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu import forward as _forward


def unsupported(query, probe, key, value, mask, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query: needs bfloat16 or float16, got {query.dtype}"
    for name, x in (("query", query), ("value", value)):
        if x.shape[-1] > common.WIDTHS[-1]:
            return f"{name}: head width is at most {common.WIDTHS[-1]}, got {x.shape[-1]}"
    if block_sizes is not None and not isinstance(block_sizes, MosaicGpuBlockSizes):
        return f"block_sizes: needs MosaicGpuBlockSizes, got {type(block_sizes).__name__}"
    return common.unsupported_device()


def _pad(width: int, *arrays) -> list[jax.Array]:
    return [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) for x in arrays]


def _width(query, value) -> int:
    return next(w for w in common.WIDTHS if max(query.shape[-1], value.shape[-1]) <= w)


def forward(query, probe, key, value, mask, *, scale, block_sizes):
    """Returns (out, v_mean, lse, t_mean); see `pallas_kernels.tiles.finish`."""
    stages = (block_sizes or MosaicGpuBlockSizes()).forward_stages
    kernel = functools.partial(_forward.forward, scale=scale, stages=stages)
    operands = _pad(_width(query, value), query, probe, key, value)
    out, v_mean, lse, t_mean = kernel(*operands, mask, interpret=common.is_interpreted())
    return out[..., : value.shape[-1]], v_mean[..., : value.shape[-1]], lse, t_mean


def backward(query, probe, key, value, mask, out, v_mean, lse, t_mean, dout, *, scale, block_sizes):
    """Returns (dquery, dprobe, dkey, dvalue)."""
    stages = (block_sizes or MosaicGpuBlockSizes()).backward_stages
    kernel = functools.partial(_backward.backward, scale=scale, stages=stages)
    width = _width(query, value)
    operands = _pad(width, query, probe, key, value)
    results = *_pad(width, out, v_mean), lse, t_mean, *_pad(width, dout)
    gradients = kernel(*operands, mask, *results, interpret=common.is_interpreted())
    return tuple(g[..., : x.shape[-1]] for g, x in zip(gradients, (query, probe, key, value), strict=True))
