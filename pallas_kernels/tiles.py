"""The algorithm of Parallax attention on one tile, stated once; every backend calls these functions.

A tile is a block of query rows against a block of keys, for one head. With softmax weights `p`, probe scores
`t = probe . key` (unscaled) and `t_mean = sum_j p_j t_j`, the output is `sum_j p_j (1 - t_j + t_mean) v_j`
(Parallax, arXiv 2605.29157, eq. 8), which equals `v_mean (1 + t_mean) - sum_j p_j t_j v_j`.

Everything is float32 (or wider). Scores are in base 2: `c = scale * log2(e)`, `p = 2^(c s1 - lse)`. Row statistics
have the tile's shape without the key axis; leading batch axes are allowed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)


class State(NamedTuple):
    """What the forward pass carries along the keys: the two sums of weights and the two sums of values.

    Attributes:
      m: (rows,) running maximum of the base-2 scores; -inf while no key has been seen.
      d1: (rows,) sum of 2^(s - m).
      d2: (rows,) sum of 2^(s - m) t.
      o1: (rows, Hv) sum of 2^(s - m) v.
      o2: (rows, Hv) sum of 2^(s - m) t v.
    """

    m: jax.Array
    d1: jax.Array
    d2: jax.Array
    o1: jax.Array
    o2: jax.Array


def dot_precision(dtype) -> lax.Precision | None:
    """float32 products stay float32 (no TF32), unless the caller's default matmul precision asks for less."""
    if jnp.dtype(dtype).itemsize < 4 or jax.config.jax_default_matmul_precision is not None:
        return None
    return lax.Precision.HIGHEST


def spread(stat: jax.Array, like: jax.Array, key_axis: int = -1) -> jax.Array:
    """Repeats a row statistic along the key axis (or value axis) of `like`."""
    axis = key_axis % like.ndim
    return lax.broadcast_in_dim(stat, like.shape, [i for i in range(like.ndim) if i != axis])


def positive_scale(s1: jax.Array, c: float) -> tuple[jax.Array, float]:
    """Moves a negative scale's sign into the scores: `update` takes the maximum before it scales."""
    return (-s1, -c) if c < 0 else (s1, c)


def initial_state(rows: tuple[int, ...], value_dim: int, dtype=jnp.float32) -> State:
    """The state before any key."""
    stat = jnp.zeros(rows, dtype)
    values = jnp.zeros((*rows, value_dim), dtype)
    return State(jnp.full(rows, -jnp.inf, dtype), stat, stat, values, values)


def softmax_weights(
    m: jax.Array, s1: jax.Array, c: float, visible: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Moves the running maximum over one tile of keys: the first half of `update`, which needs no probe scores.

    Args:
      m: (rows,) running maximum so far.
      s1: (rows, keys) query . key, unscaled.
      c: scale * log2(e).
      visible: (rows, keys) bool, or None where every key is visible.

    Returns:
      The new maximum (rows,), the factor (rows,) for the old sums, and the weights 2^(s - m) (rows, keys).
    """
    s1, c = positive_scale(s1, c)
    if visible is not None:
        s1 = jnp.where(visible, s1, -jnp.inf)
    m_new = jnp.maximum(m, jnp.max(s1, axis=-1) * c)
    m_finite = jnp.where(m_new == -jnp.inf, 0.0, m_new)
    return m_new, jnp.exp2(m - m_finite), jnp.exp2(s1 * c - spread(m_finite, s1))


def update(
    state: State,
    s1: jax.Array,
    s2: jax.Array,
    c: float,
    visible: jax.Array | None,
    times_value: Callable[[jax.Array], jax.Array],
) -> State:
    """Adds one tile of keys to the state.

    Args:
      state: the state of the rows.
      s1: (rows, keys) query . key, unscaled.
      s2: (rows, keys) probe . key; finite everywhere, masked entries included.
      c: scale * log2(e).
      visible: (rows, keys) bool, or None where every key is visible.
      times_value: multiplies weights (rows, keys) with the tile's values (keys, Hv), in float32.
    """
    m, a, p = softmax_weights(state.m, s1, c, visible)
    p2 = p * s2
    return State(
        m,
        a * state.d1 + jnp.sum(p, axis=-1),
        a * state.d2 + jnp.sum(p2, axis=-1),
        spread(a, state.o1) * state.o1 + times_value(p),
        spread(a, state.o2) * state.o2 + times_value(p2),
    )


def merge(states: State, axis: int = 0) -> State:
    """Merges states of the same rows over disjoint keys, stacked along `axis`. Associative, any order."""
    m = jnp.max(states.m, axis=axis, keepdims=True)
    a = jnp.exp2(states.m - jnp.where(m == -jnp.inf, 0.0, m))
    sums = [jnp.sum(a * d, axis=axis) for d in (states.d1, states.d2)]
    values = [jnp.sum(a[..., None] * o, axis=axis) for o in (states.o1, states.o2)]
    return State(jnp.squeeze(m, axis), *sums, *values)


def finish(state: State) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns (out, v_mean, lse, t_mean) of the rows; lse is in base 2.

    Rows that saw no key give out = v_mean = t_mean = 0 and lse = +inf, so that the backward pass finds p = 0.
    """
    empty = state.d1 == 0
    inverse = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, state.d1))
    t_mean = state.d2 * inverse
    v_mean = state.o1 * spread(inverse, state.o1)
    out = v_mean * spread(1.0 + t_mean, v_mean) - state.o2 * spread(inverse, state.o2)
    lse = jnp.where(empty, jnp.inf, state.m + jnp.log2(jnp.where(empty, 1.0, state.d1)))
    return out, v_mean, lse, t_mean


def backward_tile(
    s1: jax.Array,
    s2: jax.Array,
    a: jax.Array,
    c: float,
    visible: jax.Array | None,
    lse: jax.Array,
    t_mean: jax.Array,
    tau: jax.Array,
    beta: jax.Array,
    key_axis: int = -1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (w, ds1, ds2) of a tile: the combined weights and the gradients of both scores.

    With them dQ = scale ds1 K, dR = ds2 K, dK = scale ds1^T Q + ds2^T R, dV = w^T dO (paper, appendix D).

    Args:
      s1: query . key, unscaled.
      s2: probe . key.
      a: dO . value.
      c: scale * log2(e).
      visible: bool tile, or None where every key is visible.
      lse: row statistic from the forward pass, base 2.
      t_mean: row statistic from the forward pass.
      tau: row statistic rowsum(dO * out).
      beta: row statistic rowsum(dO * v_mean).
      key_axis: -1 for tiles (rows, keys), -2 for transposed tiles (keys, rows).
    """
    p = jnp.exp2(s1 * c - spread(lse, s1, key_axis))
    if visible is not None:
        p = jnp.where(visible, p, 0.0)
    u = spread(t_mean, s2, key_axis) - s2
    d = a - spread(beta, a, key_axis)
    ds1 = p * (a - spread(tau, a, key_axis) + u * d)
    return p * (1.0 + u), ds1, -p * d
