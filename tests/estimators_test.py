"""The family of estimators against its definitions, one token at a time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from parallax_jax import local_estimator, parallax_attention
from parallax_jax.estimators import ESTIMATORS, Estimator, Solver, solved_probe

EXACT = Solver(ridge=0.3, method="exact")
# Grouped queries under every mask: window, packed documents, lengths with an offset, no causality.
MASKS = {
    "window": {"local_window_size": 4},
    "packed": {"segment_ids": np.array([[0] * 4 + [1] * 7, [2] * 11], np.int32)},
    "ragged": {"key_value_seq_lengths": np.array([7, 11], np.int32), "is_causal": False},
    "offset": {"query_offset": -2},
}


def draw(length=11, *, batch=2, heads=4, kv_heads=2, head_dim=3, value_dim=5, seed=0):
    rng = np.random.default_rng(seed)
    query, probe = rng.normal(size=(2, batch, length, heads, head_dim))
    key = rng.normal(size=(batch, length, kv_heads, head_dim)) + 0.5
    return query, probe, key, rng.normal(size=(batch, length, kv_heads, value_dim))


def seen(t, b, keys, *, is_causal=True, query_offset=0, local_window_size=None, segment_ids=None, lengths=None):
    """The keys that query t of row b sees."""
    at = t + query_offset
    found = [s for s in range(keys if lengths is None else lengths[b]) if not is_causal or s <= at]
    found = [s for s in found if local_window_size is None or s > at - local_window_size]
    return [s for s in found if segment_ids is None or segment_ids[b, s] == segment_ids[b, t]]


def fit(name, query, probe, k, v, ridge, absolute):
    """The prediction at one query from its keys and values, as each method's own paper writes it."""
    d = len(query)
    w = np.exp(k @ query / math.sqrt(d)) if name in ("softmax", "parallax", "lla") else np.ones(len(k))
    ridge = ridge * (1 if absolute else w.sum()) * np.eye(d)
    p, z = w / w.sum(), k - query
    mean_k, mean_v = p @ k, p @ v
    covariance = (p[:, None] * (v - mean_v)).T @ (k - mean_k)
    match name:
        case "softmax" | "value_average":
            return mean_v
        case "parallax" | "affine_linear":
            return mean_v - covariance @ probe
        case "lla":  # arXiv 2605.29157, eq. 3
            rho = np.linalg.solve((w[:, None] * z).T @ z + ridge, w @ z)
            return (w * (1 - z @ rho)) @ v / (w.sum() - w @ z @ rho)
        case "affine_mesa":
            rho = np.linalg.solve(k.T @ k - len(k) * np.outer(mean_k, mean_k) + ridge, len(k) * (mean_k - query))
            return mean_v - covariance @ rho
        case "linear":
            return v.T @ k @ probe / len(k)
        case "mesa":
            return v.T @ k @ np.linalg.solve(k.T @ k + ridge, query)


def by_hand(name, operands, ridge=0.3, absolute=False, **mask):
    query, probe, key, value = operands
    mask = {("lengths" if k == "key_value_seq_lengths" else k): v for k, v in mask.items()}
    batch, length, heads, _ = query.shape
    out = np.zeros((batch, length, heads, value.shape[-1]))
    for b, t, n in np.ndindex(batch, length, heads):
        s, group = seen(t, b, key.shape[1], **mask), heads // key.shape[2]
        if s:
            k, v = key[b, s, n // group], value[b, s, n // group]
            out[b, t, n] = fit(name, query[b, t, n], probe[b, t, n], k, v, ridge, absolute)
    return out


def estimate(name, operands, **options):
    query, probe, key, value = (jnp.asarray(x) for x in operands)
    probe = probe if ESTIMATORS[name].probe == "learned" else None
    function = functools.partial(local_estimator, estimator=name, **options)
    return jax.jit(function)(query, probe, key, value)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_named_points(name):
    with jax.enable_x64(True):
        out = estimate(name, draw(), solver=EXACT)
        np.testing.assert_allclose(out, by_hand(name, draw()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "absolute", "mask"),
    [("lla", False, "window"), ("lla", True, "packed"), ("lla", True, "ragged"), ("mesa", True, "offset")],
)
def test_solved_under_masks(name, absolute, mask):
    solver = Solver(ridge=0.3, scaling="absolute" if absolute else "relative", max_iterations=40, tolerance=1e-13)
    with jax.enable_x64(True):
        out = estimate(name, draw(), solver=solver, **MASKS[mask])
        expected = by_hand(name, draw(), absolute=absolute, **MASKS[mask])
        np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-9)


def test_identities():
    """Members that are limits of one another, and those that are calls of the operator, to 1e-12."""
    attend = functools.partial(parallax_attention, implementation="reference")

    @jax.jit
    def pairs(query, probe, key, value):
        estimate = lambda name, probe=None: local_estimator(query, probe, key, value, estimator=name, solver=EXACT)
        lla, softmax = estimate("lla"), estimate("softmax")
        solved, eta = solved_probe(query, key, solver=EXACT)
        stiff = Solver(ridge=1e16, method="exact")
        return eta, {
            "parallax": (estimate("parallax", probe), attend(query, probe, key, value)),
            "affine linear": (estimate("affine_linear", probe), attend(query, probe, key, value, scale=0.0)),
            "softmax": (softmax, attend(query, 0 * query, key, value)),
            "LLA, large ridge": (local_estimator(query, None, key, value, solver=stiff), softmax),
            # LLA's solved probe, times 1 + eta, is Parallax's.
            "LLA": (lla, attend(query, (1 + eta) * solved, key, value)),
            "LLA, learned": (lla, estimate(Estimator("learned", boundary=True), solved)),
            "without the factor": (estimate(Estimator("solved")), attend(query, solved, key, value)),
            # A wide bandwidth is uniform weights.
            "affine mesa": (estimate("affine_mesa"), estimate(Estimator("solved", 1e15, boundary=True))),
            "mesa": (estimate("mesa"), estimate(Estimator("solved", 1e15, intercept=False))),
        }

    with jax.enable_x64(True):
        eta, found = pairs(*(jnp.asarray(x) for x in draw(seed=1)))
        assert eta.min() >= 0 and eta.max() > 1
        for name, (x, y) in found.items():
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12, err_msg=name)


def test_lla_reproduces_linear_functions():
    """Local linear regression is exact for values linear in the keys, but for the ridge; softmax attention is not."""
    query, _, key, _ = draw(40, kv_heads=4, seed=2)
    with jax.enable_x64(True):
        value = 3.0 + key @ np.random.default_rng(3).normal(size=(3, 2))
        expected = 3.0 + query @ np.random.default_rng(3).normal(size=(3, 2))
        solver = Solver(ridge=1e-11, method="exact")
        out = local_estimator(query, None, jnp.asarray(key), value, solver=solver, is_causal=False)
        np.testing.assert_allclose(out, expected, atol=1e-7)


def error(x, y):
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize("scaling", ["relative", "absolute"])
def test_conjugate_gradients_at_512(scaling):
    operands = draw(512, batch=1, heads=2, kv_heads=1, head_dim=16, value_dim=16, seed=4)
    ridge = 0.1 if scaling == "relative" else 10.0
    solver = Solver(ridge=ridge, scaling=scaling)
    out = estimate("lla", [x.astype(np.float32) for x in operands], solver=solver)
    with jax.enable_x64(True):
        exact = estimate("lla", operands, solver=Solver(ridge=ridge, scaling=scaling, method="exact"))
    assert out.dtype == jnp.float32 and error(out, exact) < 1e-5


@pytest.mark.parametrize(
    ("name", "scaling", "method"),
    [("lla", "absolute", "cg"), ("mesa", "relative", "cg"), ("lla", "absolute", "exact")],
)
def test_gradients_against_finite_differences(name, scaling, method):
    operands = draw(7, batch=1, seed=5)
    solver = Solver(ridge=0.3, scaling=scaling, method=method, tolerance=1e-14)
    with jax.enable_x64(True):
        query, _, key, value = (jnp.asarray(x) for x in operands)
        function = jax.jit(functools.partial(local_estimator, estimator=name, solver=solver, local_window_size=5))
        check_grads(lambda q, k, v: function(q, None, k, v), (query, key, value), 1, ["rev"], atol=1e-6, rtol=1e-6)


def test_poisoned_padding():
    query, _, key, value = (jnp.asarray(x, jnp.float32) for x in draw(seed=6))
    key, value = (x.at[0, 7:].set(jnp.nan) for x in (key, value))
    lengths = jnp.asarray([7, 11], jnp.int32)
    loss = lambda q, k, v: jnp.sum(
        local_estimator(q, None, k, v, key_value_seq_lengths=lengths, is_causal=False, solver=Solver(0.3)) ** 2
    )
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


def memory(length: int) -> int:
    """Bytes of temporaries of LLA, forward and backward."""
    shape = jax.ShapeDtypeStruct((1, length, 1, 32), jnp.float32)
    loss = lambda q, k, v: jnp.sum(local_estimator(q, None, k, v))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*[shape] * 3).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear():
    assert memory(8192) < 2.2 * memory(4096) and memory(4096) < 4096 * 4096 * 4


def test_half_precision_solves_in_float32():
    operands = [jnp.asarray(x, jnp.bfloat16) for x in draw(64, seed=7)]
    out = estimate("lla", operands, solver=Solver(0.3))
    with jax.enable_x64(True):
        exact = by_hand("lla", [np.asarray(x, np.float64) for x in operands])
    assert out.dtype == jnp.bfloat16 and error(out, exact) < 1e-2


def test_wrong_arguments():
    query, probe, key, value = (jnp.asarray(x, jnp.float32) for x in draw())
    with pytest.raises(ValueError, match="estimator: got 'deltanet', allowed are softmax"):
        local_estimator(query, None, key, value, estimator="deltanet")
    with pytest.raises(ValueError, match="probe: estimator's probe is 'solved', so it must be None"):
        local_estimator(query, probe, key, value)
    with pytest.raises(ValueError, match="probe: estimator's probe is 'learned', so it must not be None"):
        local_estimator(query, None, key, value, estimator="linear")
    with pytest.raises(ValueError, match="ridge: must be above 0"):
        Solver(ridge=0.0)
    with pytest.raises(ValueError, match="scaling: must be one of"):
        Solver(scaling="half")
    with pytest.raises(ValueError, match="intercept: without one"):
        Estimator("zero", intercept=False)
    with pytest.raises(ValueError, match="bandwidth: must be above 0"):
        Estimator("zero", bandwidth=-1.0)
