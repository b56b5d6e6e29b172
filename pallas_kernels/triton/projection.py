"""Products of a few rows with weight matrices, one kernel each with what stands before and after them in a block.

Time is the reading of the weights, once. They are asked for before anything else, a norm of the rows is computed
while they come, and residual or gate follow the sums in registers: `project` is a whole step between two products.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels import device, tiles
from pallas_kernels.triton import common

MAX_ROWS = 64  # one tile; with more, products are no longer the reading of weights


class Launch(NamedTuple):
    """Launch of a product.

    Attributes:
      block_n: columns of a program, a power of two >= 16.
      block_k: rows of a weight that a program holds at once, a power of two >= 16.
      num_warps: warps of a program.
      num_stages: depth of the software pipeline along the weights' rows, where there are several rows of inputs.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def project(
    x: Float[Array, "B D"],
    weights: Sequence[Float[Array, "D _"]],
    *,
    gain: Float[Array, " D"] | None = None,
    epsilon: float = 1e-6,
    residual: Float[Array, "B N"] | None = None,
    gated: bool = False,
    launch: Launch | None = None,
) -> tuple[Float[Array, "B _"], ...]:
    """Multiplies up to `MAX_ROWS` rows with each weight, in the dtype of `x` with float32 sums.

    Args:
      x: rows.
      weights: cast to the dtype of `x` tile by tile.
      gain: of an RMS norm that `x` goes through first; None for no norm.
      epsilon: added to the norm's mean square.
      residual: added to the product with the only weight.
      gated: the weights are gate and up projection, and the result silu(gate) * up.
      launch: None for the default.

    Returns:
      One product per weight; one in all where `gated`.
    """
    launch = launch or _launch(x.shape[0], weights, gated)
    call = functools.partial(_project, epsilon=epsilon, gated=gated, launch=launch)
    return device.run(call, x, gain, residual, tuple(weights))


def _launch(rows: int, weights, gated: bool) -> Launch:
    """Enough programs for every core, each with all its weights in flight at once."""
    depth, columns = weights[0].shape[0], weights[0].shape[1] if gated else sum(w.shape[1] for w in weights)
    block_n = 32 if columns >= 128 * 32 else 16
    if rows > 1:
        return Launch(block_n, 128, 4, 4)
    block_k = min(1024, pl.next_power_of_2(max(depth, 16)))
    held = block_n * depth * (2 if gated else 1)
    return Launch(block_n, block_k, 8 if held > 16384 else 4, 1)


def _kernel(x_ref, gain_ref, residual_ref, w_refs, *out_refs, epsilon, gated, launch: Launch, interpret: bool):
    program, first = pl.program_id(0), 0
    for refs, out_ref in [(w_refs, out_refs[0])] if gated else zip(((w,) for w in w_refs), out_refs, strict=True):
        blocks = pl.cdiv(out_ref.shape[1], launch.block_n)

        @pl.when((program >= first) & (program < first + blocks))
        def _(refs=refs, out_ref=out_ref, first=first):
            column = (program - first) * launch.block_n
            part = _one_row if x_ref.shape[0] == 1 else _rows
            zero = column * 0  # a start known only at run time lets a slice reach past the array, where masks hide it
            products = part(x_ref, gain_ref, refs, zero, column, epsilon, launch, interpret)
            out, *up = (product.astype(out_ref.dtype) for product in products)
            if gated:
                gate = out.astype(jnp.float32)
                out = (gate / (1 + jnp.exp(-gate)) * up[0].astype(jnp.float32)).astype(out_ref.dtype)
            if residual_ref is not None:
                out += _load(residual_ref, zero, column, out.shape)
            plt.store(_tile(out_ref, zero, column, out.shape), out, mask=_inside(out_ref, zero, column, out.shape))

        first += blocks


def _inside(ref, row, column, shape: tuple[int, int]):
    """Bool tile of what exists of `ref` at (row, column), or None where all does."""
    starts, mask = (row, column), None
    for axis in (0, 1):
        if ref.shape[axis] % shape[axis]:
            index = starts[axis] + lax.broadcasted_iota(jnp.int32, shape, axis)
            mask = index < ref.shape[axis] if mask is None else mask & (index < ref.shape[axis])
    return mask


def _tile(ref, row, column, shape: tuple[int, int]):
    return ref.at[pl.ds(row, shape[0]), pl.ds(column, shape[1])]


def _load(ref, row, column, shape: tuple[int, int]):
    """A tile of `ref`, zero where there is nothing."""
    mask = _inside(ref, row, column, shape)
    return plt.load(_tile(ref, row, column, shape), mask=mask, other=None if mask is None else 0.0)


def _inverse_rms(square_sum, x_ref, epsilon):
    return (square_sum / x_ref.shape[1] + epsilon) ** -0.5


def _one_row(x_ref, gain_ref, w_refs, zero, column, epsilon, launch: Launch, interpret: bool):
    """Products (1, block_n) on the plain cores: a tensor core would wait for fifteen rows that are not there."""
    depth, dtype = x_ref.shape[1], x_ref.dtype
    starts = range(0, depth, launch.block_k)
    held = [
        [_load(w, zero + k, column, (launch.block_k, launch.block_n)).astype(dtype) for k in starts] for w in w_refs
    ]

    def vector(ref, k):
        index = k + jnp.arange(launch.block_k)
        at = ref.at[0, index] if ref.ndim == 2 else ref.at[index]
        return plt.load(at, mask=index < depth, other=0.0).astype(jnp.float32)

    xs = [vector(x_ref, k) for k in starts]
    if not interpret:
        xs = [common.release_next(x) for x in xs]
    if gain_ref is not None:
        inverse = _inverse_rms(sum(jnp.sum(x * x) for x in xs), x_ref, epsilon)
        xs = [
            (x * inverse * vector(gain_ref, k)).astype(dtype).astype(jnp.float32)
            for x, k in zip(xs, starts, strict=True)
        ]
    products = lambda w: [jnp.sum(w.astype(jnp.float32) * x[:, None], axis=0) for w, x in zip(w, xs, strict=True)]
    return [sum(products(w))[None] for w in held]


def _rows(x_ref, gain_ref, w_refs, zero, column, epsilon, launch: Launch, interpret: bool):
    """Products (rows, block_n) on the tensor cores, the weights pipelined through shared memory."""
    depth, dtype = x_ref.shape[1], x_ref.dtype
    count, tile = pl.cdiv(depth, launch.block_k), (max(16, pl.next_power_of_2(x_ref.shape[0])), launch.block_k)
    inputs = lambda k: _load(x_ref, zero, k, tile).astype(jnp.float32)
    if gain_ref is not None:
        square = lambda i, total: total + jnp.sum(inputs(i * launch.block_k) ** 2, axis=1)
        total = lax.fori_loop(0, count, square, jnp.zeros(tile[0], jnp.float32))
        inverse = lax.broadcast_in_dim(_inverse_rms(total, x_ref, epsilon), tile, (0,))

    def step(i, sums):
        k = i * launch.block_k
        x = inputs(k)
        if gain_ref is not None:
            index = k + jnp.arange(launch.block_k)
            gain = plt.load(gain_ref.at[index], mask=index < depth, other=0.0).astype(jnp.float32)
            x = x * inverse * lax.broadcast_in_dim(gain, tile, (1,))
        x = x.astype(dtype)
        precision = tiles.dot_precision(dtype)
        held = (_load(w, k, column, (launch.block_k, launch.block_n)).astype(dtype) for w in w_refs)
        return tuple(total + common.dot(x, w, precision) for total, w in zip(sums, held, strict=True))

    return lax.fori_loop(0, count, step, tuple(jnp.zeros((tile[0], launch.block_n)) for _ in w_refs))


def _project(x, gain, residual, weights, *, epsilon, gated, launch: Launch, interpret: bool):
    widths = [w.shape[1] for w in weights[: 1 if gated else None]]
    return pl.pallas_call(
        functools.partial(_kernel, epsilon=epsilon, gated=gated, launch=launch, interpret=interpret),
        out_shape=tuple(jax.ShapeDtypeStruct((x.shape[0], width), x.dtype) for width in widths),
        grid=(sum(pl.cdiv(width, launch.block_n) for width in widths),),
        compiler_params=plt.CompilerParams(num_warps=launch.num_warps, num_stages=launch.num_stages),
        interpret=interpret,
        name="project",
    )(x, gain, residual, weights)
