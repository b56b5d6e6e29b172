"""The Hopper kernels: lowering without a GPU, and numerics in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import blocks, mosaic_gpu
from pallas_kernels.block_sizes import MosaicGpuBlockSizes, XlaBlockSizes
from pallas_kernels.mosaic_gpu import common
from parallax_jax import attention, compare
from parallax_jax.workloads import BY_NAME, Workload

ONE_PASS = ["parallax_forward", "parallax_backward_stats", "parallax_backward"]
TWO_PASSES = ["parallax_forward", "parallax_backward_rows", "parallax_backward_columns"]


def gpu(kind: str) -> AbstractMesh:
    return AbstractMesh((), (), abstract_device=AbstractDevice(kind, num_cores=None, platform="gpu"))


# Each takes about 10 seconds in the interpreter, so a few calls cover what they can: heads that share keys, rows that
# fill no tile, rows that see nothing, a window over packed ragged rows, widths that need padding, a negative scale;
# programs that add to the same rows, of which each rounds some (under a causal mask) or the last all.
@pytest.mark.parametrize(
    ("workload", "dtype"),
    [
        (Workload("shared_keys", 1, 70, 2, 64, keys=40, kv_heads=1, query_offset=-5), "bfloat16"),
        (Workload("wide", 1, 200, 1, 128, keys=300, query_offset=60), "bfloat16"),
        (Workload("full", 1, 130, 1, 64, keys=140, is_causal=False), "float16"),
        (
            Workload("masks", 1, 136, 2, 40, kv_heads=1, value_dim=50, segments=2, window=50, ragged=True, scale=-0.2),
            "float16",
        ),
    ],
    ids=lambda x: x.name if isinstance(x, Workload) else x,
)
def test_interpreted(workload, dtype):
    found = list(compare.errors("mosaic_gpu", workload, jnp.dtype(dtype)).values())
    allowed = compare.bounds("mosaic_gpu", jnp.dtype(dtype))
    assert found[0] <= allowed[0]
    assert max(found[1:]) <= allowed[1]


@pytest.mark.parametrize(
    ("name", "dtype", "kernels"),
    [
        ("gqa_wide_head", "bfloat16", ONE_PASS),
        ("packed_full", "float16", TWO_PASSES),
        ("ragged_window", "bfloat16", TWO_PASSES),
    ],
)
def test_lowers_for_cuda(name, dtype, kernels):
    workload = BY_NAME[name]
    operands = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in workload.shapes]

    def loss(*operands):
        out = attention.parallax_attention(*operands, implementation="mosaic_gpu", **workload.options())
        return jnp.sum(out.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(gpu("NVIDIA H100 80GB HBM3")):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(*operands)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == len(kernels)
    assert all(f"{kernel}_mosaic_gpu" in text for kernel in kernels)


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (blocks.Mask(jnp.int32(4)), [11]),
        (blocks.Mask(jnp.int32(4), lengths=jnp.asarray([3, 20], jnp.int32)), [3, 11]),
        (blocks.Mask(jnp.int32(4), is_causal=False), [20]),
        (blocks.Mask(jnp.int32(13), end_aligned=True), [20]),
    ],
)
def test_keys_that_no_query_sees_are_zero(mask, seen):
    """Whatever they hold: a weight of 0 times NaN would be NaN."""
    key = jnp.full((2, 20, 1, 2), jnp.nan)
    (hidden,) = common.Masks(mask, num_queries=7, num_keys=20).hide_padding(key)
    expected = np.where(np.arange(20) < np.reshape(seen, (-1, 1)), np.nan, 0.0)[..., None, None]
    np.testing.assert_array_equal(hidden, np.broadcast_to(expected, key.shape))


def test_ring_must_fit_shared_memory():
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in BY_NAME["tiles"].shapes]
    attend = lambda *x: attention.parallax_attention(
        *x, implementation="mosaic_gpu", block_sizes=MosaicGpuBlockSizes(forward_stages=6)
    )
    with (
        jax.sharding.use_abstract_mesh(gpu("NVIDIA H100 80GB HBM3")),
        pytest.raises(ValueError, match="exceeds available shared memory"),
    ):
        jax.jit(attend).trace(*operands).lower(lowering_platforms=("cuda",))


def test_ring_needs_two_stages():
    with pytest.raises(ValueError, match="row_stages: needs at least 2, got 1"):
        MosaicGpuBlockSizes(row_stages=1)


@pytest.mark.parametrize(
    ("dtype", "width", "value_width", "block_sizes", "device", "reason"),
    [
        ("float32", 64, 64, None, "NVIDIA H100 80GB HBM3", "query: needs bfloat16 or float16, got float32"),
        ("bfloat16", 256, 64, None, "NVIDIA H200", "query: head width is at most 128, got 256"),
        ("bfloat16", 64, 200, None, "NVIDIA H200", "value: head width is at most 128, got 200"),
        ("bfloat16", 64, 64, XlaBlockSizes(), "NVIDIA H200", "block_sizes: needs MosaicGpuBlockSizes"),
        ("bfloat16", 64, 64, None, "NVIDIA A100-SXM4-80GB", "needs a Hopper GPU"),
        ("bfloat16", 128, 128, MosaicGpuBlockSizes(), "NVIDIA H100 PCIe", None),
        ("float16", 100, 60, None, "NVIDIA GH200 480GB", None),
    ],
)
def test_unsupported(dtype, width, value_width, block_sizes, device, reason):
    query = jax.ShapeDtypeStruct((1, 8, 2, width), jnp.dtype(dtype))
    value = jax.ShapeDtypeStruct((1, 8, 2, value_width), jnp.dtype(dtype))
    mask = blocks.Mask(jnp.int32(0))
    with jax.sharding.use_abstract_mesh(gpu(device)):
        found = mosaic_gpu.unsupported(query, query, query, value, mask, scale=0.1, block_sizes=block_sizes)
    assert found is None if reason is None else reason in found
