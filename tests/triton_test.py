"""The Pallas kernels lowered to Triton: numerics in the interpreter, and the lowering itself."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import blocks, triton
from pallas_kernels.block_sizes import TritonBlockSizes, TritonPass
from parallax_jax import compare, parallax_attention
from parallax_jax.workloads import BY_NAME
from tests.conformance import Conformance

SMALL = TritonBlockSizes(TritonPass(32, 16, 4, 2), TritonPass(16, 32, 4, 2), TritonPass(32, 16, 4, 2))
H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"))


class TestTriton(Conformance):
    implementation = "triton"
    half_workloads = ("mqa", "window_1", "packed")

    @pytest.mark.parametrize("name", ["window_77", "scattered", "more_queries", "ragged_full"])
    def test_small_blocks(self, name):
        found = compare.errors("triton", BY_NAME[name], jnp.float32, block_sizes=SMALL)
        assert max(found.values()) <= self.bound()


def lower(function, *operands) -> str:
    """Lowers for an H100 that is not there; returns the module's text."""
    with jax.sharding.use_abstract_mesh(H100), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def grads(**options):
    def loss(*operands):
        return jnp.sum(parallax_attention(*operands, **options).astype(jnp.float32))

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))


def abstract(workload, dtype):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in workload.shapes]


KERNELS = ["parallax_forward", "parallax_backward_rows", "parallax_backward_columns"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "name", ["tiles", "gqa_wide_head", "head_256", "window_77", "packed", "ragged_full", "offset_early", "one_query"]
)
def test_lowers_for_cuda(name, dtype):
    workload = BY_NAME[name]
    text = lower(grads(implementation="triton", **workload.options()), *abstract(workload, jnp.dtype(dtype)))
    assert [kernel for kernel in KERNELS if re.search(rf'name = "{kernel}"', text)] == KERNELS


def test_none_takes_triton_on_a_gpu_it_names():
    """The default on a GPU that the mesh names, from a machine that has none."""
    workload = BY_NAME["head_256"]  # a head width that the Hopper kernels leave to Triton
    assert "__gpu$xla.gpu.triton" in lower(grads(), *abstract(workload, jnp.bfloat16))


def test_deprecation_is_explained_once(monkeypatch):
    monkeypatch.setattr(triton, "_warned", False)
    query = jnp.ones((1, 16, 1, 16))
    with pytest.warns(FutureWarning, match="mosaic_gpu.*xla") as caught:
        for _ in range(2):
            parallax_attention(query, query, query, query, implementation="triton")
    assert len([w for w in caught if w.category is FutureWarning]) == 1


def bounds(function, *args, **options) -> list[int]:
    return [int(x) for x in function(*(jnp.int32(x) for x in args[:1]), *args[1:], **options)]


@pytest.mark.parametrize("seed", range(30))
def test_bounds_enclose_what_is_visible(seed):
    """Against a dense mask: nothing visible outside [first, last), everything visible inside the unmasked part."""
    rng = np.random.default_rng(seed)
    queries, keys = rng.integers(1, 90, 2)
    block_q, block_k = rng.choice([16, 32], 2)
    offset, length = int(rng.integers(-20, 60)), int(rng.integers(0, keys + 1))
    window = int(rng.integers(1, 100)) if seed % 2 else None
    is_causal = bool(seed % 3)
    common = dict(num_queries=int(queries), offset=offset, is_causal=is_causal, window=window)
    ids = spans_q = spans_k = None
    if seed % 5 == 0:
        keys = queries
        length = min(length, int(keys))
        ids = np.sort(rng.integers(0, 4, queries)) if seed % 2 else rng.integers(0, 3, queries)
        spans_q, spans_k = (
            np.asarray(blocks.segment_spans(jnp.asarray(ids[None], jnp.int32), int(b)))[0] for b in (block_q, block_k)
        )
    row, key = np.indices((queries, keys))
    visible = np.asarray(blocks.visible_tile(row, key, length=length, **common))
    if ids is not None:
        visible &= ids[:, None] == ids
    for function, start_of, other, extent, spans in (
        (blocks.key_bounds, block_q, block_k, queries, spans_q),
        (blocks.row_bounds, block_k, block_q, keys, spans_k),
    ):
        dense = visible if function is blocks.key_bounds else visible.T
        for i, start in enumerate(range(0, extent, start_of)):
            segment = None if spans is None else tuple(int(x) for x in spans[i])
            first, full_first, full_last, last = bounds(
                function, start, int(block_q), int(block_k), length=length, segment=segment, **common
            )
            tile = dense[start : start + start_of]
            outside = np.ones(dense.shape[1], bool)
            outside[first * other : last * other] = False
            assert not tile[:, outside].any()
            assert full_last * other <= dense.shape[1] or full_first == full_last
            assert tile[:, full_first * other : full_last * other].all()
