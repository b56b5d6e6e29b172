"""The Hopper kernels: lowering without a GPU, and numerics in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import blocks, mosaic_gpu
from pallas_kernels.block_sizes import MosaicGpuBlockSizes, XlaBlockSizes
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.backward import order as backward_order
from pallas_kernels.mosaic_gpu.common import Order
from pallas_kernels.mosaic_gpu.forward import order as forward_order
from parallax_jax import attention, compare
from parallax_jax.workloads import BY_NAME, Workload

KERNELS = ["parallax_forward", "parallax_backward_stats", "parallax_backward"]


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
        (Workload("both_directions", 1, 130, 8, 64, kv_heads=2), "bfloat16"),
        (Workload("full", 1, 130, 1, 64, keys=140, is_causal=False), "float16"),
        (
            Workload("masks", 1, 136, 2, 40, kv_heads=1, value_dim=50, segments=2, window=50, ragged=True, scale=-0.2),
            "float16",
        ),
    ],
    ids=lambda x: x.name if isinstance(x, Workload) else x,
)
def test_interpreted(workload, dtype, monkeypatch):
    monkeypatch.setattr(common, "MULTIPROCESSORS", 2)  # several chunks of heads
    found = list(compare.errors("mosaic_gpu", workload, jnp.dtype(dtype)).values())
    allowed = compare.bounds("mosaic_gpu", jnp.dtype(dtype))
    assert found[0] <= allowed[0]
    assert max(found[1:]) <= allowed[1]


@pytest.mark.parametrize(
    ("name", "dtype"), [("gqa_wide_head", "bfloat16"), ("packed_full", "float16"), ("ragged_window", "bfloat16")]
)
def test_lowers_for_cuda(name, dtype):
    workload = BY_NAME[name]
    operands = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in workload.shapes]

    def loss(*operands):
        out = attention.parallax_attention(*operands, implementation="mosaic_gpu", **workload.options())
        return jnp.sum(out.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(gpu("NVIDIA H100 80GB HBM3")):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(*operands)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == len(KERNELS)
    assert all(f"{kernel}_mosaic_gpu" in text for kernel in KERNELS)


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


@pytest.mark.parametrize("num_queries", [60, 700])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("masked", ["", "lengths", "window", "packed", "scattered", "window lengths packed"])
def test_visits(request, num_queries, is_causal, masked):
    """The visitors of a row block are neighbours, one is first and one last, and none is left out."""
    rng = np.random.default_rng(list(request.node.nodeid.encode()))
    num_keys, offset, segments, lengths = 500, int(rng.integers(-100, 300)), (None, None), None
    if "packed" in masked or "scattered" in masked:
        segments = [rng.integers(0, 4, (2, n)) for n in (num_queries, num_keys)]
        segments = [jnp.asarray(np.sort(x) if "packed" in masked else x, jnp.int32) for x in segments]
    if "lengths" in masked:
        lengths = jnp.asarray([0, rng.integers(1, num_keys)], jnp.int32)
    window = 90 if "window" in masked else None
    mask = blocks.Mask(jnp.int32(offset), lengths, segments[0], is_causal, window, segments[1])
    masks = common.Masks(mask, num_queries, num_keys)
    visits = masks.visits()
    visible = blocks.visible_tile(
        jnp.arange(num_queries)[:, None],
        jnp.arange(num_keys),
        num_queries=None,
        offset=offset,
        length=num_keys if lengths is None else lengths[:, None, None],
        is_causal=is_causal,
        window=window,
        row_segments=None if segments[0] is None else segments[0][:, :, None],
        key_segments=None if segments[1] is None else segments[1][:, None],
    )
    key_blocks, row_blocks = range(-(-num_keys // 128)), range(masks.num_row_blocks)
    for batch, seen in enumerate(np.broadcast_to(visible, (2, num_queries, num_keys))):
        of = [jax.tree.map(int, masks.visit(visits, masks.arrays, batch, jnp.int32(j))) for j in key_blocks]
        for i in row_blocks:
            visitors = [j for j in key_blocks if of[j].first <= i < of[j].last]
            assert visitors == list(range(visitors[0], visitors[-1] + 1))
            assert masks.first_visitor(visits, batch, i) == visitors[0]
            assert [j for j in key_blocks if of[j].first <= i < of[j].done] == visitors[-1:]
            tiles = [seen[i * 64 : (i + 1) * 64, j * 128 : (j + 1) * 128] for j in key_blocks]
            assert all(j in visitors for j in key_blocks if tiles[j].any())
            full = [j for j in key_blocks if of[j].full_first <= i < of[j].full_last]
            assert all(j in visitors and tiles[j].all() and tiles[j].shape[1] == 128 for j in full)


@pytest.mark.parametrize(
    "order",
    [Order(7, 5, 3), Order(7, 5, 9), Order(11, 1, 2, last=4), Order(3, 4, 1, last=5), Order(9, 6, 2, alternate=True)],
    ids=str,
)
def test_programs_start_after_those_for_which_they_wait(order):
    """Each once, those of a head in the order in which they add to its sums, and all of a head in one direction."""
    items = jnp.arange(order.num_heads * order.num_blocks)
    head, block, other_way = (np.asarray(x) for x in jax.vmap(lambda i: jax.tree.map(jnp.asarray, order.at(i)))(items))
    for i in range(order.num_heads):
        np.testing.assert_array_equal(block[head == i], np.arange(order.num_blocks))
        assert len(set(other_way[head == i])) == 1
    assert (len(set(other_way)) == 2) == order.alternate


@pytest.mark.parametrize(
    ("kv_heads", "length", "group", "options", "forward", "backward"),
    [
        (16, 4096, 1, {}, dict(chunk=8), dict(chunk=16)),
        (64, 4096, 2, {}, dict(chunk=8), dict(chunk=2, last=4)),
        (16, 4096, 4, {}, dict(chunk=8), dict(chunk=4, alternate=True)),
        (16, 3072, 4, {}, dict(chunk=12), dict(chunk=2, last=5)),
        (16, 6144, 4, {}, dict(chunk=4), dict(chunk=8)),
        (16, 65536, 3, {}, dict(chunk=3), dict(chunk=8)),
        (16, 16384, 1, dict(window=1024), dict(chunk=1), dict(chunk=1)),
        (16, 4096, 4, dict(is_causal=False), dict(chunk=8), dict(chunk=8)),
    ],
)
def test_order(kv_heads, length, group, options, forward, backward):
    masks = common.Masks(blocks.Mask(jnp.int32(0), **options), length, length)
    blocks_of = length // 128
    assert forward_order(kv_heads * group, blocks_of, group, masks) == Order(kv_heads * group, blocks_of, **forward)
    assert backward_order(kv_heads, blocks_of, group, length, 128, masks) == Order(kv_heads, blocks_of, **backward)


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
    with pytest.raises(ValueError, match="backward_stages: needs at least 2, got 1"):
        MosaicGpuBlockSizes(backward_stages=1)


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
