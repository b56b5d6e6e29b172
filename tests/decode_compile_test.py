"""XLA's own GPU compiler on the decode kernels, for GPUs that are not there: no spill, no shared-memory overflow."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from parallax_jax import parallax_decode
from train.gpus import gpu_devices

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("new", [1, 16], ids=["step", "sixteen"])
@pytest.mark.parametrize("batch", [1, 64], ids=["splits", "one_split"])
@pytest.mark.parametrize("card", ["H100", "RTX 4090"])
def test_kernels_fit(card, batch, new, head_dim, dtype):
    mesh = jax.sharding.Mesh(gpu_devices(1, card), ("x",))
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    rows, cache = (batch, new, 12, head_dim), (2 * batch, 64, 4, head_dim)
    operands = [shape(x, jnp.dtype(dtype)) for x in (rows, rows, cache, cache)]
    step = jax.jit(
        lambda table, *x: parallax_decode(*x, page_table=table, local_window_size=900, implementation="triton")
    )
    with jax.set_mesh(mesh):
        table, lengths = shape((batch, 16), jnp.int32), shape((batch,), jnp.int32)
        lowered = step.trace(table, *operands, lengths).lower(lowering_platforms=("cuda",))
        lowered.compile(compiler_options={"xla_gpu_fail_ptx_compilation_on_register_spilling": True})
