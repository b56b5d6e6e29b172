"""The maths of `pallas_kernels.tiles` in the Triton language: the same names, arguments and results.

The state (m, d1, t_mean, o1, o2) is that of `pallas_kernels.tiles.State`; `call` is a `common.Call`.
"""

import triton
import triton.language as tl


@triton.jit
def dot(x, y, call: tl.constexpr):
    """x @ y with a float32 result."""
    return tl.dot(x, y, input_precision=call.precision)


@triton.jit
def add_dot(x, y, total, call: tl.constexpr):
    """total + x @ y in float32, x rounded to y's dtype."""
    return tl.dot(x.to(y.dtype), y, total, input_precision=call.precision)


@triton.jit
def stack(x, y):
    """Two (rows, n) tiles as one (2 rows, n). In a tensor core's layout a thread holds both: nothing moves."""
    return tl.join(x, y).permute(2, 0, 1).reshape(2 * x.shape[0], x.shape[1])


@triton.jit
def unstack(x):
    """The two halves of `stack`."""
    return tl.split(x.reshape(2, x.shape[0] // 2, x.shape[1]).permute(1, 2, 0))


@triton.jit
def beside(x, y):
    """Two (rows, n) tiles as one (rows, 2 n)."""
    return tl.join(x, y).permute(0, 2, 1).reshape(x.shape[0], 2 * x.shape[1])


@triton.jit
def apart(x):
    """The two halves of `beside`."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def nonzero(d1):
    """d1 as a denominator: 1 for rows that saw no key."""
    return tl.where(d1 == 0, 1.0, d1)


@triton.jit
def initial_state(rows: tl.constexpr, width: tl.constexpr):
    """The state before any key."""
    stat = tl.zeros([rows], tl.float32)
    values = tl.zeros([rows, width], tl.float32)
    return tl.full([rows], float("-inf"), tl.float32), stat, stat, values, values


@triton.jit
def add_values(state, p, p2, v, call: tl.constexpr):
    """The other half of `pallas_kernels.tiles.update`: the products of the weights with the tile's values."""
    m, d1, t_mean, o1, o2 = state
    return m, d1, t_mean, add_dot(p, v, o1, call), add_dot(p2, v, o2, call)


@triton.jit
def _add_pairs(x1, y1, x2, y2):
    return x1 + x2, y1 + y2


@triton.jit
def sums(x, y):
    """Sums of two tiles over the key axis, for which warps that share rows meet once."""
    return tl.reduce((x, y), 1, _add_pairs)


@triton.jit
def sums_in_threads(x):
    """Sums of a tile over every eighth key, (rows, 8): in a tensor core's layout no thread needs another's numbers."""
    return tl.sum(x.reshape(x.shape[0], x.shape[1] // 8, 8), 1)


@triton.jit
def softmax_weights(m, s1, visible, call: tl.constexpr):
    """The tile's new maximum, the factor for the old sums and the weights 2^(s - m)."""
    if call.scores_first:
        s1 = s1 * call.c
    if visible is not None:
        s1 = tl.where(visible, s1, float("-inf"))
    m_new = tl.maximum(m, tl.max(s1, 1) * call.positive_c)
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, tl.exp2(m - m_finite), tl.exp2(s1 * call.positive_c - m_finite[:, None])


@triton.jit
def weigh(state, s1, s2, visible, call: tl.constexpr):
    """The state moved to the tile's maximum and mean, and the weights p and p (t - t_mean)."""
    m, d1, t_mean, o1, o2 = state
    m_new, a, p = softmax_weights(m, s1, visible, call)
    old = a * d1
    p_sum, t_sum = sums(p, p * s2)
    d1 = old + p_sum
    t_new = (old * t_mean + t_sum) / nonzero(d1)
    o1 = o1 * a[:, None]
    o2 = o2 * a[:, None] + (t_mean - t_new)[:, None] * o1
    return (m_new, d1, t_new, o1, o2), p, p * (s2 - t_new[:, None])


@triton.jit
def from_fixed_centre(m, d1, d2, o1, o2, centre):
    """The state from sums over t - centre: d2 = sum 2^(s - m) (t - centre), o2 the same times v."""
    shift = d2 / nonzero(d1)
    return m, d1, centre + shift, o1, o2 - shift[:, None] * o1


@triton.jit
def merged_output(m, d1, t_mean, o1, o2):
    """`tiles.merged_output` of the states of one row."""
    m_all = tl.max(m, 0)
    a = tl.exp2(m - tl.where(m_all == float("-inf"), 0.0, m_all))
    share = a * (1.0 / nonzero(tl.sum(a * d1, 0)))
    own = share * (1.0 - (t_mean - tl.sum(share * d1 * t_mean, 0)))
    return tl.sum(own[:, None] * o1 - share[:, None] * o2, 0)


@triton.jit
def finish(state):
    """(out, v_mean, lse, t_mean) of the rows."""
    m, d1, t_mean, o1, o2 = state
    inverse = tl.where(d1 == 0, 0.0, 1.0 / nonzero(d1))
    v_mean = o1 * inverse[:, None]
    out = v_mean - o2 * inverse[:, None]
    lse = tl.where(d1 == 0, float("inf"), m + tl.log2(nonzero(d1)))
    return out, v_mean, lse, tl.where(d1 == 0, 0.0, t_mean)


@triton.jit
def backward_weights(s1, lse, visible, call: tl.constexpr):
    """Softmax weights p of a tile from the forward pass's lse, spread along the keys."""
    p = tl.exp2(s1 * call.c - lse)
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    return p


@triton.jit
def combined_weights(p, s2, t_mean):
    """w = p (1 + t_mean - t), by which the output weighs the values."""
    return p + p * (t_mean - s2)


@triton.jit
def score_gradients(p, w, a, tau, beta):
    """(ds1, ds2) of a tile from its two kinds of weights, a = dO . value and the row statistics."""
    d = a - beta
    return w * d + p * (beta - tau), -p * d
