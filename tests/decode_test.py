"""Every implementation of decode, and the errors."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import tiles
from pallas_kernels.block_sizes import TritonDecodeBlockSizes, XlaBlockSizes, shared_memory_limit
from pallas_kernels.blocks import Mask
from pallas_kernels.triton import decode as triton_decode
from parallax_jax import parallax_decode
from tests.decode_conformance import CASES, TOLERANCE, Case, DecodeConformance, draw, error, expected

pytestmark = pytest.mark.filterwarnings("ignore:implementation 'triton' rests on:FutureWarning")
H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"))


class TestReference(DecodeConformance):
    implementation = "reference"


class TestXla(DecodeConformance):
    implementation = "xla"
    block_sizes = (XlaBlockSizes(block_k=16), XlaBlockSizes(block_k=100))


class TestTriton(DecodeConformance):
    implementation = "triton"
    block_sizes = tuple(  # with 32 splits the merge takes the columns of a row in programs of 16
        TritonDecodeBlockSizes(*sizes, 2, 2, rotate)
        for *sizes, rotate in ((16, 1, False), (32, 2, False), (16, 32, False), (16, 1, True), (16, 2, True))
    )


def test_merged_states_give_the_output_over_all_keys():
    """Any cut of the keys; a part without keys, a row without any, and a part of the probe that all keys share."""
    rng = np.random.default_rng(17)
    rows, keys, width = 5, 24, 7
    s1, s2 = rng.normal(size=(2, rows, keys)) * 3
    s2 += 1e3
    value = jnp.asarray(rng.normal(size=(keys, width)), jnp.float32)
    visible = rng.random((rows, keys)) < 0.7
    visible[:, 8:12] = visible[3] = False

    def over(part):
        tile = (jnp.asarray(x[:, part], jnp.float32) for x in (s1, s2))
        initial = tiles.initial_state((rows,), width)
        return tiles.update(initial, *tile, 0.5, jnp.asarray(visible[:, part]), lambda p: p @ value[part])

    parts = [slice(0, 1), slice(1, 8), slice(8, 12), slice(12, 24)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *map(over, parts))
    p = np.exp2(0.5 * s1) * visible
    p /= np.maximum(p.sum(1, keepdims=True), 1e-30)
    expected = (p * (1 - s2 + (p * s2).sum(1, keepdims=True))) @ np.asarray(value, float)
    assert not expected[3].any()
    part = lambda states, i: jax.tree.map(lambda x: x[i], states)
    apart = lambda states: [part(states, i) for i in range(len(parts))]
    ways = tiles.merged_output, lambda x: tiles.output(apart(x)), lambda x: tiles.finish(tiles.merge(apart(x)))[0]
    for merged in ways:
        np.testing.assert_allclose(merged(states), expected, atol=5e-4)
        softmax = merged(states._replace(t_mean=None, o2=None))
        np.testing.assert_allclose(softmax, p @ np.asarray(value, float), atol=1e-6)


@pytest.mark.parametrize(("batch", "page_size", "kernels"), [(64, None, 1), (2, None, 2), (2, 64, 2)])
def test_a_gpu_runs_nothing_but_the_kernels(batch, page_size, kernels):
    """No pad, no sum of lengths, no transpose: at a few microseconds a call each would show."""
    shape = jax.ShapeDtypeStruct
    rows = shape((batch, 2, 12, 100), jnp.bfloat16)
    cache = shape((batch, 1000, 4, 100) if page_size is None else (99, page_size, 4, 100), jnp.bfloat16)
    table = None if page_size is None else shape((batch, 32), jnp.int32)
    call = functools.partial(parallax_decode, local_window_size=300, implementation="triton")
    arguments = (rows, rows, cache, cache, shape((batch,), jnp.int32))
    with jax.sharding.use_abstract_mesh(H100), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = jax.jit(lambda table, *x: call(*x, page_table=table)).trace(table, *arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    operations = set(re.findall(r"= stablehlo\.(\w+)", text)) - {"constant"}
    assert operations == {"custom_call"}
    assert text.count("__gpu$xla.gpu.triton") == kernels


def operands(**changes):
    shapes = {"query": (2, 1, 4, 8), "probe": (2, 1, 4, 8), "key_cache": (2, 9, 2, 8), "value_cache": (2, 9, 2, 8)}
    arrays = {k: jnp.ones(v) for k, v in shapes.items()}
    return {**arrays, "lengths": jnp.asarray([3, 9], jnp.int32), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_cache": jnp.ones((3, 9, 2, 8))}, "key_cache: needs shape (2, S, K, 8) to fit query, got (3, 9, 2, 8)"),
        ({"value_cache": jnp.ones((2, 8, 2, 8))}, "value_cache: needs shape (2, 9, 2, Hv) to fit key_cache, got"),
        ({"key_cache": jnp.ones((2, 9, 2, 8), jnp.bfloat16)}, "key_cache: needs query's dtype float32, got bfloat16"),
        (
            {"lengths": jnp.asarray([3, 10], jnp.int32)},
            "lengths: must lie in [0, 9], the cache's capacity, got 3 to 10",
        ),
        ({"lengths": jnp.asarray([3.0, 9.0])}, "lengths: must be int32 of shape (2,), got float32 of shape (2,)"),
        ({"page_table": jnp.ones((1, 3), jnp.int32)}, "page_table: must be int32 of shape (2, pages_per_sequence)"),
        ({"page_table": jnp.asarray([[0], [2]], jnp.int32)}, "page_table: page ids must lie in [0, 1], got 2"),
        ({"local_window_size": 0}, "local_window_size: must be an int >= 1 or None, got 0"),
        ({"implementation": "cuda"}, "implementation: got 'cuda', allowed are"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError) as raised:
        parallax_decode(**operands(**changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(("width", "stages"), [(128, 5), (512, 3)])
def test_a_step_on_hopper_has_tiles_that_fit(width, stages):
    """Half the splits of plain decode, and as many stages as shared memory holds."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    query, key = shape(1, 1, 16, width), shape(1, 4096, 8, width)
    plain = TritonDecodeBlockSizes.heuristic(query, key, key, Mask(None), None)
    with jax.sharding.use_abstract_mesh(H100):
        step = triton_decode._append_launch(plain, key, key)
    assert (step.num_splits, step.num_stages) == (plain.num_splits // 2, stages)
    assert 2 * step.num_stages * step.block_k * width * 2 <= shared_memory_limit("H100")


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("name", ["step", "many_rows_wide_head", "paged_pages_of_48_window"])
def test_softmax_is_a_probe_of_zeros(name, splits):
    case = next(c for c in CASES if c.name == name)
    (query, probe, key, value), lengths, table = draw(case)
    options = dict(scale=case.H**-0.5, block_sizes=TritonDecodeBlockSizes(16, splits, 2, 2))
    mask = Mask(None, lengths, window=case.window)
    out = jax.jit(functools.partial(triton_decode.decode, **options))(query, None, key, value, mask, table)
    reference = expected(case, (query, jnp.zeros_like(probe), key, value), table)
    assert error(out, reference) <= TOLERANCE[case.dtype]


def test_pages_of_any_size():
    (query, probe, key, value), lengths, _ = draw(Case("pages_of_9", (36, 20), S=36))
    table = jnp.asarray([[2, 0, 7, 5], [1, 6, 3, 4]], jnp.int32)
    paged = (jnp.zeros((8, 9, *x.shape[2:])).at[table].set(x.reshape(2, 4, 9, *x.shape[2:])) for x in (key, value))
    out = parallax_decode(query, probe, *paged, lengths, page_table=table, implementation="triton")
    np.testing.assert_allclose(out, parallax_decode(query, probe, key, value, lengths), atol=1e-5)


def test_unsupported_calls_say_why():
    with pytest.raises(NotImplementedError, match="needs TritonDecodeBlockSizes, got XlaBlockSizes"):
        parallax_decode(**operands(), implementation="triton", block_sizes=XlaBlockSizes())


def test_vmap():
    case = next(c for c in CASES if c.name == "step")
    (query, probe, key, value), lengths, _ = draw(case)
    stack = lambda x: jnp.stack([x, x[::-1]])
    both = jax.vmap(parallax_decode)(*(stack(x) for x in (query, probe, key, value)), stack(lengths))
    once = parallax_decode(query, probe, key, value, lengths)
    assert jnp.allclose(both[0], once, atol=1e-6)
    assert jnp.allclose(both[1], once[::-1], atol=1e-6)
