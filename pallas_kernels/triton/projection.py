"""Products of a few rows with weight matrices, one kernel each with what stands before and after them in a block.

Time is the reading of the weights, once. They are asked for before anything else, a norm of the rows is computed
while they come, and residual or gate follow the sums in registers: `project` is a whole step between two products. A
kernel starts to read when the one before has ended; so that memory does not rest meanwhile, that one asks for its
weights to be brought into the L2 cache (`ahead`).
"""

import functools
import itertools
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
      block_k: rows of a tile, a power of two >= 16.
      num_warps: warps of a program.
      num_stages: depth of the software pipeline along the weights' rows on the tensor cores; 1 holds all of a program's
        weights in registers at once, for one row of inputs.
      vector: columns that a thread loads at once, where weights are held; a power of two. Sums over the rows go from
        thread to thread column by column, so with few of them there is little to pass on; but a thread then has more
        rows, and reads as many of the inputs.
      splits: shares of the weights' rows, each of programs of its own, where weights are held and a residual follows.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    vector: int = 4
    splits: int = 1

    def share(self, depth: int) -> int:
        """Rows of a share: whole tiles."""
        return pl.cdiv(depth, self.splits * self.block_k) * self.block_k


class Stream(NamedTuple):
    """The residual stream.

    Attributes:
      x: rows.
      parts: (S, D) float32, whose sum is to be added to the only row; None where nothing is.
    """

    x: Float[Array, "B D"]
    parts: Float[Array, "S D"] | None = None

    def whole(self) -> Float[Array, "B D"]:
        """The rows with the parts added."""
        return self.x if self.parts is None else self.x + jnp.sum(self.parts, axis=0).astype(self.x.dtype)


def project(
    stream: Stream,
    weights: Sequence[Float[Array, "D _"]],
    *,
    gain: Float[Array, " D"] | None = None,
    epsilon: float = 1e-6,
    residual: Float[Array, "B N"] | None = None,
    gated: bool = False,
    ahead: Sequence[jax.Array] = (),
    launch: Launch | None = None,
) -> tuple[Float[Array, "B _"] | Stream, ...]:
    """Multiplies up to `MAX_ROWS` rows with each weight, in the dtype of the rows with float32 sums.

    Args:
      stream: rows, and what is added to them first.
      weights: cast to the dtype of the rows tile by tile.
      gain: of an RMS norm that the rows go through first; None for no norm.
      epsilon: added to the norm's mean square.
      residual: added to the product with the only weight.
      gated: the weights are gate and up projection, and the result silu(gate) * up.
      ahead: what the kernels after this one read, which a Hopper GPU brings into its L2 cache meanwhile; for one row.
      launch: None for the default.

    Returns:
      One product per weight, one in all where `gated`; then the stream with its parts added. With a residual only the
      stream that this becomes, with parts where the launch has shares.
    """
    launch = launch or _launch(stream.x.shape[0], weights, gated, residual is not None)
    if launch.num_stages > 1:
        stream = Stream(stream.whole())  # the kernel adds parts in registers only
    call = functools.partial(_project, epsilon=epsilon, gated=gated, launch=launch)
    return device.run(call, stream, gain, residual, tuple(weights), tuple(ahead))


def _launch(rows: int, weights, gated: bool, residual: bool) -> Launch:
    """One wave of programs; those for one row hold all their weights at once."""
    depth, columns = weights[0].shape[0], weights[0].shape[1] if gated else sum(w.shape[1] for w in weights)
    matrices = 2 if gated else 1
    # As many shares as fill the device: what comes next adds them up.
    splits = min(4, pl.next_power_of_2(pl.cdiv(128 * 32, columns))) if residual else 1
    share = pl.cdiv(depth, splits)
    block_n = 32 if 32 * matrices * share <= MAX_HELD else 16
    if rows > 1 or block_n * matrices * share > MAX_HELD:
        return Launch(32 if columns >= 128 * 32 else 16, 128, 4, 4)
    # As few warps as can hold them: each takes part in the sums and has its registers, by which a wave is one wave.
    num_warps = min(16, max(4, pl.next_power_of_2(block_n * matrices * share // HELD_BY_WARP)))
    # A thread adds its weights of all tiles to the sums of one, here 32, and then those.
    block_k = max(16, min(pl.next_power_of_2(share), 1024 * num_warps // block_n))
    return Launch(block_n, block_k, num_warps, 1, splits=splits)


def _kernel(
    stream: Stream, gain_ref, residual_ref, w_refs, ahead_refs, *out_refs, epsilon, gated, launch, sizes, interpret
):
    x_ref = stream.x
    out_refs, whole_ref = (out_refs, None) if stream.parts is None else (out_refs[:-1], out_refs[-1])
    number = _programs(w_refs[:1] if gated else w_refs, launch)
    program, split = lax.rem(pl.program_id(0), number), lax.div(pl.program_id(0), number)
    prefetch = None
    if x_ref.shape[0] == 1 and not interpret:
        prefetch = functools.partial(common.prefetch, ahead_refs, sizes, number * launch.splits)
    in_registers = x_ref.shape[0] == 1 and launch.num_stages == 1
    blocks = [0, *itertools.accumulate(pl.cdiv(out.shape[-1], launch.block_n) for out in out_refs)]

    def finish(out_ref, column, products, extra):
        out, *up = (product.astype(out_ref.dtype) for product in products)
        if up:
            gate = out.astype(jnp.float32)
            out = (gate / (1 + jnp.exp(-gate)) * up[0].astype(jnp.float32)).astype(out_ref.dtype)
        if extra is not None:
            out += extra
        row = split if launch.splits > 1 else column * 0
        plt.store(_tile(out_ref, row, column, out.shape), out, mask=_inside(out_ref, row, column, out.shape))

    def run(i, refs):
        """All of a program that reads weights `refs` for output i."""
        column = (program - blocks[i]) * launch.block_n
        zero = column * 0  # a start known only at run time lets a slice reach past the array, where masks hide it
        # Asked for at once, before there is anything to wait for.
        shape = (x_ref.shape[0] if in_registers else _padded_rows(x_ref), launch.block_n)
        extra = None if residual_ref is None or launch.splits > 1 else _load(residual_ref, zero, column, shape)
        if in_registers:
            held = _held(refs, program, split, column, x_ref.dtype, launch)
            products = _one_row(stream, gain_ref, held, split, program, whole_ref, epsilon, launch, prefetch, interpret)
        else:
            products = _rows(x_ref, gain_ref, refs, zero, column, epsilon, launch, prefetch)
        finish(out_refs[i], column, products, extra)

    groups = [w_refs] if gated else [(w,) for w in w_refs]
    here = lambda i: (program >= blocks[i]) & (program < blocks[i + 1])
    if len(groups) == 1:
        run(0, groups[0])
    elif not in_registers:
        for i, refs in enumerate(groups):
            pl.when(here(i))(functools.partial(run, i, refs))
    else:
        # Only loads and stores know which weight it is: what stands between them is there once.
        columns = [(program - first) * launch.block_n for first in blocks]

        def read(i):
            load = lambda: _held(groups[i], program, split, columns[i], x_ref.dtype, launch)
            return load() if i == len(groups) - 1 else lax.cond(here(i), load, lambda: read(i + 1))

        held = read(0)
        products = _one_row(stream, gain_ref, held, split, program, whole_ref, epsilon, launch, prefetch, interpret)
        for i, out_ref in enumerate(out_refs):
            pl.when(here(i))(functools.partial(finish, out_ref, columns[i], products, None))


def _programs(weights, launch: Launch) -> int:
    """Programs of a share of a product, each with `block_n` columns of one weight."""
    return sum(pl.cdiv(w.shape[1], launch.block_n) for w in weights)


def _padded_rows(x_ref) -> int:
    """Rows of a tile for the tensor cores."""
    return max(16, pl.next_power_of_2(x_ref.shape[0]))


def _inside(ref, row, column, shape: tuple[int, int], past: bool = False):
    """Bool tile of what exists of `ref` at (row, column), or None where all does; `past`: a tile may begin past it."""
    starts, mask = (row, column), None
    for axis in (0, 1):
        if ref.shape[axis] % shape[axis] or (past and axis == 0):
            index = starts[axis] + lax.broadcasted_iota(jnp.int32, shape, axis)
            mask = index < ref.shape[axis] if mask is None else mask & (index < ref.shape[axis])
    return mask


def _tile(ref, row, column, shape: tuple[int, int]):
    return ref.at[pl.ds(row, shape[0]), pl.ds(column, shape[1])]


def _load(ref, row, column, shape: tuple[int, int], past: bool = False):
    """A tile of `ref`, zero where there is nothing."""
    mask = _inside(ref, row, column, shape, past)
    return plt.load(_tile(ref, row, column, shape), mask=mask, other=None if mask is None else 0.0)


def _inverse_rms(square_sum, x_ref, epsilon):
    return lax.rsqrt(square_sum / x_ref.shape[1] + epsilon)


def _held(refs, program, split, column, dtype, launch: Launch) -> list[list[jax.Array]]:
    """A program's share of each weight, tile by tile along the rows."""
    depth = refs[0].shape[0]
    share = launch.share(depth)
    # Triton's loads are as wide as the alignment that it can prove; it cannot prove that this adds nothing.
    start = column + launch.vector * lax.div(program, 1 << 30)
    first, shape, past = split * share, (launch.block_k, launch.block_n), launch.splits * share > depth
    tile = lambda w, k: _load(w, first + k, start, shape, past).astype(dtype)
    return [[tile(w, k) for k in range(0, share, launch.block_k)] for w in refs]


def _one_row(
    stream: Stream, gain_ref, held, split, program, whole_ref, epsilon, launch: Launch, prefetch, interpret: bool
):
    """Products (1, block_n) on the plain cores: a tensor core would wait for fifteen rows that are not there."""
    depth, dtype = stream.x.shape[1], stream.x.dtype
    starts = [split * launch.share(depth) + k for k in range(0, launch.share(depth), launch.block_k)]

    def vector(ref, k, row=0):
        index = k + jnp.arange(launch.block_k)
        at = ref.at[row, index] if ref.ndim == 2 else ref.at[index]
        return plt.load(at, mask=index < depth, other=0.0).astype(jnp.float32)

    xs = [vector(stream.x, k) for k in starts]
    gains = [] if gain_ref is None else [vector(gain_ref, k) for k in starts]
    parts = []
    if stream.parts is not None:
        parts = [sum(vector(stream.parts, k, s) for s in range(stream.parts.shape[0])) for k in starts]
    if prefetch:
        zero = prefetch().astype(jnp.float32)  # of use to the compiler alone, which would drop the prefetch
    if parts:
        xs = [(x + part.astype(dtype).astype(jnp.float32)).astype(dtype) for x, part in zip(xs, parts, strict=True)]
        for k, x in zip(starts, xs, strict=True):
            index = k + jnp.arange(launch.block_k)
            plt.store(whole_ref.at[0, index], x, mask=(index < depth) & (program == 0))
        xs = [x.astype(jnp.float32) for x in xs]
    if prefetch:
        xs = [common.release_next(x + zero) for x in xs]
    if gains:
        inverse = _inverse_rms(jnp.sum(sum(x * x for x in xs)), stream.x, epsilon)
        xs = [(x * inverse * gain).astype(dtype).astype(jnp.float32) for x, gain in zip(xs, gains, strict=True)]

    def product(tiles):
        total = jnp.zeros(tiles[0].shape, jnp.float32)
        for tile, x in zip(tiles, xs, strict=True):
            total = _fma(tile, x, total, interpret)
        return jnp.sum(total, axis=0)[None]  # the threads of a program meet once

    return [product(tiles) for tiles in held]


def _fma(weights, x, total, interpret: bool):
    """total + weights * x[:, None] in float32."""
    x = jnp.broadcast_to(x[:, None], weights.shape)
    if interpret or weights.dtype != jnp.bfloat16:
        return total + weights.astype(jnp.float32) * x
    # Two instructions for a weight, where the compiler takes four.
    asm = """{
        .reg .b32 even, odd;
        shl.b32 even, $2, 16; and.b32 odd, $2, 0xffff0000;
        fma.rn.f32 $0, even, $3, $5; fma.rn.f32 $1, odd, $4, $6;
    }"""
    shape = jax.ShapeDtypeStruct(total.shape, total.dtype)
    args, constraints = [weights, x, total], "=f,=f,r,f,f,f,f"
    return plt.elementwise_inline_asm(asm, args=args, constraints=constraints, pack=2, result_shape_dtypes=[shape])[0]


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


def _project(stream: Stream, gain, residual, weights, ahead, *, epsilon, gated, launch: Launch, interpret: bool):
    shape = lambda rows, w, dtype: jax.ShapeDtypeStruct((rows, w.shape[1]), dtype)
    if launch.splits > 1:
        outs = [shape(launch.splits, weights[0], jnp.float32)]
    else:
        outs = [shape(stream.x.shape[0], w, stream.x.dtype) for w in weights[: 1 if gated else None]]
    if stream.parts is not None:
        outs.append(jax.ShapeDtypeStruct(stream.x.shape, stream.x.dtype))
    whole = jax.tree.map(lambda _: pl.BlockSpec(), (stream, gain, residual, weights))
    # Of what is read ahead the kernel takes addresses alone.
    firsts = tuple(pl.BlockSpec((1,) * x.ndim, lambda i, x=x: (0,) * x.ndim) for x in ahead)
    sizes = [w.nbytes for w in ahead]
    results = pl.pallas_call(
        functools.partial(_kernel, epsilon=epsilon, gated=gated, launch=launch, sizes=sizes, interpret=interpret),
        out_shape=tuple(outs),
        grid=(_programs(weights[:1] if gated else weights, launch) * launch.splits,),
        in_specs=(*whole, firsts),
        compiler_params=plt.CompilerParams(num_warps=launch.num_warps, num_stages=launch.num_stages),
        interpret=interpret,
        name="project",
    )(stream, gain, residual, weights, ahead)
    if residual is not None:
        return (Stream(residual, results[0]) if launch.splits > 1 else Stream(results[0]),)
    return (*results, stream) if stream.parts is None else (*results[:-1], Stream(results[-1]))
