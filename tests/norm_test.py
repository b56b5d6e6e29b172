"""RMS norm by its kernels: numerics in the interpreter, alone and over a mesh, and the lowering for a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import rms_norm as kernels
from parallax_jax import norm
from parallax_jax.layers import ParallaxAttention
from parallax_jax.model import ModelConfig, TransformerLM
from tests.triton_test import lower
from train.gpus import gpu_devices

# Several tiles a program; heads that are no power of two; more tokens than a program takes.
CASES = [((2, 32, 4, 64), "bfloat16"), ((1, 48, 3, 32), "float32"), ((1, 64, 1, 1024), "float32")]


def operands(shape, dtype, positions: int):
    keys = jax.random.split(jax.random.key(sum(shape)), 6)
    x, branch, dout, dsum = (jax.random.normal(key, shape).astype(dtype) for key in keys[:4])
    scale = 1 + 0.3 * jax.random.normal(keys[4], shape[-1:])
    positions = jax.random.randint(keys[5], (positions, shape[1]), 0, 900)
    return x, branch, dout, dsum, scale, norm.rotary_embedding(positions, shape[-1], 1e4)


def both(monkeypatch, function, *args):
    """A function's results by XLA, and by the kernels."""
    results = []
    for by_kernel in (False, True):
        monkeypatch.setattr(norm, "_by_kernel", lambda x, by_kernel=by_kernel: by_kernel)
        results.append(jax.jit(lambda *args: function(*args))(*args))
    return results


def assert_close(expected, actual, dtype):
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        # Half precision: one step of its largest numbers apart.
        np.testing.assert_allclose(b, a, rtol=0, atol=np.abs(a).max() * {"float32": 5e-6, "bfloat16": 2**-7}[dtype])


def rotated(x, scale, rotation, dout):
    out, vjp = jax.vjp(lambda x, scale: norm.rms_norm(x, scale, 1e-5, rotation), x, scale)
    return out, vjp(dout)


def residual(x, branch, scale, dout, dsum):
    function = functools.partial(norm.residual_norm, epsilon=1e-5)
    results, vjp = jax.vjp(lambda x, branch, scale: function(x, branch, scale), x, branch, scale)
    return results, vjp((dsum, dout))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(8, 4096, 16, 128), (8, 4096, 1, 1024)], ids=str)
def test_kernels_equal_xla_on_a_gpu(monkeypatch, shape, dtype):
    test_kernels_equal_xla(monkeypatch, shape, dtype)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_kernels_equal_xla(monkeypatch, shape, dtype):
    x, branch, dout, dsum, scale, rotation = operands(shape, dtype, shape[0])
    shared = jax.tree.map(lambda r: r[:1], rotation)
    for angles in (rotation, shared, None):
        assert_close(*both(monkeypatch, rotated, x, scale, angles, dout), dtype)
    for added in (branch, None):
        assert_close(*both(monkeypatch, residual, x, added, scale, dout, dsum), dtype)


@pytest.mark.parametrize(("positions", "kind"), [(1, AxisType.Auto), (4, AxisType.Auto), (4, AxisType.Explicit)])
def test_over_a_mesh(monkeypatch, positions, kind):
    x, branch, dout, dsum, scale, rotation = operands((4, 64, 4, 32), jnp.float32, positions)
    stream = [y.reshape(4, 64, 128) for y in (x, branch, dout, dsum)]

    def run(x, dout, stream, scale, rotation):
        x_stream, branch, dout_stream, dsum = stream
        gain = jnp.tile(scale, 4)
        return rotated(x, scale, rotation, dout), residual(x_stream, branch, gain, dout_stream, dsum)

    expected, alone = both(monkeypatch, run, x, dout, stream, scale, rotation)
    assert_close(expected, alone, "float32")
    mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
        place = lambda *axes: functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec(*axes)))
        heads, stream = place("data", "context", "tensor"), jax.tree.map(place("data", "context"), stream)
        assert_close(expected, jax.jit(run)(heads(x), heads(dout), stream, scale, rotation), "float32")


def test_what_the_kernels_refuse():
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    assert kernels.unsupported(shape(1, 16, 3, 64)) is None
    assert "tokens, got 1" in kernels.unsupported(shape(1, 1, 3, 64))
    assert "rows of a power of two from 32 to 8192, got 96" in kernels.unsupported(shape(1, 16, 3, 96))
    assert "got float64" in kernels.unsupported(shape(1, 16, 3, 64, dtype=jnp.float64))


def lowered_layer(head_dim: int) -> int:
    """Norm kernels in a training step of an attention layer for an H100."""
    layer = ParallaxAttention(4, 2, head_dim, dtype=jnp.bfloat16, implementation="xla")
    x = jax.ShapeDtypeStruct((2, 64, 96), jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    loss = lambda params, x: jnp.sum(layer.apply({"params": params}, x)[0].astype(jnp.float32))
    text = lower(jax.grad(loss), params, x)
    return len(re.findall(r'name = "rms_norm_(forward|backward)"', text))


def test_lowers_for_cuda_and_falls_back(monkeypatch):
    assert lowered_layer(64) == 6  # query, probe and key
    assert lowered_layer(48) == 0
    monkeypatch.setattr(norm, "_kernels", lambda: None)  # as where Pallas has no Triton
    assert lowered_layer(64) == 0


@pytest.mark.compile
@pytest.mark.parametrize("width", [1024, 2048])
def test_compiles_for_hopper(width):
    config = ModelConfig(256, 1, width, 16, 8, 128, 256, dtype="bfloat16")
    model = TransformerLM(config)
    mesh = jax.sharding.Mesh(gpu_devices(1), ("x",))
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    params = jax.tree.map(place, jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(lambda params, tokens: jnp.sum(model.apply({"params": params}, tokens))))
        text = step.lower(params, place(tokens)).compile().as_text()
    assert len(re.findall(r"custom-call\(.*rms_norm_forward", text)) == 6
    assert len(re.findall(r"custom-call\(.*rms_norm_backward", text)) == 6
