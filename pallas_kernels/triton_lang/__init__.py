"""Parallax attention in the Triton language, launched by jax-triton."""

import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.block_sizes import TritonLangBlockSizes, triton_lang_block_sizes
from pallas_kernels.triton_lang import backward as _backward
from pallas_kernels.triton_lang import forward as _forward
from pallas_kernels.triton_lang import launch


def unsupported(query, probe, key, value, mask, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    return unsupported_anywhere(query, block_sizes, TritonLangBlockSizes)


def unsupported_anywhere(query, block_sizes, needed: type) -> str | None:
    """Why no kernel of this backend, with block sizes of type `needed`, can run the call, or None."""
    if query.dtype == jnp.float64:
        return "query: float64 runs in 'reference' and 'xla' only"
    if block_sizes is not None and not isinstance(block_sizes, needed):
        return f"block_sizes: needs {needed.__name__}, got {type(block_sizes).__name__}"
    return launch.unavailable()


def _sizes(query, value, block_sizes) -> TritonLangBlockSizes:
    if block_sizes is not None:
        return block_sizes
    bits = 8 * query.dtype.itemsize
    return triton_lang_block_sizes(device.target()[1], bits, query.shape[-1], value.shape[-1])


def forward(query, probe, key, value, mask, *, scale, block_sizes):
    """Returns (out, v_mean, lse, t_mean); see `pallas_kernels.tiles.finish`."""
    config = _sizes(query, value, block_sizes).forward

    def run(mask, *operands):
        return _forward.forward(*operands, mask, scale=scale, config=config)

    return launch.batched(run)(mask, query, probe, key, value)


def backward(query, probe, key, value, mask, out, v_mean, lse, t_mean, dout, *, scale, block_sizes):
    """Returns (dquery, dprobe, dkey, dvalue)."""
    sizes = _sizes(query, value, block_sizes)

    def run(mask, query, probe, key, value, *residuals):
        return _backward.backward(query, probe, key, value, mask, *residuals, scale=scale, block_sizes=sizes)

    return launch.batched(run)(mask, query, probe, key, value, out, v_mean, lse, t_mean, dout)
