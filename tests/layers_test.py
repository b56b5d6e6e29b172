import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parallax_jax import local_estimator
from parallax_jax.cache import KVCache
from parallax_jax.estimators import Solver
from parallax_jax.layers import ParallaxAttention, RMSNorm, apply_rope, rotary_embedding
from parallax_jax.reference import parallax_reference


def make(**options):
    layer = ParallaxAttention(4, 2, 10, rope_theta=100.0, **options)
    x = jax.random.normal(jax.random.key(0), (2, 13, 24))
    params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(1), x)["params"])
    # Gains and biases away from their start, so that a forgotten one shows.
    keys = iter(jax.random.split(jax.random.key(2), 40))
    scale = lambda p: 8 * p if p.ndim > 1 else p
    params = jax.tree.map(lambda p: scale(p) + 0.2 * jax.random.normal(next(keys), p.shape), params)
    return layer, params, x


def numpy_layer(params, x, positions, *, window=None, probe_rope=True, probe_norm=True, qk_norm=True):
    """The layer in float64 numpy around the dense reference."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = np.asarray(x, np.float64)

    def rope(h):
        half = h.shape[-1] // 2
        angle = positions[:, None] * 100.0 ** (-np.arange(half) / half)
        turn = np.exp(1j * angle)[:, None] * (h[..., :half] + 1j * h[..., half:])
        return np.concatenate([turn.real, turn.imag], -1)

    def heads(name, norm, rotate):
        h = np.einsum("btd,dnh->btnh", x, params[name]["kernel"]) + params[name].get("bias", 0.0)
        if norm:
            h = h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * params[f"{name}_norm"]["scale"]
        return rope(h) if rotate else h

    query, key, value = heads("query", qk_norm, True), heads("key", qk_norm, True), heads("value", False, False)
    probe = heads("probe", probe_norm, probe_rope) if "probe" in params else np.zeros_like(query)
    operands = [jnp.asarray(a, jnp.float32) for a in (query, probe, key, value)]
    out = np.asarray(parallax_reference(*operands, local_window_size=window), np.float64)
    return np.einsum("btnh,nhd->btd", out, params["out"]["kernel"]) + params["out"].get("bias", 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "softmax"},
        {"probe_rope": False, "probe_norm": False, "use_bias": True},
        {"qk_norm": False, "local_window_size": 5},
    ],
    ids=["default", "softmax", "plain_probe_bias", "no_qk_norm_window"],
)
def test_layer_equals_numpy(options):
    layer, params, x = make(**options)
    positions = jnp.arange(7, 20, dtype=jnp.int32)[None]
    out, cache = jax.jit(layer.apply)({"params": params}, x, positions)
    options = {k: v for k, v in options.items() if k not in ("attention", "use_bias")}
    if "local_window_size" in options:
        options["window"] = options.pop("local_window_size")
    expected = numpy_layer(params, x, np.arange(7, 20), **options)
    assert cache is None
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_packed_rows_equal_separate_documents():
    layer, params, x = make()
    segment_ids = jnp.asarray([[1] * 4 + [2] * 9, [1] * 7 + [2] * 5 + [0]], jnp.int32)
    positions = jnp.asarray([[*range(4), *range(9)], [*range(7), *range(5), 0]], jnp.int32)
    packed, _ = jax.jit(layer.apply)({"params": params}, x, positions, segment_ids)
    for row, start, end in ((0, 0, 4), (0, 4, 13), (1, 0, 7), (1, 7, 12)):
        alone, _ = layer.apply({"params": params}, x[row : row + 1, start:end])
        np.testing.assert_allclose(packed[row, start:end], alone[0], rtol=1e-3, atol=1e-4)


def test_probe_gain_zero_is_softmax_with_a_way_out():
    layer, params, x = make()
    params["probe_norm"]["scale"] = jnp.zeros_like(params["probe_norm"]["scale"])
    softmax = ParallaxAttention(4, 2, 10, rope_theta=100.0, attention="softmax")
    plain = {k: v for k, v in params.items() if not k.startswith("probe")}
    assert set(nn.meta.unbox(softmax.init(jax.random.key(0), x)["params"])) == set(plain)
    out, _ = layer.apply({"params": params}, x)
    np.testing.assert_array_equal(out, softmax.apply({"params": plain}, x)[0])
    grads = jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, x)[0] ** 2))(params)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
    assert jnp.linalg.norm(grads["probe_norm"]["scale"]) > 0
    assert not grads["probe"]["kernel"].any()


def test_probe_norm_init_and_init_scale():
    x = jnp.ones((1, 3, 64))
    layer = ParallaxAttention(16, 4, 32, probe_norm_init=0.0, out_init_std=0.5)
    params = nn.meta.unbox(layer.init(jax.random.key(0), x)["params"])
    assert not params["probe_norm"]["scale"].any()
    assert (params["query_norm"]["scale"] == 1).all()
    np.testing.assert_allclose(jnp.std(params["probe"]["kernel"]), 0.02, rtol=0.05)
    np.testing.assert_allclose(jnp.std(params["out"]["kernel"]), 0.5, rtol=0.05)


def test_rope_depends_on_distance_only_and_starts_at_identity():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 6, 3, 16))
    at = lambda start: jnp.arange(start, start + 6, dtype=jnp.int32)[None]
    rope = lambda s: rotary_embedding(at(s), 16, 1e4)
    scores = lambda s: jnp.einsum("btnh,bsnh->bnts", apply_rope(x, rope(s)), apply_rope(y, rope(s)))
    np.testing.assert_allclose(scores(0), scores(1000), atol=3e-3)
    np.testing.assert_array_equal(apply_rope(x, rotary_embedding(jnp.zeros((1, 6), jnp.int32), 16, 1e4)), x)


def test_rms_norm_is_float32_inside():
    x = jax.random.normal(jax.random.key(0), (5, 64)) * 300
    norm = RMSNorm()
    params = norm.init(jax.random.key(0), x)
    exact = np.asarray(x) / np.sqrt(np.mean(np.asarray(x) ** 2, -1, keepdims=True))
    np.testing.assert_allclose(norm.apply(params, x), exact, rtol=1e-5)
    half = norm.apply(params, x.astype(jnp.float16))  # the sum of squares overflows float16
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, rtol=3e-3, atol=3e-3)


def test_bfloat16_compute_keeps_float32_parameters():
    layer, params, x = make()
    low = ParallaxAttention(4, 2, 10, rope_theta=100.0, dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out, _ = low.apply({"params": params}, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    exact, _ = layer.apply({"params": params}, x)
    assert jnp.linalg.norm(out.astype(jnp.float32) - exact) < 0.03 * jnp.linalg.norm(exact)


def test_works_through_the_nnx_bridge():
    layer, _, x = make()
    # The bridge shards annotated parameters at once; without a mesh there is nothing to shard over.
    with nnx.use_eager_sharding(False):
        model = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0)).lazy_init(x)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        expected, _ = layer.apply({"params": params}, x)
        np.testing.assert_allclose(model(x)[0], expected, rtol=1e-5, atol=1e-6)
        grads = nnx.grad(lambda m: jnp.sum(m(x)[0] ** 2))(model)
    norms = {k: float(jnp.linalg.norm(v["kernel"])) for k, v in nnx.to_pure_dict(grads).items() if "norm" not in k}
    assert set(norms) == {"query", "probe", "key", "value", "out"}
    assert all(n > 0 for n in norms.values())


def operands(layer, params, x):
    """A layer's output, and the query, probe, key and value that it attends with."""
    (out, _), sown = layer.apply({"params": params}, x, mutable="intermediates")
    return out, sown["intermediates"]["operands"][0]


@pytest.mark.parametrize("attention", ["lla", "linear", "mesa"])
def test_other_estimators(attention):
    solver = Solver(ridge=0.5, method="exact")
    layer, params, x = make(attention=attention, solver=solver, local_window_size=5)
    out, (query, _, key, value) = operands(layer, params, x)
    probe = query if attention == "linear" else None
    expected = local_estimator(query, probe, key, value, estimator=attention, solver=solver, local_window_size=5)
    np.testing.assert_allclose(
        out, jnp.einsum("btnh,nhd->btd", expected, params["out"]["kernel"]), rtol=1e-4, atol=1e-4
    )
    assert "probe" not in params
    with pytest.raises(ValueError, match=f"cache: attention '{attention}' has none"):
        layer.apply({"params": params}, x, cache=KVCache(key, value, jnp.zeros(2, jnp.int32)))


def test_probe_gate():
    layer, params, x = make(probe_gate=True)
    _, (_, gated, _, _) = operands(layer, params, x)
    rest = {name: p for name, p in params.items() if name != "probe_gate"}
    _, (_, plain, _, _) = operands(make()[0], rest, x)
    gate = jax.nn.sigmoid(x @ params["probe_gate"]["kernel"])
    np.testing.assert_allclose(gated, plain * gate[..., None], rtol=1e-5, atol=1e-6)
