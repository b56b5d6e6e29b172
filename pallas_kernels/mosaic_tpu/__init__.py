"""Parallax attention for TPUs in Pallas Mosaic TPU."""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import device
from pallas_kernels.block_sizes import MosaicTpuBlockSizes, mosaic_tpu_block_sizes, vmem_limit
from pallas_kernels.mosaic_tpu import backward as _backward
from pallas_kernels.mosaic_tpu import common
from pallas_kernels.mosaic_tpu import forward as _forward

NO_FLOAT16 = "query: the TPU compiler takes no float16; use bfloat16 or float32"


def unsupported(query, probe, key, value, mask, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if query.dtype == jnp.float64:
        return "query: float64 runs in 'reference' and 'xla' only"
    if query.dtype == jnp.float16 and device.target()[0] == "tpu":
        return NO_FLOAT16
    if block_sizes is not None and not isinstance(block_sizes, MosaicTpuBlockSizes):
        return f"block_sizes: needs MosaicTpuBlockSizes, got {type(block_sizes).__name__}"
    sizes = _sizes(query, value, block_sizes)
    groups = 1 if common.alike(mask) else query.shape[0]
    for launch in (sizes.forward, sizes.rows, sizes.columns):
        row_blocks, key_blocks = pl.cdiv(query.shape[1], launch.block_q), pl.cdiv(key.shape[1], launch.block_k)
        needed = groups * max(
            common.capacity(row_blocks, key_blocks, launch.block_q, launch.block_k, mask),
            common.capacity(key_blocks, row_blocks, launch.block_k, launch.block_q, mask),
        )
        if needed > common.MAX_STEPS or max(row_blocks, key_blocks) > common.MAX_BLOCKS:
            return (
                f"query: T = {query.shape[1]} and S = {key.shape[1]} take {needed} tiles of {launch.block_q} by "
                f"{launch.block_k}, and the scalar memory lists at most {common.MAX_STEPS}"
            )
    return None


def _sizes(query, value, block_sizes) -> MosaicTpuBlockSizes:
    if block_sizes is not None:
        return block_sizes
    return mosaic_tpu_block_sizes(device.target()[1], 8 * query.dtype.itemsize, query.shape[-1], value.shape[-1])


def forward(query, probe, key, value, mask, *, scale, block_sizes):
    """Returns (out, v_mean, lse, t_mean); see `pallas_kernels.tiles.finish`."""
    config, vmem = _sizes(query, value, block_sizes).forward, vmem_limit(device.target()[1])
    kernel = functools.partial(_forward.forward, scale=scale, config=config, vmem=vmem)
    return device.run(kernel, query, probe, key, value, mask)


def backward(query, probe, key, value, mask, out, v_mean, lse, t_mean, dout, *, scale, block_sizes):
    """Returns (dquery, dprobe, dkey, dvalue)."""
    sizes, vmem = _sizes(query, value, block_sizes), vmem_limit(device.target()[1])
    kernel = functools.partial(_backward.backward, scale=scale, block_sizes=sizes, vmem=vmem)
    return device.run(kernel, query, probe, key, value, mask, out, v_mean, lse, t_mean, dout)
