import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import softmax_terms
from train import loss as loss_module
from train.loss import cross_entropy

ROWS, TOKENS, WIDTH, VOCAB = 4, 18, 24, 76


def make_inputs(rng, dtype=jnp.float32):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, TOKENS)), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(ROWS, TOKENS)) * (rng.uniform(size=(ROWS, TOKENS)) > 0.2), jnp.float32)
    return (3 * draw(ROWS, TOKENS, WIDTH)).astype(dtype), draw(VOCAB, WIDTH), targets, weights


def plain(hidden, head, targets, weights):
    logits = jnp.einsum("btd,vd->btv", hidden.astype(jnp.float32), head, precision="highest")
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def loss_and_gradients(function, *inputs):
    return jax.jit(jax.value_and_grad(lambda *x: 0.7 * function(*x), argnums=(0, 1)))(*inputs)


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(actual[0], expected[0], rtol=tolerance)
    for a, b in zip(actual[1], expected[1], strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("chunk", [1, 7, 24, 72, 1000])
def test_equals_the_plain_loss(chunk):
    inputs = make_inputs(np.random.default_rng(chunk))
    expected = loss_and_gradients(plain, *inputs)
    assert_close(loss_and_gradients(lambda *x: cross_entropy(*x, chunk), *inputs), expected, 1e-5)
    np.testing.assert_allclose(cross_entropy(*inputs, chunk), plain(*inputs), rtol=1e-5)


@pytest.fixture(params=["xla", "kernel"])
def route(request, monkeypatch):
    """How exponentials are computed. The kernel, in the interpreter, has several blocks a row and a part of one."""
    monkeypatch.setattr(loss_module, "_by_kernel", lambda logits: request.param == "kernel")
    monkeypatch.setattr(softmax_terms, "BLOCK", 16)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("factor", "vocab"), [(0.3, VOCAB), (1.0, 64), (100.0, VOCAB)])
def test_both_routes_give_the_plain_loss(factor, vocab):
    """Of losses of thousands too, where exponentials over the target's would be infinite."""
    hidden, head, targets, weights = make_inputs(np.random.default_rng(4))
    inputs = factor * hidden, head[:vocab], targets % vocab, weights
    expected = loss_and_gradients(plain, *inputs)
    assert factor < 100 or expected[0] > 1e3
    assert_close(loss_and_gradients(lambda *x: cross_entropy(*x, 16), *inputs), expected, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [3.0, 60.0])
def test_the_kernel_on_a_gpu(monkeypatch, factor):
    """A row of the large vocabulary that ends in the middle of a block, and shifts by the largest logit."""
    logits = factor * jax.random.normal(jax.random.key(0), (512, 151936))
    place = jax.random.randint(jax.random.key(1), (512,), 0, 151936)
    target = jnp.take_along_axis(logits, place[:, None], 1)[:, 0]
    found = []
    for by_kernel in (True, False):
        monkeypatch.setattr(loss_module, "_by_kernel", lambda logits, by_kernel=by_kernel: by_kernel)
        terms, rest, shift = jax.jit(lambda *x: loss_module._terms(*x, jnp.float32))(logits, target, place)
        found.append((terms / rest[:, None], shift + jnp.log(rest)))
    for actual, expected in zip(*found, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-30)


def test_float16_is_refused():
    inputs = make_inputs(np.random.default_rng(6), jnp.float16)
    with pytest.raises(ValueError, match="hidden: needs bfloat16 or float32, got float16"):
        cross_entropy(*inputs, 16)


def test_bfloat16_adds_up_in_float32():
    inputs = make_inputs(np.random.default_rng(1), jnp.bfloat16)
    rounded = inputs[0], inputs[1].astype(jnp.bfloat16).astype(jnp.float32), *inputs[2:]
    loss, gradients = loss_and_gradients(lambda *x: cross_entropy(*x, 16), *inputs)
    expected, (dhidden, dhead) = loss_and_gradients(plain, *rounded)
    assert [x.dtype for x in (loss, *gradients)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for actual, wanted in zip(gradients, (dhidden, dhead), strict=True):
        error = np.linalg.norm(np.asarray(actual, np.float32) - np.asarray(wanted, np.float32))
        assert error < 5e-3 * np.linalg.norm(np.asarray(wanted, np.float32))


def test_extreme_logits_stay_finite():
    hidden, head, targets, weights = make_inputs(np.random.default_rng(2))
    loss, gradients = loss_and_gradients(lambda *x: cross_entropy(*x, 16), 1e3 * hidden, head, targets, weights)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in gradients)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 2, 4)])
def test_every_mesh_gives_the_loss_of_one_device(sizes):
    inputs = make_inputs(np.random.default_rng(3))
    expected = loss_and_gradients(plain, *inputs)
    names = ("data", "fsdp", "context", "tensor")
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 4)
    tokens = P(("data", "fsdp"), "context")
    specs = (tokens, P("tensor", "fsdp"), tokens, tokens)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(inputs, specs, strict=True)]
    with jax.set_mesh(mesh):
        actual = loss_and_gradients(lambda *x: cross_entropy(*x, 5), *placed)
        forward = jax.jit(lambda *x: cross_entropy(*x, 5))(*placed)
    assert_close(actual, expected, 1e-5)
    assert actual[1][1].sharding.is_equivalent_to(NamedSharding(mesh, specs[1]), 2)
    np.testing.assert_allclose(forward, plain(*inputs), rtol=1e-5)


def test_logits_of_all_tokens_never_exist():
    inputs = make_inputs(np.random.default_rng(4))
    text = str(jax.make_jaxpr(jax.grad(lambda *x: cross_entropy(*x, 8), argnums=(0, 1)))(*inputs))
    assert f"8,{VOCAB}]" in text and f"{ROWS * TOKENS},{VOCAB}]" not in text
    assert f"{ROWS},{TOKENS},{VOCAB}]" not in text
    whole = str(jax.make_jaxpr(jax.grad(plain, argnums=(0, 1)))(*inputs))
    assert f"{ROWS},{TOKENS},{VOCAB}]" in whole
