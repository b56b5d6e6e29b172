"""The TPU kernels: numerics in Pallas' interpreters, plans against dense masks, and the lowering for a TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import blocks, device
from pallas_kernels.block_sizes import MosaicTpuBlockSizes, MosaicTpuDecodeBlockSizes, MosaicTpuPass, XlaBlockSizes
from pallas_kernels.mosaic_tpu import common
from parallax_jax import compare, parallax_attention, parallax_decode
from parallax_jax.workloads import BY_NAME
from tests.conformance import Conformance
from tests.decode_conformance import CASES, TOLERANCE, DecodeConformance, draw, error, expected

SMALL = MosaicTpuBlockSizes(*(MosaicTpuPass(128, 128),) * 3)
KERNELS = ["parallax_forward", "parallax_backward_rows", "parallax_backward_columns"]


class TestMosaicTpu(Conformance):
    """With the smallest blocks, so that the workloads have several."""

    implementation = "mosaic_tpu"
    half_workloads = ("packed",)

    def attention(self, *operands, **options):
        return super().attention(*operands, block_sizes=SMALL, **options)

    def check(self, workload, dtype):
        allowed = compare.bounds(self.implementation, dtype)
        found = compare.errors(self.implementation, workload, dtype, block_sizes=SMALL)
        for i, (name, x) in enumerate(found.items()):
            assert x <= allowed[min(i, 1)], f"{name}: {x:.2e} > {allowed[min(i, 1)]:.0e}"


class TestMosaicTpuDecode(DecodeConformance):
    implementation = "mosaic_tpu"
    block_sizes = tuple(MosaicTpuDecodeBlockSizes(block_k) for block_k in (16, 32, 128))


@pytest.fixture
def strict_interpreter(capfd):
    """The interpreter that simulates the memories: two cores, NaN in fresh memory, and no races."""
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True, num_cores_or_threads=2, random_seed=7)
    with pltpu.force_tpu_interpret_mode(params):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["packed_ragged", "gqa_wide_head"])
def test_fresh_memory_and_races(name, strict_interpreter):
    found = compare.errors("mosaic_tpu", BY_NAME[name], jnp.float32, block_sizes=SMALL)
    assert max(found.values()) <= compare.bounds("mosaic_tpu", "float32")[1]


def test_fresh_memory_and_races_of_decode(strict_interpreter, monkeypatch):
    """On a device of two cores, each with half of the sequences."""
    monkeypatch.setattr(device, "target", lambda: ("tpu", "TPU v5"))
    case = next(c for c in CASES if c.name == "one_key_mqa_width_60_100")
    operands, lengths, table = draw(case)
    out = jax.jit(functools.partial(parallax_decode, implementation="mosaic_tpu"))(*operands, lengths)
    assert error(out, expected(case, operands, table)) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("seed", range(12))
def test_plan_visits_what_is_visible_once(seed):
    """Against a dense mask, over rows and over columns: every visible pair once, masked unless all of it is visible."""
    rng = np.random.default_rng(seed)
    queries, keys = (int(x) for x in rng.integers(1, 90, 2))
    block_q, block_k = (int(x) for x in rng.choice([8, 16, 24], 2))
    segments = seed % 4 == 0
    keys = queries if segments else keys
    batch = 2
    mask = blocks.Mask(
        jnp.int32(rng.integers(-20, 60)),
        jnp.asarray(rng.integers(0, keys + 1, batch), jnp.int32) if seed % 3 == 0 else None,
        jnp.asarray(np.sort(rng.integers(0, 4, (batch, queries))), jnp.int32) if segments else None,
        is_causal=bool(seed % 5),
        window=int(rng.integers(1, 40)) if seed % 2 else None,
    )
    row, key = np.indices((queries, keys))

    @functools.partial(jax.jit, static_argnums=1)
    def read_plan(mask, by_rows):
        sight = common.limits(mask, batch, queries, keys)
        plan = common.attention_plan(mask, sight, queries, keys, block_q, block_k, by_rows)
        steps = [plan.read(plan.codes, b, jnp.arange(plan.capacity)) for b in range(batch)]
        return plan.size, steps, jnp.broadcast_to(sight.length, (batch,))

    for by_rows in (True, False):
        size, steps, lengths = jax.tree.map(np.asarray, read_plan(mask, by_rows))
        for b in range(batch):
            ids = None if mask.segment_ids is None else np.asarray(mask.segment_ids[b])
            visible = np.asarray(
                blocks.visible_tile(
                    row,
                    key,
                    num_queries=None,
                    offset=int(mask.offset),
                    length=lengths[b],
                    is_causal=mask.is_causal,
                    window=mask.window,
                    row_segments=None if ids is None else ids[:, None],
                    key_segments=None if ids is None else ids[None, :],
                )
            )
            visits = np.zeros(visible.shape, int)
            firsts, lasts, place = [], [], None
            assert size <= len(steps[b].outer)
            for step in map(common.Step, *(x[:size].tolist() for x in steps[b])):
                if step.first:
                    firsts.append(step.outer)
                if not (step.work or step.first or step.last):
                    assert (step.outer, step.inner) == place, "a step past the end stays where it is"
                place = (step.outer, step.inner)
                if step.last:
                    lasts.append(step.outer)
                if step.work:
                    i, j = place if by_rows else place[::-1]
                    tile = np.s_[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
                    assert visible[tile].size
                    visits[tile] += 1
                    assert step.masked or (visible[tile].all() and (j + 1) * block_k <= keys)
            assert (visits[visible] == 1).all() and visits.max(initial=0) <= 1
            outer = -(-queries // block_q) if by_rows else -(-keys // block_k)
            assert firsts == lasts == list(range(outer))


def lower(function, *operands, kind="TPU v5 lite") -> str:
    """Lowers for a TPU that is not there; returns the module's text."""
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(kind, num_cores=None, platform="tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("tpu",)).as_text()


def lower_gradients(workload, dtype, **options) -> list[str]:
    """Names of the kernels in the lowered loss and gradients."""

    def loss(*operands):
        return jnp.sum(parallax_attention(*operands, **workload.options(), **options).astype(jnp.float32))

    shapes = (jax.ShapeDtypeStruct(shape, dtype) for shape in workload.shapes)
    text = lower(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), *shapes)
    return [name for name in KERNELS if re.search(rf'kernel_name = "{name}"', text)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["gqa_wide_head", "head_256", "window_77", "packed_ragged", "full", "one_query"])
def test_lowers_for_tpu(name, dtype):
    assert lower_gradients(BY_NAME[name], jnp.dtype(dtype), implementation="mosaic_tpu") == KERNELS


def test_none_takes_the_kernels_on_a_tpu():
    assert lower_gradients(BY_NAME["tiles"], jnp.bfloat16) == KERNELS
    assert lower_gradients(BY_NAME["tiles"], jnp.float16) == [], "float16 is left to XLA"


@pytest.mark.parametrize(("T", "page_size", "kernel"), [(1, None, "decode"), (4, 48, "decode"), (33, 16, "forward")])
def test_decode_lowers_for_tpu(T, page_size, kernel):
    shape = jax.ShapeDtypeStruct
    rows = shape((4, T, 12, 100), jnp.bfloat16)
    cache = shape((4, 1000, 4, 100) if page_size is None else (99, page_size, 4, 100), jnp.bfloat16)
    table = None if page_size is None else shape((4, 20), jnp.int32)
    call = lambda table, *x: parallax_decode(*x, page_table=table, local_window_size=300)
    text = lower(call, table, rows, rows, cache, cache, shape((4,), jnp.int32))
    assert re.findall(r'kernel_name = "parallax_(\w+)"', text) == [kernel]


def test_unsupported_calls_say_why():
    query = jnp.ones((1, 3, 2, 8))
    with pytest.raises(NotImplementedError, match="needs MosaicTpuBlockSizes, got XlaBlockSizes"):
        parallax_attention(query, query, query, query, implementation="mosaic_tpu", block_sizes=XlaBlockSizes())
    long = jax.ShapeDtypeStruct((1, 1 << 16, 1, 8), jnp.float32)
    call = functools.partial(parallax_attention, implementation="mosaic_tpu", block_sizes=SMALL)
    with pytest.raises(NotImplementedError, match="take 262144 tiles of 128 by 128"):
        jax.eval_shape(call, *[long] * 4)
    jax.eval_shape(functools.partial(call, local_window_size=1000), *[long] * 4)
    cache = jnp.ones((4, 9, 1, 8))
    with pytest.raises(NotImplementedError, match="page size times kv heads must be a multiple of 16, got 9"):
        parallax_decode(
            query[:, :1], query[:, :1], cache, cache, jnp.ones(1, jnp.int32),
            page_table=jnp.zeros((1, 2), jnp.int32), implementation="mosaic_tpu",
        )  # fmt: skip


@pytest.mark.parametrize("size", [0, 64, 200])
def test_blocks_are_multiples_of_the_lanes(size):
    with pytest.raises(ValueError, match=f"block_k: must be a multiple of 128, got {size}"):
        MosaicTpuPass(128, size)
