"""Parallax attention for Hopper as Pallas Mosaic GPU kernels."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.mosaic_gpu import backward as _backward
from pallas_kernels.mosaic_gpu import forward as _forward
from pallas_kernels.mosaic_gpu.block_sizes import MosaicGpuBlockSizes

WIDTHS = 64, 128  # of heads and values; others are padded with zeros
HOPPER = "H100", "H200", "H800", "H20", "GH200"


def unsupported(query, probe, key, value, mask, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query: needs bfloat16 or float16, got {query.dtype}"
    for name, x in (("query", query), ("value", value)):
        if x.shape[-1] > WIDTHS[-1]:
            return f"{name}: head width is at most {WIDTHS[-1]}, got {x.shape[-1]}"
    if block_sizes is not None and not isinstance(block_sizes, MosaicGpuBlockSizes):
        return f"block_sizes: needs MosaicGpuBlockSizes, got {type(block_sizes).__name__}"
    platform, kind = device.target()
    if platform in ("gpu", "cuda") and not any(name in kind for name in HOPPER):
        return f"implementation: needs a Hopper GPU (wgmma), got {kind}"
    return None


def _pad(width: int, *arrays) -> list[jax.Array]:
    return [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) for x in arrays]


def _width(query, value) -> int:
    return next(w for w in WIDTHS if max(query.shape[-1], value.shape[-1]) <= w)


def forward(query, probe, key, value, mask, *, scale, block_sizes):
    """Returns (out, v_mean, lse, t_mean); see `pallas_kernels.tiles.finish`."""
    config = block_sizes or MosaicGpuBlockSizes()
    kernel = functools.partial(_forward.forward, scale=scale, stages=config.forward_stages)
    operands = _pad(_width(query, value), query, probe, key, value)
    out, v_mean, lse, t_mean = device.run(kernel, *operands, mask)
    return out[..., : value.shape[-1]], v_mean[..., : value.shape[-1]], lse, t_mean


def backward(query, probe, key, value, mask, out, v_mean, lse, t_mean, dout, *, scale, block_sizes):
    """Returns (dquery, dprobe, dkey, dvalue)."""
    config = block_sizes or MosaicGpuBlockSizes()
    stages = dict(row_stages=config.row_stages, column_stages=config.column_stages)
    kernel = functools.partial(_backward.backward, scale=scale, **stages)
    width = _width(query, value)
    operands = _pad(width, query, probe, key, value)
    gradients = device.run(kernel, *operands, mask, *_pad(width, out, v_mean), lse, t_mean, *_pad(width, dout))
    return tuple(g[..., : x.shape[-1]] for g, x in zip(gradients, (query, probe, key, value), strict=True))
