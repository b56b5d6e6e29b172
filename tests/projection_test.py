"""Fused products of a few rows against the plain ones."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.triton.projection import MAX_HELD, Launch, Stream, _launch, project
from parallax_jax.layers import RMSNorm


def normal(seed: int, *shapes, dtype="bfloat16"):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def close(out, expected, tolerance):
    out, expected = (np.asarray(x.astype(jnp.float32)) for x in (out, expected))
    assert np.linalg.norm(out - expected) <= tolerance * np.linalg.norm(expected)


DTYPES = [("bfloat16", 2e-3), ("float32", 1e-6)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_norm_and_several_weights(rows, dtype, tolerance):
    """One norm and products with weights of several widths, kept in float32."""
    x, gain = normal(rows, (rows, 100), (100,), dtype=dtype)
    weights = normal(rows, (100, 48), (100, 20), (100, 7), dtype="float32")
    outs = jax.jit(lambda *x: project(Stream(x[0]), x[2:], gain=x[1], epsilon=1e-3))(x, gain, *weights)
    *outs, stream = outs
    np.testing.assert_array_equal(stream.x, x)
    normed = RMSNorm(1e-3).apply({"params": {"scale": gain}}, x)
    for out, weight in zip(outs, weights, strict=True):
        assert out.dtype == x.dtype
        close(out, normed @ weight.astype(dtype), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_gate_and_residual(rows, dtype, tolerance):
    x, gate, up, down = normal(rows, (rows, 64), (64, 80), (64, 80), (80, 64), dtype=dtype)
    launch = Launch(16, 32, 4, 2)
    hidden, _ = jax.jit(lambda *x: project(Stream(x[0]), x[1:], gated=True, launch=launch))(x, gate, up)
    close(hidden, nn.silu(x @ gate) * (x @ up), 2 * tolerance)
    (out,) = jax.jit(lambda h, w, r: project(Stream(h), [w], residual=r, launch=launch))(hidden, down, x)
    close(out.x, x + hidden @ down, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_stages", [1, 3], ids=["registers", "tensor_cores"])
def test_one_row_in_parts(num_stages, dtype, tolerance, gated):
    """On the tensor cores as where its weights are too many for the registers; reading ahead changes nothing."""
    x, gain, *weights = normal(9, (1, 80), (80,), (80, 40), (80, 40), dtype=dtype)
    weights = [weight / 9 for weight in weights]
    call = functools.partial(project, Stream(x), weights, gain=gain, gated=gated)
    outs = call(launch=Launch(16, 32, 4, num_stages), ahead=weights)
    for out, expected in zip(outs[:-1], call()[:-1], strict=True):
        close(out, expected, tolerance)


def test_long_products_leave_the_registers():
    weight = jnp.zeros((MAX_HELD // 16, 48), jnp.bfloat16)
    assert _launch(1, [weight], False, False).num_stages == 1
    assert _launch(1, [weight, weight], True, False).num_stages > 1


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("depth", [64, 100])
@pytest.mark.parametrize("launch", [None, Launch(16, 32, 4, 2)], ids=["held", "tensor cores"])
def test_shares_are_added_by_the_next_product(launch, depth, dtype, tolerance):
    """Three shares that rows do not fill, one of them empty; the stream comes back with the product added."""
    x, gain, hidden, down, *weights = normal(
        3, (1, 40), (40,), (1, depth), (depth, 40), (40, 24), (40, 56), dtype=dtype
    )
    call = lambda h, w, r: project(Stream(h), [w], residual=r, launch=Launch(16, 32, 4, 1, 8, 3))
    (stream,) = jax.jit(call)(hidden, down, x)
    assert stream.parts.shape == (3, 40)
    expected = x + hidden @ down
    close(stream.whole(), expected, tolerance)
    *outs, whole = jax.jit(lambda stream, gain, *w: project(stream, w, gain=gain, launch=launch))(
        stream, gain, *weights
    )
    assert whole.parts is None
    np.testing.assert_array_equal(whole.x, stream.whole())
    normed = RMSNorm(1e-6).apply({"params": {"scale": gain}}, whole.x)
    for out, weight in zip(outs, weights, strict=True):
        close(out, normed @ weight, tolerance)
