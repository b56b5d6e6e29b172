"""The blockwise implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.block_sizes import XlaBlockSizes
from parallax_jax import compare, parallax_attention, parallax_reference
from parallax_jax.workloads import CONFORMANCE, Workload
from tests.conformance import Conformance, draw


class TestXla(Conformance):
    implementation = "xla"
    half_workloads = ("seven", "mqa", "gqa_wide_head", "window_1", "packed", "ragged")

    @pytest.mark.parametrize("workload", CONFORMANCE[::4], ids=lambda w: w.name)
    def test_float64(self, workload):
        options = workload.options()
        operands = [np.asarray(x, np.float64) for x in workload.operands(jnp.float32)]
        with jax.enable_x64(True):
            *operands, cotangent = (jnp.asarray(x) for x in operands)
            options = {
                k: jnp.asarray(np.asarray(v), jnp.int32) if hasattr(v, "shape") else v for k, v in options.items()
            }
            attention = functools.partial(self.attention, block_sizes=XlaBlockSizes(32, 16), **options)
            results = compare.value_and_gradients(attention, operands, cotangent)
        for name, x, y in zip(compare.RESULTS, results, compare.expected(workload, jnp.float32), strict=True):
            assert x.dtype == np.float64
            assert compare.relative_error(x, y) <= compare.BOUNDS["float64"][0], name

    @pytest.mark.parametrize("sizes", [(16, 16), (64, 32), (32, 128)])
    @pytest.mark.parametrize("name", ["packed", "window_77", "ragged", "scattered", "more_queries", "packed_full"])
    def test_small_blocks(self, name, sizes):
        workload = next(w for w in CONFORMANCE if w.name == name)
        found = compare.errors("xla", workload, jnp.float32, block_sizes=XlaBlockSizes(*sizes))
        assert max(found.values()) <= self.bound()


def memory(implementation: str, length: int) -> int:
    """Bytes of temporaries of forward and backward."""
    shape = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)

    def loss(*operands):
        return jnp.sum(parallax_attention(*operands, implementation=implementation))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*[shape] * 4).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_a_twentieth_of_dense():
    assert memory("xla", 16384) < memory("reference", 16384) / 20


def test_memory_is_linear():
    assert memory("xla", 32768) < 2.2 * memory("xla", 16384)


def test_long_rows():
    workload = Workload("long", 1, 2048, 1, 32)
    found = compare.errors("xla", workload, jnp.float32)
    assert found["out"] <= 2e-6 and max(found.values()) <= 1e-5


def test_gradients_against_finite_differences():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        operands = [jnp.asarray(rng.normal(size=(1, 9, 2, 5))) for _ in range(4)]
        check_grads(parallax_reference, operands, order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def test_tf32_can_be_asked_for():
    rng = np.random.default_rng(0)
    x = draw(rng, 1, 16, 1, 16)
    lower = lambda: jax.jit(lambda x: parallax_attention(x, x, x, x, implementation="xla")).lower(x).as_text()
    assert "HIGHEST" in lower()
    with jax.default_matmul_precision("tensorfloat32"):
        assert "HIGHEST" not in lower()
