"""The algorithm of Parallax attention on one tile, stated once; every backend calls these functions.

A tile is a block of query rows against a block of keys, for one head. With softmax weights `p`, probe scores
`t = probe . key` (unscaled) and `t_mean = sum_j p_j t_j`, the output is `sum_j p_j (1 - t_j + t_mean) v_j`
(Parallax, arXiv 2605.29157, eq. 8), which equals `v_mean - sum_j p_j (t_j - t_mean) v_j`.

Everything is float32 (or wider). Scores are in base 2: `c = scale * log2(e)`, `p = 2^(c s1 - lse)`. Row statistics
have the tile's shape without the key axis; leading batch axes are allowed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)


class State(NamedTuple):
    """What the forward pass carries along the keys: a streaming mean of t and v, and their streaming covariance.

    The covariance is kept relative to the running t_mean, so that the terms which cancel in the output never meet: a
    part that all keys share, an attention sink, or one dominant key costs no precision in low-precision products.

    Attributes:
      m: (rows,) running maximum of the base-2 scores; -inf while no key has been seen.
      d1: (rows,) sum of 2^(s - m).
      t_mean: (rows,) mean of t under the weights so far.
      o1: (rows, Hv) sum of 2^(s - m) v.
      o2: (rows, Hv) sum of 2^(s - m) (t - t_mean) v. Softmax attention has neither o2 nor t_mean.
    """

    m: jax.Array
    d1: jax.Array
    t_mean: jax.Array | None
    o1: jax.Array
    o2: jax.Array | None


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
    """Moves a scale that is not positive into the scores: `update` takes the maximum before it scales."""
    if c == 0:
        return jnp.zeros_like(s1), 1.0
    return (-s1, -c) if c < 0 else (s1, c)


def initial_state(rows: tuple[int, ...], value_dim: int, dtype=jnp.float32) -> State:
    """The state before any key."""
    stat = jnp.zeros(rows, dtype)
    values = jnp.zeros((*rows, value_dim), dtype)
    return State(jnp.full(rows, -jnp.inf, dtype), stat, stat, values, values)


def softmax_weights(
    m: jax.Array, s1: jax.Array, c: float, visible: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Moves the running maximum m over one tile of keys: the half of `update` that needs s1 alone.

    Returns:
      The new maximum (rows,), the factor (rows,) for the old sums, and the weights 2^(s - m) (rows, keys).
    """
    s1, c = positive_scale(s1, c)
    if visible is not None:
        s1 = jnp.where(visible, s1, -jnp.inf)
    m_new = jnp.maximum(m, jnp.max(s1, axis=-1) * c)
    return m_new, factor(m, m_new), jnp.exp2(s1 * c - spread(_finite(m_new), s1))


def _finite(m: jax.Array) -> jax.Array:
    """The maximum m, 0 for rows that saw no key."""
    return jnp.where(m == -jnp.inf, 0.0, m)


def factor(m: jax.Array, m_new: jax.Array) -> jax.Array:
    """What sums are to be multiplied with when the maximum m grows."""
    return jnp.exp2(m - _finite(m_new))


def _nonzero(d1: jax.Array) -> jax.Array:
    """d1 as a denominator: 1 for rows that saw no key."""
    return jnp.where(d1 == 0, 1.0, d1)


def sums(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of two tiles over the key axis."""
    return jnp.sum(x, axis=-1), jnp.sum(y, axis=-1)


def weigh_rows(
    m: jax.Array,
    d1: jax.Array,
    t_mean: jax.Array,
    s1: jax.Array,
    s2: jax.Array,
    c: float,
    visible: jax.Array | None,
    sums: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] = sums,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array, jax.Array, jax.Array]:
    """`weigh` without the sums over values: (m, d1, t_mean) moved, the factor for these sums, p and p (t - t_mean)."""
    m, a, p = softmax_weights(m, s1, c, visible)
    old = a * d1
    p_sum, t_sum = sums(p, p * s2)
    d1 = old + p_sum
    t_mean = (old * t_mean + t_sum) / _nonzero(d1)
    return (m, d1, t_mean), a, p, p * (s2 - spread(t_mean, s2))


def move_values(o1: jax.Array, o2: jax.Array, a: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums over values for a new maximum, the old one times the factor a, and for t_mean that fell by `moved`."""
    o1 = spread(a, o1) * o1
    return o1, spread(a, o2) * o2 + spread(moved, o1) * o1


def weigh(
    state: State,
    s1: jax.Array,
    s2: jax.Array,
    c: float,
    visible: jax.Array | None,
    sums: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] = sums,
) -> tuple[State, jax.Array, jax.Array]:
    """The first half of `update`: the state moved to the tile's maximum and mean, and the weights p and p (t - t_mean).

    What is left to do is to add the products of these weights with the tile's values to o1 and o2. `sums` may be a
    kernel's own version of the function of that name.
    """
    rows, a, p, p2 = weigh_rows(state.m, state.d1, state.t_mean, s1, s2, c, visible, sums)
    return State(*rows, *move_values(state.o1, state.o2, a, state.t_mean - rows[2])), p, p2


def weigh_softmax(state: State, s1: jax.Array, c: float, visible: jax.Array | None) -> tuple[State, jax.Array]:
    """`weigh` without a probe: the state and the weights p."""
    m, a, p = softmax_weights(state.m, s1, c, visible)
    return State(m, a * state.d1 + jnp.sum(p, axis=-1), None, spread(a, state.o1) * state.o1, None), p


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
      times_value: multiplies float32 weights (rows, keys) with the tile's values (keys, Hv), in float32.
    """
    state, p, p2 = weigh(state, s1, s2, c, visible)
    return state._replace(o1=state.o1 + times_value(p), o2=state.o2 + times_value(p2))


def from_fixed_centre(
    m: jax.Array, d1: jax.Array, d2: jax.Array, o1: jax.Array, o2: jax.Array, centre: jax.Array
) -> State:
    """The state from sums over t - centre, centre fixed: d2 = sum 2^(s - m) (t - centre), o2 the same times v."""
    shift = d2 / _nonzero(d1)
    return State(m, d1, centre + shift, o1, o2 - spread(shift, o1) * o1)


def merge_rows(
    m: Sequence[jax.Array], d1: Sequence[jax.Array], t_mean: Sequence[jax.Array | None]
) -> tuple[tuple[jax.Array, jax.Array, jax.Array | None], list[jax.Array]]:
    """`merge` without the sums over values: (m, d1, t_mean) of all and the factor of each one's sums."""
    most = functools.reduce(jnp.maximum, m)
    factors = [factor(x, most) for x in m]
    total = lambda terms: functools.reduce(jnp.add, terms)
    shares = [f * x for f, x in zip(factors, d1, strict=True)]
    sum_d1 = total(shares)
    if t_mean[0] is None:
        return (most, sum_d1, None), factors
    return (most, sum_d1, total(x * t for x, t in zip(shares, t_mean, strict=True)) / _nonzero(sum_d1)), factors


def merge(states: Sequence[State]) -> State:
    """The state of rows from their states over disjoint keys, in any order: merging is associative.

    m is the largest, and with a = 2^(m_i - m) the merged d1 is sum a d1_i, t_mean is sum a d1_i t_mean_i / d1, o1 is
    sum a o1_i, o2 is sum a (o2_i + (t_mean_i - t_mean) o1_i).
    """
    rows, factors = merge_rows(*zip(*((x.m, x.d1, x.t_mean) for x in states), strict=True))
    total = lambda terms: functools.reduce(jnp.add, terms)
    if states[0].o2 is None:
        return State(*rows, total(spread(a, x.o1) * x.o1 for x, a in zip(states, factors, strict=True)), None)
    sums = [move_values(x.o1, x.o2, a, x.t_mean - rows[2]) for x, a in zip(states, factors, strict=True)]
    return State(*rows, *map(total, zip(*sums, strict=True)))


def merged_output(states: State) -> jax.Array:
    """The output of rows from states that are stacked along axis 0: `finish(merge(...))` with one sum over values.

    Rows that saw no key give 0.
    """
    m = jnp.max(states.m, axis=0)
    a = factor(states.m, m)
    share = a * (1.0 / _nonzero(jnp.sum(a * states.d1, axis=0)))
    if states.o2 is None:
        return jnp.sum(share[..., None] * states.o1, axis=0)
    t_mean = jnp.sum(share * states.d1 * states.t_mean, axis=0)
    own = share * (1.0 - (states.t_mean - t_mean))
    return jnp.sum(own[..., None] * states.o1 - share[..., None] * states.o2, axis=0)


def output(states: Sequence[State]) -> jax.Array:
    """The output of rows from their states over disjoint keys: `finish(merge(states))` where nothing waits for t_mean.

    With a as in `merge` and u the first state's t_mean, it is
    (sum a_i (o1_i - o2_i - (t_mean_i - u) o1_i) + sum a_i o1_i sum a_i d1_i (t_mean_i - u) / d1) / d1. What cancels if
    u is not near the mean is float32, like t. Rows that saw no key give 0.
    """
    m = functools.reduce(jnp.maximum, [x.m for x in states])
    total = lambda terms: functools.reduce(jnp.add, terms)
    factors = [factor(x.m, m) for x in states]
    shares = [a * x.d1 for a, x in zip(factors, states, strict=True)]
    inverse = 1.0 / _nonzero(total(shares))
    o1 = [spread(a, x.o1) * x.o1 for a, x in zip(factors, states, strict=True)]
    sum_o1 = total(o1)
    if states[0].o2 is None:
        return sum_o1 * spread(inverse, sum_o1)
    apart = [x.t_mean - states[0].t_mean for x in states]
    o2 = total(spread(a, x.o2) * x.o2 + spread(d, y) * y for a, d, x, y in zip(factors, apart, states, o1, strict=True))
    mean = total(x * d for x, d in zip(shares, apart, strict=True)) * inverse
    return (sum_o1 - o2 + spread(mean, sum_o1) * sum_o1) * spread(inverse, sum_o1)


def finish(state: State) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Returns (out, v_mean, lse, t_mean) of the rows; lse is in base 2.

    Rows that saw no key give out = v_mean = t_mean = 0 and lse = +inf, so that the backward pass finds p = 0.
    """
    empty = state.d1 == 0
    inverse = jnp.where(empty, 0.0, 1.0 / _nonzero(state.d1))
    v_mean = state.o1 * spread(inverse, state.o1)
    lse = jnp.where(empty, jnp.inf, state.m + jnp.log2(_nonzero(state.d1)))
    if state.o2 is None:
        return v_mean, v_mean, lse, None
    out = v_mean - state.o2 * spread(inverse, state.o2)
    return out, v_mean, lse, jnp.where(empty, 0.0, state.t_mean)


def backward_weights(
    s1: jax.Array, c: float, visible: jax.Array | None, lse: jax.Array, key_axis: int = -1
) -> jax.Array:
    """Softmax weights p of a tile from the forward pass's lse: the part of `backward_tile` that needs s1 alone."""
    p = jnp.exp2(s1 * c - spread(lse, s1, key_axis))
    return p if visible is None else jnp.where(visible, p, 0.0)


def combined_weights(p: jax.Array, s2: jax.Array, t_mean: jax.Array, key_axis: int = -1) -> jax.Array:
    """w = p (1 + t_mean - t), by which the output weighs the values."""
    return p + p * (spread(t_mean, s2, key_axis) - s2)


def score_gradients(
    p: jax.Array, w: jax.Array, a: jax.Array, tau: jax.Array, beta: jax.Array, key_axis: int = -1
) -> tuple[jax.Array, jax.Array]:
    """Returns (ds1, ds2) of a tile from its two kinds of weights, its a = dO . value and the row statistics."""
    d = a - spread(beta, a, key_axis)
    return w * d + p * spread(beta - tau, p, key_axis), -p * d


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
    p = backward_weights(s1, c, visible, lse, key_axis)
    w = combined_weights(p, s2, t_mean, key_axis)
    return w, *score_gradients(p, w, a, tau, beta, key_axis)
