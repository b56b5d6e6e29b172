"""Launches: `jax_triton.triton_call`, or Triton's own interpreter where TRITON_INTERPRET=1 asks for it."""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import triton

from pallas_kernels import blocks, device

INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:
    from pallas_kernels.triton_lang.interpreter import interpret
else:
    # The import blanks TRITON_CACHE_DIR, which would break every other user of Triton in this process.
    _cache = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    os.environ.pop("TRITON_CACHE_DIR", None)
    if _cache is not None:
        os.environ["TRITON_CACHE_DIR"] = _cache
    if not jax_triton.__version__.startswith("0.3."):
        raise ImportError(f"needs jax-triton 0.3, 0.4 fails under jit with JAX 0.12; got {jax_triton.__version__}")

# Compute capability by a part of the device's name, for GPUs that are compiled for but are not there.
CAPABILITIES = {"A100": 80, "RTX 4090": 89, "H100": 90, "H200": 90, "B200": 100}


def mask_arrays(mask: blocks.Mask, spans) -> tuple[jax.Array, ...]:
    """The mask's offset, lengths, segments of rows and of keys, and spans; kernels do not read those that are None."""
    arrays = (mask.offset, mask.lengths, mask.segment_ids, mask.segments_of_keys, spans)
    return tuple(mask.offset if x is None else x for x in arrays)


def launch(kernel, arrays, outputs, *, programs: int, config, **constants):
    """Runs a kernel.

    Args:
      kernel: takes pointers to `arrays` and to the outputs, then `constants`.
      arrays: inputs.
      outputs: tuple of `jax.ShapeDtypeStruct`.
      programs: size of the grid; one axis, since CUDA bounds only the first by 2^31 - 1.
      config: has num_warps and num_stages.
      **constants: known at compile time.

    Returns:
      A tuple of arrays.
    """
    if INTERPRETED:
        run = functools.partial(interpret, kernel, outputs, programs, constants)
        return jax.pure_callback(run, outputs, *arrays)
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_shape=outputs,
        grid=(programs,),
        name=kernel.__name__,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        compute_capability=capability(),
        **constants,
    )


def capability() -> int | None:
    """Compute capability of the GPU that is there or compiled for, 90 for 9.0; None where it is not known."""
    if jax.default_backend() == "gpu":
        return int(jax.devices()[0].compute_capability.replace(".", ""))
    kind = device.target()[1]
    return next((capability for name, capability in CAPABILITIES.items() if name in kind), None)


def batched(run: Callable) -> Callable:
    """run(mask, *arrays) where `jax.vmap` joins its axis with the batch axis that every array and result starts with.

    The mask's offset may be a scalar, (B,) or None.
    """
    call = jax.custom_batching.custom_vmap(run)

    @call.def_vmap
    def rule(size, in_batched, mask, *arrays):
        mask_batched, *batched = in_batched
        rows = arrays[0].shape[int(batched[0])]

        def join(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        offset, offset_batched = mask.offset, mask_batched.offset
        if offset_batched and offset.ndim == 1:
            offset = jnp.repeat(offset, rows)  # a scalar of each mapped call
        elif offset_batched or (offset is not None and offset.ndim == 1):
            offset = join(offset, offset_batched)
        others = jax.tree.map(join, *(dataclasses.replace(x, offset=None) for x in (mask, mask_batched)))
        results = call(dataclasses.replace(others, offset=offset), *map(join, arrays, batched))
        return tuple(x.reshape(size, rows, *x.shape[1:]) for x in results), (True,) * len(results)

    return call


def unavailable() -> str | None:
    """Why kernels cannot be launched where the code being traced will run, or None."""
    platform, kind = device.target()
    if INTERPRETED:
        return None
    if platform != "gpu":
        return "implementation: runs on GPUs; on a CPU in Triton's interpreter, with TRITON_INTERPRET=1"
    if jax.default_backend() != "gpu" and capability() is None:
        return f"implementation: compiles here for {', '.join(CAPABILITIES)} only, got {kind}"
    return None
