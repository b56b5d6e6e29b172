"""Products of a few rows with weight matrices, one kernel each with what stands before and after them in a block.

Time is the reading of the weights, once. They are asked for before anything else, a norm of the rows is computed
while they come, and residual or gate follow the sums in registers: `project` is a whole step between two products. A
kernel starts to read when the one before has ended; so that memory does not rest meanwhile, that one asks for its
weights to be brought into the L2 cache (`ahead`).
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
MAX_HELD = 65536  # weights that the registers of one program hold
HELD_BY_WARP = 4096


class Launch(NamedTuple):
    """Launch of a product.

    Attributes:
      block_n: columns of a program, a power of two, on the tensor cores >= 16.
      block_k: rows of a weight that a program holds at once, a power of two >= 16.
      num_warps: warps of a program.
      num_stages: depth of the software pipeline along the weights' rows on the tensor cores; 1 holds all of a program's
        weights in registers at once, for one row of inputs.
      vector: columns that a thread loads at once, where weights are held; a power of two. Sums over the rows go from
        thread to thread column by column, so with few of them there is little to pass on; but a thread then has more
        rows, and reads as many of the inputs.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    vector: int = 4


def project(
    x: Float[Array, "B D"],
    weights: Sequence[Float[Array, "D _"]],
    *,
    gain: Float[Array, " D"] | None = None,
    epsilon: float = 1e-6,
    residual: Float[Array, "B N"] | None = None,
    gated: bool = False,
    ahead: Sequence[jax.Array] = (),
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
      ahead: what the kernels after this one read, which a Hopper GPU brings into its L2 cache meanwhile; for one row.
      launch: None for the default.

    Returns:
      One product per weight; one in all where `gated`.
    """
    launch = launch or _launch(x.shape[0], weights, gated)
    call = functools.partial(_project, epsilon=epsilon, gated=gated, launch=launch)
    return device.run(call, x, gain, residual, tuple(weights), tuple(ahead))


def _launch(rows: int, weights, gated: bool) -> Launch:
    """One wave of programs; those for one row hold all their weights at once."""
    depth, columns = weights[0].shape[0], weights[0].shape[1] if gated else sum(w.shape[1] for w in weights)
    matrices = 2 if gated else 1
    if rows > 1 or 16 * matrices * depth > MAX_HELD:
        return Launch(32 if columns >= 128 * 32 else 16, 128, 4, 4)
    # Gate and up have the most weights for their columns: with 16 of those some cores would have two programs.
    block_n = 32 if gated and columns >= 64 * 32 and 32 * matrices * depth <= MAX_HELD else 16
    # As few warps as can hold them: each takes part in the sums and has its registers, by which a wave is one wave.
    num_warps = min(16, max(4, pl.next_power_of_2(block_n * matrices * depth // HELD_BY_WARP)))
    return Launch(block_n, min(1024, pl.next_power_of_2(max(depth, 16))), num_warps, 1, 2 if gated else 4)


def _kernel(
    x_ref, gain_ref, residual_ref, w_refs, ahead_refs, *out_refs, epsilon, gated, launch, ahead_sizes, interpret: bool
):
    program, first = pl.program_id(0), 0
    prefetch = None
    if x_ref.shape[0] == 1 and not interpret:
        prefetch = functools.partial(common.prefetch, ahead_refs, ahead_sizes, _programs(out_refs, launch))
    groups = [(w_refs, out_refs[0])] if gated else [((w,), out) for w, out in zip(w_refs, out_refs, strict=True)]
    for refs, out_ref in groups:
        blocks = pl.cdiv(out_ref.shape[1], launch.block_n)

        def run(refs=refs, out_ref=out_ref, first=first):
            column = (program - first) * launch.block_n
            part = _one_row if x_ref.shape[0] == 1 and launch.num_stages == 1 else _rows
            zero = column * 0  # a start known only at run time lets a slice reach past the array, where masks hide it
            shape = (x_ref.shape[0] if part is _one_row else _padded_rows(x_ref), launch.block_n)
            # Asked for at once, before there is anything to wait for.
            extra = None if residual_ref is None else _load(residual_ref, zero, column, shape)
            # Triton's loads are as wide as the alignment that it can prove; it cannot prove that this adds nothing.
            start = column + launch.vector * lax.div(program, 1 << 30) if part is _one_row else column
            products = part(x_ref, gain_ref, refs, zero, start, epsilon, launch, prefetch)
            out, *up = (product.astype(out_ref.dtype) for product in products)
            if gated:
                gate = out.astype(jnp.float32)
                out = (gate / (1 + jnp.exp(-gate)) * up[0].astype(jnp.float32)).astype(out_ref.dtype)
            if extra is not None:
                out += extra
            plt.store(_tile(out_ref, zero, column, out.shape), out, mask=_inside(out_ref, zero, column, out.shape))

        run() if len(groups) == 1 else pl.when((program >= first) & (program < first + blocks))(run)
        first += blocks


def _programs(outs, launch: Launch) -> int:
    """Programs of a product, each with `block_n` columns of one output."""
    return sum(pl.cdiv(out.shape[1], launch.block_n) for out in outs)


def _padded_rows(x_ref) -> int:
    """Rows of a tile for the tensor cores."""
    return max(16, pl.next_power_of_2(x_ref.shape[0]))


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


def _one_row(x_ref, gain_ref, w_refs, zero, column, epsilon, launch: Launch, prefetch):
    """Products (1, block_n) on the plain cores: a tensor core would wait for fifteen rows that are not there."""
    depth, dtype = x_ref.shape[1], x_ref.dtype
    starts = range(0, depth, launch.block_k)

    def vector(ref, k):
        index = k + jnp.arange(launch.block_k)
        at = ref.at[0, index] if ref.ndim == 2 else ref.at[index]
        return plt.load(at, mask=index < depth, other=0.0).astype(jnp.float32)

    xs = [vector(x_ref, k) for k in starts]
    gains = [] if gain_ref is None else [vector(gain_ref, k) for k in starts]
    held = [
        [_load(w, zero + k, column, (launch.block_k, launch.block_n)).astype(dtype) for k in starts] for w in w_refs
    ]
    if prefetch:
        zero = prefetch().astype(jnp.float32)  # of use to the compiler alone, which would drop the prefetch
        xs = [common.release_next(x + zero) for x in xs]
    if gains:
        inverse = _inverse_rms(sum(jnp.sum(x * x) for x in xs), x_ref, epsilon)
        xs = [(x * inverse * gain).astype(dtype).astype(jnp.float32) for x, gain in zip(xs, gains, strict=True)]
    # Summed over the chunks first: the threads of a program meet once.
    products = lambda w: sum(w.astype(jnp.float32) * x[:, None] for w, x in zip(w, xs, strict=True))
    return [jnp.sum(products(w), axis=0)[None] for w in held]


def _rows(x_ref, gain_ref, w_refs, zero, column, epsilon, launch: Launch, prefetch):
    """Products (rows, block_n) on the tensor cores, the weights pipelined through shared memory."""
    depth, dtype = x_ref.shape[1], x_ref.dtype
    count, tile = pl.cdiv(depth, launch.block_k), (_padded_rows(x_ref), launch.block_k)
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

    sums = jnp.zeros((tile[0], launch.block_n))
    if prefetch:
        sums = common.release_next(sums + prefetch().astype(jnp.float32))
    return lax.fori_loop(0, count, step, (sums,) * len(w_refs))


def _project(x, gain, residual, weights, ahead, *, epsilon, gated, launch: Launch, interpret: bool):
    outs = tuple(jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype) for w in weights[: 1 if gated else None])
    whole = jax.tree.map(lambda _: pl.BlockSpec(), (x, gain, residual, weights))
    sizes = [w.nbytes for w in ahead]
    return pl.pallas_call(
        functools.partial(_kernel, epsilon=epsilon, gated=gated, launch=launch, ahead_sizes=sizes, interpret=interpret),
        out_shape=outs,
        grid=(_programs(outs, launch),),
        in_specs=(*whole, tuple(pl.BlockSpec((1,) * w.ndim, lambda i, w=w: (0,) * w.ndim) for w in ahead)),
        compiler_params=plt.CompilerParams(num_warps=launch.num_warps, num_stages=launch.num_stages),
        interpret=interpret,
        name="project",
    )(x, gain, residual, weights, ahead)
