"""Hopper's decode kernel without a GPU: numerics in Pallas' interpreter, lowering, and when it is taken."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import blocks
from pallas_kernels.block_sizes import MosaicGpuDecodeBlockSizes, TritonDecodeBlockSizes
from pallas_kernels.mosaic_gpu import decode as kernel
from parallax_jax import parallax_decode
from tests.decode_conformance import HOPPER_CASES, NEEDLE, TOLERANCE, draw, draw_needle, error, expected

Sizes = MosaicGpuDecodeBlockSizes
LAUNCHES = Sizes(64, 2, 2, 1), Sizes(32, 3, 1, 2), Sizes(32, 1, 2, 2), None, Sizes(128, 2, 1, 1)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        *zip(HOPPER_CASES, LAUNCHES, strict=True),
        (HOPPER_CASES[0], Sizes(32, 1, 1, 3)),
        (HOPPER_CASES[1], Sizes(32, 1, 1, 1)),
        (HOPPER_CASES[2], Sizes(128, 1, 1, 1)),
        (next(case for case in HOPPER_CASES if case.page_size == 64), Sizes(128, 1, 1, 1)),  # two pages a tile
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_interpreted(case, sizes):
    operands, lengths, table = draw(case)
    options = dict(local_window_size=case.window, page_table=table, block_sizes=sizes)
    out = parallax_decode(*operands, lengths, implementation="mosaic_gpu", **options)
    assert error(out, expected(case, operands, table)) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (2, 64), (3, 128), (4, 64), (5, 64), (6, 128), (7, 64), (8, 64)])
def test_rows_of_a_head(rows, width):
    """Up to four fill a column of instructions or repeat each other in it, up to eight take two."""
    operands = [
        jax.random.normal(jax.random.key(i), (2, t, n, width), jnp.bfloat16)
        for i, (t, n) in enumerate(((1, 2 * rows), (1, 2 * rows), (40, 2), (40, 2)))
    ]
    decode = functools.partial(parallax_decode, *operands, jnp.asarray([40, 17]))
    out = decode(implementation="mosaic_gpu", block_sizes=Sizes(32, 2, 1, 1))
    exact = parallax_decode(*(x.astype(jnp.float32) for x in operands), jnp.asarray([40, 17]), implementation="xla")
    assert error(out, exact) <= TOLERANCE["bfloat16"]


def test_a_late_key_that_dominates():
    """A centre fixed in the first tile would make an error of 0.3."""
    operands, lengths, table = draw_needle(NEEDLE)
    out = parallax_decode(*operands, lengths, implementation="mosaic_gpu", block_sizes=Sizes(32, 2, 1, 2))
    assert error(out, expected(NEEDLE, operands, table)) <= TOLERANCE[NEEDLE.dtype]


def test_softmax_and_a_chunk_whose_last_tokens_are_padding():
    case = HOPPER_CASES[1]
    (query, probe, key, value), lengths, _ = draw(case, seed=1)
    mask = blocks.Mask(jnp.maximum(lengths - 3, 0), lengths)  # queries from there on: the fourth is padding
    decode = functools.partial(kernel.decode, scale=case.H**-0.5, block_sizes=Sizes(64, 1, 2, 1))
    softmax = decode(query, None, key, value, mask, None)
    without_probe = decode(query, jnp.zeros_like(probe), key, value, mask, None)
    np.testing.assert_allclose(softmax, without_probe, atol=2e-3)
    whole = parallax_decode(query[:1, :3], probe[:1, :3], key[:1], value[:1], lengths[:1], implementation="xla")
    assert error(decode(query, probe, key, value, mask, None)[:1, :3], whole) <= TOLERANCE[case.dtype]


def operands(batch, num_keys, heads=8, kv_heads=8, width=128, dtype=jnp.bfloat16, new=1, page_size=None):
    """Shapes of query, probe, key, value, lengths and page table."""
    rows, cache, pages = (batch, new, heads, width), (batch, num_keys, kv_heads, width), None
    if page_size is not None:
        cache = (batch * num_keys // page_size, page_size, kv_heads, width)
        pages = jax.ShapeDtypeStruct((batch, num_keys // page_size), jnp.int32)
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (rows, rows, cache, cache)]
    return *shapes, jax.ShapeDtypeStruct((batch,), jnp.int32), pages


def lowered(*shapes, device="NVIDIA H100 80GB HBM3", **options) -> str:
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device, num_cores=None, platform="gpu"))
    call = lambda *x: parallax_decode(*x[:5], page_table=x[5], **options)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("call", "is_taken"),
    [
        (dict(batch=1, num_keys=512), True),
        (dict(batch=1, num_keys=16384), True),
        (dict(batch=1, num_keys=16384, heads=4, kv_heads=4), False),  # eight programs a head are too few
        (dict(batch=1, num_keys=4096, heads=4, kv_heads=4), True),
        (dict(batch=1, num_keys=4096, heads=2, kv_heads=2), False),
        (dict(batch=1, num_keys=512, heads=32), True),
        (dict(batch=1, num_keys=512, heads=128), False),  # 16 rows
        (dict(batch=32, num_keys=4096), True),
        (dict(batch=32, num_keys=2048, new=3), True),
        (dict(batch=32, num_keys=4096, new=3), True),
        (dict(batch=10, num_keys=4096), True),
        (dict(batch=32, num_keys=32768), True),
        (dict(batch=32, num_keys=32768, width=64), True),
        (dict(batch=4, num_keys=2048), True),
        (dict(batch=4, num_keys=1024, page_size=64), True),
        (dict(batch=64, num_keys=512, width=64), True),
        (dict(batch=16, num_keys=128, width=64), True),
        (dict(batch=4, num_keys=128, width=64), True),
        (dict(batch=1, num_keys=512, width=96), False),
        (dict(batch=1, num_keys=512, dtype=jnp.float32), False),
        (dict(batch=32, num_keys=4096, page_size=64), True),
        (dict(batch=32, num_keys=4096, page_size=16), True),
        (dict(batch=32, num_keys=4080, page_size=48), False),
        (dict(batch=4, num_keys=32768), False),
        (dict(batch=1, num_keys=16384, page_size=64), True),
        (dict(batch=1, num_keys=16384, page_size=32), False),
        (dict(batch=2, num_keys=16384, page_size=64), False),
        (dict(batch=1, num_keys=8192, page_size=64), True),
        (dict(batch=32, num_keys=4096, page_size=8), False),
    ],
    ids=str,
)
def test_when_it_is_taken(call, is_taken):
    text = lowered(*operands(**call))
    assert (text.count("custom_call @mosaic_gpu"), "triton" in text) == (int(is_taken), not is_taken)
    assert "mosaic_gpu" not in lowered(*operands(**call), device="NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize(
    ("call", "sizes", "message"),
    [
        (dict(dtype=jnp.float32), None, "query: needs bfloat16 or float16, got float32"),
        (dict(heads=72), None, "query: needs at most 8 rows for each kv head, got 9"),
        (dict(width=96), None, r"key_cache: needs keys and values both \(64, 128\) wide, got 96 and 96"),
        (dict(num_keys=252), None, "key_cache: needs room for a multiple of 8 keys, got 252"),
        (dict(num_keys=240, page_size=24), None, "page_table: needs pages of a multiple or a part of 32 keys, got 24"),
        (dict(num_keys=512), Sizes(128, 2, 2, 2), "block_sizes: tiles under way and states take .* bytes"),
        (dict(), Sizes(64, 3, 2, 1), "block_sizes: 6 warpgroups share the cache's 4 tiles"),
        (dict(), TritonDecodeBlockSizes(64, 1, 2, 2), "block_sizes: needs MosaicGpuDecodeBlockSizes, got Triton"),
    ],
    ids=str,
)
def test_what_it_does_not_take(call, sizes, message):
    shapes = operands(**dict(batch=1, num_keys=256) | call)
    with pytest.raises(NotImplementedError, match=message):
        lowered(*shapes, implementation="mosaic_gpu", block_sizes=sizes)
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        lowered(*operands(1, 256), implementation="mosaic_gpu", device="NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize("sizes", [(48, 1, 1, 1), (64, 9, 1, 1), (64, 1, 3, 1), (64, 1, 1, 0)])
def test_sizes_must_be_such_as_the_kernel_has(sizes):
    with pytest.raises(ValueError, match=r"got .*, allowed are"):
        Sizes(*sizes)


def launch(batch, num_keys, kv_heads=1, **call):
    query, _, key, value, _, pages = operands(batch, num_keys, heads=kv_heads, kv_heads=kv_heads, **call)
    return Sizes.heuristic(query, key, value, blocks.Mask(None, None), pages)


def test_launches():
    """The kernel has each for 8 rows a head: tiles for all, room in shared memory. Clusters have places to go to."""
    many = 200, 260, 300, 500, 640, 1024, 3000
    for programs, num_keys, width in itertools.product(
        (*range(1, 140), *many), (8, 40, 256, 640, 704, 2048, 5000), (64, 128)
    ):
        sizes = launch(programs, num_keys, width=width)
        query, probe, key, value, _, _ = operands(programs, num_keys, heads=8, kv_heads=1, width=width)
        mask = blocks.Mask(None, None)
        assert kernel.unsupported(query, probe, key, value, mask, None, scale=1.0, block_sizes=sizes) is None
        tile = 4 * width * sizes.block_k
        is_small = sizes.num_groups * sizes.num_stages * tile <= 64 << 10  # several programs run on a core
        assert sizes.num_splits == 1 or programs * sizes.num_splits <= 132 or is_small
        assert sizes.num_splits <= 4 or programs * sizes.num_splits <= 99 or is_small


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        (dict(batch=1, num_keys=128), Sizes(32, 4, 1, 1)),
        (dict(batch=1, num_keys=1024), Sizes(128, 8, 1, 1)),
        (dict(batch=1, num_keys=2048), Sizes(128, 8, 1, 2)),
        (dict(batch=1, num_keys=4096), Sizes(128, 8, 2, 1)),
        (dict(batch=1, num_keys=32768, width=64), Sizes(128, 8, 2, 2)),
        (dict(batch=2, num_keys=16384), Sizes(128, 8, 1, 1)),
        (dict(batch=2, num_keys=16384, width=64), Sizes(128, 8, 1, 2)),
        (dict(batch=4, num_keys=2048), Sizes(128, 3, 2, 1)),
        (dict(batch=4, num_keys=4096), Sizes(128, 7, 1, 1)),  # several programs a core
        (dict(batch=4, num_keys=8192), Sizes(128, 4, 1, 1)),
        (dict(batch=3, num_keys=8192), Sizes(128, 6, 1, 1)),
        (dict(batch=5, num_keys=4096), Sizes(128, 4, 1, 1)),
        (dict(batch=4, num_keys=16384, width=64), Sizes(128, 8, 1, 1)),
        (dict(batch=8, num_keys=1024, width=64), Sizes(128, 2, 2, 1)),
        (dict(batch=8, num_keys=4096), Sizes(128, 2, 1, 2)),
        (dict(batch=16, num_keys=256), Sizes(128, 1, 2, 1)),
        (dict(batch=16, num_keys=4096), Sizes(64, 1, 1, 2)),
        (dict(batch=64, num_keys=2040), Sizes(128, 1, 1, 1)),
        (dict(batch=48, num_keys=2048), Sizes(64, 1, 1, 1)),  # all at once, three on a core
        (dict(batch=50, num_keys=2048), Sizes(128, 2, 1, 1)),
        (dict(batch=64, num_keys=256), Sizes(128, 1, 1, 1)),
        (dict(batch=48, num_keys=4096, width=64), Sizes(128, 1, 1, 1)),
        (dict(batch=64, num_keys=1024, width=64), Sizes(128, 1, 1, 1)),
        (dict(batch=64, num_keys=4096, width=64), Sizes(64, 1, 1, 1)),
        (dict(batch=1, num_keys=4096, page_size=64), Sizes(128, 8, 2, 1)),
        (dict(batch=1, num_keys=3840, page_size=192), Sizes(64, 8, 2, 2)),
    ],
    ids=str,
)
def test_chosen_launches(call, sizes):
    assert launch(**dict(kv_heads=8) | call) == sizes


@pytest.mark.parametrize(("num_keys", "block_k", "stages"), [(8192, 128, 3), (16384, 64, 4)])
def test_chosen_launch_of_triton(num_keys, block_k, stages):
    """Splits of heads of 64, of which the cache holds the shorter."""
    query, _, key, value, *_ = operands(2, num_keys, width=64)
    sizes = TritonDecodeBlockSizes.heuristic(query, key, value, blocks.Mask(None, None), None)
    assert sizes == TritonDecodeBlockSizes(block_k, 16, 2, stages)
