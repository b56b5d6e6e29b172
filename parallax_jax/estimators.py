"""The family that Parallax belongs to (arXiv 2605.29157, figure 1), every member made of calls of one operator.

A query is answered by a fit to the pairs (key, value) that it sees, near the query: `f(x) = b + W (x - query)` with
weights `w = exp(query . key / bandwidth)` and a ridge on W. With p = w / sum w, means E[.] and covariances under p, and
a probe that stands for the solution of the fit, the prediction at the query is

    E[v] - (1 + eta) Cov(v, k) probe        with an intercept b, which is Parallax with the probe (1 + eta) probe
    E[v k^T] probe                          without one

The solved probe is a linear system in `Cov(k, k)`, and `Cov(k, k) x = E[k] - parallax(query, x, k, value=k)`: the
operator with the keys as its values. So the system is never formed, memory is linear in length, and grouped queries,
masks and backends are the operator's.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import Mask
from parallax_jax import xla
from parallax_jax.attention import check_int32, check_operands, parallax_attention


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A member of the family.

    Attributes:
      probe: "zero", "learned" (an operand) or "solved" (the ridge regression itself).
      bandwidth: of the weights exp(query . key / bandwidth); None for sqrt(head_dim), math.inf for uniform weights.
      intercept: fit a constant beside the linear part.
      boundary: amplify the correction by 1 + eta, eta = t / (1 - t) with t = E[k - query] . probe (eq. 7). A solved
        probe has t in [0, 1); a learned one need not, which is why Parallax leaves it out.

    Raises:
      ValueError: a value that is not allowed.
    """

    probe: Literal["zero", "learned", "solved"]
    bandwidth: float | None = None
    intercept: bool = True
    boundary: bool = False

    def __post_init__(self):
        if self.probe not in ("zero", "learned", "solved"):
            raise ValueError(f"probe: must be 'zero', 'learned' or 'solved', got {self.probe!r}")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ValueError(f"bandwidth: must be above 0 or None, got {self.bandwidth!r}")
        if not self.intercept and (self.probe == "zero" or self.boundary):
            raise ValueError("intercept: without one the probe cannot be 'zero' and boundary must be False")


ESTIMATORS = {
    "softmax": Estimator("zero"),
    "parallax": Estimator("learned"),
    "lla": Estimator("solved", boundary=True),
    "value_average": Estimator("zero", math.inf),
    "affine_linear": Estimator("learned", math.inf),
    "affine_mesa": Estimator("solved", math.inf, boundary=True),
    "linear": Estimator("learned", math.inf, intercept=False),
    "mesa": Estimator("solved", math.inf, intercept=False),
}


@dataclasses.dataclass(frozen=True)
class Solver:
    """How a solved probe is found.

    Attributes:
      ridge: lambda > 0.
      scaling: "relative" adds lambda sum_j w_j to the system, as the published code does: adding a constant to all
        scores changes nothing. "absolute" adds lambda, as the papers write (eq. 3).
      method: "cg", conjugate gradients with a Jacobi preconditioner: one call of the operator per iteration, gradients
        by implicit differentiation. "exact" makes the head_dim columns of every token's system, factorises it, and is
        differentiated through: memory grows with T head_dim^2.
      max_iterations: of "cg", forward and again backward.
      tolerance: "cg" leaves a row alone once its residual is this fraction of its right-hand side.

    Raises:
      ValueError: a value that is not allowed.
    """

    ridge: float = 1.0
    scaling: Literal["relative", "absolute"] = "relative"
    method: Literal["cg", "exact"] = "cg"
    max_iterations: int = 64
    tolerance: float = 1e-6

    def __post_init__(self):
        if not 0 < self.ridge < math.inf:
            raise ValueError(f"ridge: must be above 0 and finite, got {self.ridge!r}")
        for name, allowed in (("scaling", ("relative", "absolute")), ("method", ("cg", "exact"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: must be one of {allowed}, got {getattr(self, name)!r}")
        if self.max_iterations < 1 or not self.tolerance >= 0:
            raise ValueError("max_iterations: must be 1 or more, and tolerance 0 or more")


DEFAULT_SOLVER = Solver()


def local_estimator(
    query: Float[Array, "B T N H"],
    probe: Float[Array, "B T N H"] | None,
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    estimator: str | Estimator = "lla",
    solver: Solver = DEFAULT_SOLVER,
    is_causal: bool = True,
    query_offset: int | Int[Array, ""] | None = None,
    local_window_size: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Answers every query by the fit that `estimator` names, over the keys and values it sees.

    Time grows with T S for every member, memory with T + S. Differentiable in all operands, uniform weights and solved
    probes included.

    Args:
      query: (B, T, N, H); where the fit is centred. Float dtypes as in `parallax_attention`.
      probe: (B, T, N, H) for a learned probe, else None. In linear attention it is what is usually called the query.
      key: (B, S, K, H), N divisible by K.
      value: (B, S, K, Hv).
      estimator: a name of `ESTIMATORS` ("softmax", "parallax", "lla", "value_average", "affine_linear", "affine_mesa",
        "linear", "mesa") or an `Estimator`.
      solver: for solved probes. They are solved in float32, or float64 for float64 operands.
      is_causal: this and the arguments after it are those of `parallax_attention`.
      query_offset: position of query 0 on the key axis.
      local_window_size: number of most recent keys seen.
      segment_ids: tokens see their own segment only.
      key_value_seq_lengths: keys from this index on are padding.
      implementation: backend of the operator.

    Returns:
      (B, T, N, Hv) in query's dtype.

    Raises:
      ValueError: an argument is wrong, or `probe` is missing or not wanted.
      NotImplementedError: the named implementation cannot run the call.
    """
    if isinstance(estimator, str):
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator: got {estimator!r}, allowed are {', '.join(ESTIMATORS)} and an Estimator")
        estimator = ESTIMATORS[estimator]
    if (probe is not None) != (estimator.probe == "learned"):
        raise ValueError(f"probe: estimator's probe is {estimator.probe!r}, so it must {_PROBE[probe is None]}")
    operator = _operator(query, estimator.bandwidth, is_causal, local_window_size, implementation)
    masks = _masks(query_offset, segment_ids, key_value_seq_lengths)
    if estimator.probe == "zero":
        return operator(masks, query, jnp.zeros_like(query), key, value)
    if estimator.probe == "solved":
        probe, eta = _solved_probe(operator, solver, estimator.intercept, masks, query, key)
    elif estimator.boundary:
        t = _dot(operator.mean(masks, query, key, key) - query, probe)
        eta = t / (1 - t)
    if estimator.boundary:
        probe = (1 + eta) * probe
    probe = probe.astype(query.dtype)
    out = operator(masks, query, probe, key, value)
    if not estimator.intercept:
        # E[v k^T] r = Cov(v, k) r + E[v] E[k] . r
        k_mean, v_mean = (operator.mean(masks, query, key, x) for x in (key, value))
        out = v_mean * (1 + _dot(k_mean, probe)) - out
    return out


_PROBE = {True: "not be None", False: "be None"}


def solved_probe(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    *,
    bandwidth: float | None = None,
    intercept: bool = True,
    solver: Solver = DEFAULT_SOLVER,
    is_causal: bool = True,
    query_offset: int | Int[Array, ""] | None = None,
    local_window_size: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N 1"]]:
    """The probe that the ridge regression asks for, and the amplification eta at the boundary of the keys.

    With an intercept, z = key - query and lambda the ridge per unit of weight, the probe is (E[z z^T] + lambda)^-1 E[z]
    (eq. 3); Parallax with the probe (1 + eta) probe is local linear attention, and (1 + eta) probe is
    (Cov(k, k) + lambda)^-1 E[z], the system that is solved. So it is the probe with which Parallax, given the keys as
    values, returns the query, but for the ridge. Without an intercept it is MesaNet's (E[k k^T] + lambda)^-1 query, and
    eta is 0.

    Args:
      query: (B, T, N, H).
      key: (B, S, K, H).
      bandwidth: as in `Estimator`.
      intercept: as in `Estimator`.
      solver: as in `local_estimator`, with the arguments after it.
      is_causal: see `parallax_attention`, with the arguments after it.
      query_offset: position of query 0 on the key axis.
      local_window_size: number of most recent keys seen.
      segment_ids: tokens see their own segment only.
      key_value_seq_lengths: keys from this index on are padding.
      implementation: backend of the operator.

    Returns:
      The probe, and eta >= 0; both float64 for float64 operands, else float32.
    """
    operator = _operator(query, bandwidth, is_causal, local_window_size, implementation)
    masks = _masks(query_offset, segment_ids, key_value_seq_lengths)
    return _solved_probe(operator, solver, intercept, masks, query, key)


@dataclasses.dataclass(frozen=True)
class _Operator:
    """`parallax_attention` with its static arguments; hashable."""

    scale: float
    is_causal: bool
    window: int | None
    implementation: str | None

    def __call__(self, masks, query, probe, key, value):
        options = {"scale": self.scale, "is_causal": self.is_causal, "local_window_size": self.window}
        options |= {"implementation": self.implementation, **masks}
        return parallax_attention(query, probe, key, value, **options)

    def mean(self, masks, query, key, value):
        """E[value] of every query."""
        return self(masks, query, jnp.zeros_like(query), key, value)


def _operator(query, bandwidth, is_causal, local_window_size, implementation) -> _Operator:
    scale = query.shape[-1] ** -0.5 if bandwidth is None else 1.0 / bandwidth
    return _Operator(scale, is_causal, local_window_size, implementation)


def _masks(query_offset, segment_ids, key_value_seq_lengths) -> dict[str, Any]:
    """The arrays of a mask, those that are given; a pytree, so that a derivative rule may take them."""
    if query_offset is not None:
        query_offset = check_int32("query_offset", query_offset, ())
    masks = {
        "query_offset": query_offset,
        "segment_ids": segment_ids,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    return {name: x for name, x in masks.items() if x is not None}


def _solved_probe(operator: _Operator, solver: Solver, intercept: bool, masks, query, key):
    check_operands(query, query, key, key, key_name="key", value_name="key")
    dtype = jnp.dtype("float64" if query.dtype == jnp.float64 else "float32")
    query, key = query.astype(dtype), key.astype(dtype)
    solve = _solve_exact if solver.method == "exact" else _solve_cg
    solution = solve(operator, solver, intercept, masks, query, key)
    if not intercept:
        return solution, jnp.zeros_like(solution[..., :1])
    eta = _dot(operator.mean(masks, query, key, key) - query, solution)
    return solution / (1 + eta), eta


class _System(NamedTuple):
    """The linear system of every query: `product(x)` is its matrix times x (B, T, N, H), symmetric and positive."""

    right_side: Array
    product: Callable[[Array], Array]
    diagonal: Callable[[], Array]


def _system(operator: _Operator, solver: Solver, intercept: bool, masks, query, key) -> _System:
    mean = functools.partial(operator.mean, masks, query, key)
    ridge = solver.ridge
    if solver.scaling == "absolute":
        ridge = ridge * jnp.exp(-_log_normaliser(operator, masks, query, key))[..., None]
    k_mean = mean(key)

    def product(x):
        out = k_mean - operator(masks, query, x, key, key) + ridge * x
        return out if intercept else out + k_mean * _dot(k_mean, x)

    def diagonal():
        squares = mean(key * key)
        return (jnp.maximum(squares - k_mean**2, 0) if intercept else squares) + ridge

    return _System(k_mean - query if intercept else query, product, diagonal)


def _solve_exact(operator, solver, intercept, masks, query, key):
    system = _system(operator, solver, intercept, masks, query, key)
    basis = jnp.eye(query.shape[-1], dtype=query.dtype)
    columns = jax.vmap(lambda e: system.product(jnp.broadcast_to(e, query.shape)), out_axes=-1)(basis)
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.solve(columns, system.right_side[..., None])[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _solve_cg(operator, solver, intercept, masks, query, key):
    system = _system(operator, solver, intercept, masks, query, key)
    return _conjugate_gradients(solver, system, system.right_side)


def _solve_forward(operator, solver, intercept, masks, query, key):
    solution = _solve_cg(operator, solver, intercept, masks, query, key)
    return solution, (masks, query, key, solution)


def _solve_backward(operator, solver, intercept, residuals, cotangent):
    """Implicit differentiation: A x = b gives <g, dx> = <A^-1 g, db - dA x>, A symmetric."""
    masks, query, key, solution = residuals
    adjoint = _conjugate_gradients(solver, _system(operator, solver, intercept, masks, query, key), cotangent)

    def residual(query, key):
        system = _system(operator, solver, intercept, masks, query, key)
        return system.right_side - system.product(solution)

    _, pull_back = jax.vjp(residual, query, key)
    return (None, *pull_back(adjoint))


_solve_cg.defvjp(_solve_forward, _solve_backward)


def _dot(x, y):
    return jnp.sum(x * y, axis=-1, keepdims=True)


def _conjugate_gradients(solver: Solver, system: _System, right_side):
    diagonal = system.diagonal()

    def product(x):
        # Covariances are differences of means: at unit length their rounding does not grow as the directions shrink.
        length = jnp.sqrt(_dot(x, x))
        return system.product(x / jnp.where(length > 0, length, 1)) * length

    def active(residual):
        return _dot(residual, residual) > solver.tolerance**2 * _dot(right_side, right_side)

    def unfinished(state):
        i, _, residual, *_ = state
        return (i < solver.max_iterations) & jnp.any(active(residual))

    def iterate(state):
        i, x, residual, direction, rz = state
        along = product(direction)
        curvature = _dot(direction, along)
        step = jnp.where(active(residual) & (curvature > 0), rz / jnp.where(curvature > 0, curvature, 1), 0)
        x, residual = x + step * direction, residual - step * along
        z = residual / diagonal
        new_rz = _dot(residual, z)
        direction = z + new_rz / jnp.where(rz > 0, rz, 1) * direction
        return i + 1, x, residual, direction, new_rz

    z = right_side / diagonal
    start = (jnp.int32(0), jnp.zeros_like(right_side), right_side, z, _dot(right_side, z))
    return jax.lax.while_loop(unfinished, iterate, start)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_normaliser(operator: _Operator, masks, query, key) -> Float[Array, "B T N"]:
    """log sum_j exp(scale query . key_j); 0 for a row that sees no key."""
    offset = masks.get("query_offset", jnp.int32(key.shape[1] - query.shape[1]))
    mask = Mask(offset, masks.get("key_value_seq_lengths"), masks.get("segment_ids"))
    mask = dataclasses.replace(mask, is_causal=operator.is_causal, window=operator.window)
    _, _, lse, _ = xla.forward(query, jnp.zeros_like(query), key, key, mask, scale=operator.scale, block_sizes=None)
    return jnp.moveaxis(jnp.where(jnp.isinf(lse), 0, lse) * math.log(2), 1, 2)


def _log_normaliser_forward(operator, masks, query, key):
    return _log_normaliser(operator, masks, query, key), (masks, query, key)


def _log_normaliser_backward(operator, residuals, cotangent):
    # d log sum w = scale sum_j p_j (key_j . dquery + query . dkey_j); the second is what a value's gradient sums.
    masks, query, key = residuals
    scaled = cotangent[..., None] * operator.scale
    k_mean, pull_back = jax.vjp(lambda value: operator.mean(masks, query, key, value), key)
    return None, scaled * k_mean, *pull_back(scaled * query)


_log_normaliser.defvjp(_log_normaliser_forward, _log_normaliser_backward)
