"""What the Hopper kernels share: launch, tiles in registers and shared memory, turns, masks and ranges of blocks.

Every kernel runs two warpgroups that compute, each on its own 64 rows (or keys), and one that copies the tiles both of
them read into a ring of slots in shared memory. In the forward pass the two take turns on the tensor cores, so that the
elementwise work of one runs under the products of the other.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks, device, tiles

BLOCK = 64  # rows and keys of a tile: 128 keys do not fit the registers of a warpgroup
GROUPS = 2  # computing warpgroups
MULTIPROCESSORS = device.HOPPER_CORES
WIDTHS = 64, 128  # of heads and values
LINE = 64  # columns of 16 bits that lie in a row in shared memory
SWIZZLE = plgpu.TilingTransform((8, LINE)), plgpu.SwizzleTransform(2 * LINE)  # how tiles lie there
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24  # of a thread; the most that three warpgroups can share


def unsupported_device() -> str | None:
    """Why the kernels cannot run on the device traced for, or None; on a CPU they are interpreted."""
    platform, kind = device.target()
    if platform == "cpu" or any(name in kind for name in device.HOPPER):
        return None
    return f"implementation: needs a Hopper GPU (wgmma), got {kind}"


def is_interpreted() -> bool:
    """On a CPU the kernels run in Pallas' interpreter. Decided by the device traced for: its callbacks are ordered, and
    JAX cannot choose between branches with and without ordered effects when it lowers."""
    return device.target()[0] == "cpu"


def launch(name: str, num_items: int, interpret: bool) -> dict:
    """What all the kernels pass to `plgpu.kernel`."""
    return dict(
        grid=(num_items,),
        grid_names=("item",),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )


@dataclasses.dataclass(frozen=True)
class Order:
    """In which order programs start: chunk by chunk of heads, and in a chunk the first block of all heads first.

    It decides what programs that run together find in the cache (docs/results/mosaic_gpu.md).

    Attributes:
      num_heads: heads, of all sequences.
      num_blocks: programs of a head.
      chunk: heads of a chunk.
      last: the last chunk has at least so many.
      alternate: the programs of every other chunk go the other way.
    """

    num_heads: int
    num_blocks: int
    chunk: int
    last: int = 1
    alternate: bool = False

    def at(self, item):
        """(head, block, whether it goes the other way) of the program that starts then; each head's blocks in order."""
        num_chunks = max(1, (self.num_heads - self.last) // self.chunk + 1)
        chunk = jnp.minimum(lax.div(item, self.chunk * self.num_blocks), num_chunks - 1)
        first = chunk * self.chunk
        count = jnp.where(chunk == num_chunks - 1, self.num_heads - first, self.chunk)
        item -= first * self.num_blocks
        other_way = lax.rem(chunk, 2) == 1 if self.alternate else False
        return first + lax.rem(item, count), lax.div(item, count), other_way


def swizzled(rows: int, columns: int, tiles: int, *, dtype) -> plgpu.SMEM:
    """Tiles in shared memory, laid out for matrix instructions."""
    return plgpu.SMEM((tiles, rows, columns), dtype, transforms=SWIZZLE)


def ring(stages: int, copies: int = 1) -> dict:
    """Barriers of a ring of slots: `ready` once its copies have landed, `free` once both warpgroups have read it."""
    return dict(
        ready=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    )


def ring_slot(step: jax.Array, stages: int) -> jax.Array:
    """The slot of a step >= 0."""
    return step & (stages - 1) if stages & (stages - 1) == 0 else lax.rem(step, stages)


def drain(free, steps, stages: int) -> None:
    """Waits for the last use of every slot: no barrier may be left with an arrival that nobody has seen."""

    def wait(step, _):
        plgpu.barrier_wait(free.at[ring_slot(step, stages)])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)


class Turns:
    """The two warpgroups' turns on the tensor cores, strictly one after the other."""

    def __init__(self, barriers, group: jax.Array):
        self._barriers, self._group = barriers, group
        pl.when(group == 0)(lambda: plgpu.barrier_arrive(barriers.at[0]))

    def take(self) -> None:
        """Waits until the other warpgroup has passed the turn."""
        plgpu.barrier_wait(self._barriers.at[self._group])

    def give(self) -> None:
        """Passes the turn."""
        plgpu.barrier_arrive(self._barriers.at[1 - self._group])

    def end(self) -> None:
        """Sees the last turn that was passed."""
        pl.when(self._group == 0)(self.take)


def zeros(columns: int) -> jax.Array:
    """A (64, columns) tile of registers."""
    return plgpu.layout_cast(jnp.zeros((BLOCK, columns), jnp.float32), plgpu.Layout.WGMMA)


def accumulators(*columns: int) -> list:
    """Accumulators of matrix instructions, for `pl.run_scoped`."""
    return [plgpu.ACC((BLOCK, n), jnp.float32) for n in columns]


def read(*accumulator, pending: int | None = 0):
    """Values of accumulators once at most `pending` products are under way; None reads without waiting.

    The barrier keeps the compiler from moving their use above the wait, which it cannot see as their cause.
    """
    values = [plgpu.wgmma_accumulator_load(x, wait_n=pending) for x in accumulator]
    values = lax.optimization_barrier(values)
    return values[0] if len(values) == 1 else values


def assign(accumulator, value: jax.Array, interpret: bool) -> None:
    """accumulator[...] = value."""
    if interpret:  # Pallas' interpreter keeps accumulators as plain buffers and does not know their store
        jax.ref.swap(accumulator, ..., value)
    else:
        accumulator[...] = value


def start_product(accumulator, a, b, interpret: bool) -> None:
    """Starts accumulator = a @ b^T, with a and b in shared memory."""
    assign(accumulator, zeros(accumulator.shape[1]), interpret)
    plgpu.wgmma(accumulator, a, b.transpose((1, 0)))


def add_product(accumulator, a: jax.Array, b, interpret: bool) -> None:
    """Starts accumulator += a @ b, with a in registers."""
    if interpret:  # Pallas' interpreter takes operands in shared memory only
        product = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        jax.ref.swap(accumulator, ..., plgpu.wgmma_accumulator_load(accumulator) + product)
    else:
        plgpu.wgmma(accumulator, a, b)


def add_to(destination, source, is_first: jax.Array, interpret: bool) -> None:
    """Starts destination += source, from shared to global memory, or destination = source if nobody came before."""
    if interpret:  # Pallas' interpreter does not know sums in memory

        @pl.when(is_first)
        def _store():
            destination[...] = source[...]

        @pl.when(~is_first)
        def _add():
            destination[...] = destination[...] + source[...]

    else:
        plgpu.copy_smem_to_gmem(source, destination, predicate=is_first)
        plgpu.copy_smem_to_gmem(source, destination, predicate=is_first ^ True, reduction_op="add")


def row_layout(axis: int) -> plgpu.Layout:
    """Layout of a vector that runs along `axis` of a tile."""
    return plgpu.Layout.WGMMA.reduce(1 - axis)


def sums_in_threads(x: jax.Array) -> jax.Array:
    """Adds up the keys that each thread holds: (64, keys) -> (64, 8). The threads' sums are added once, at the end."""
    parts = [lax.slice(x, (0, i), (x.shape[0], i + 8)) for i in range(0, x.shape[1], 8)]
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def pad_rows(*arrays: jax.Array, multiple: int = 8) -> list[jax.Array]:
    """Pads axis 1 with zeros, by default to whole rows of a swizzled tile in memory; often there is nothing to do."""
    return [jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0))) for x in arrays]


def hidden_zero(block: jax.Array) -> jax.Array:
    """0 that the compiler cannot see: addresses made with it stay in the loop over blocks, registers are scarce."""
    return lax.shift_right_arithmetic(block, 25)  # 2^25 blocks of 64 are more rows or keys than an int32 counts


def _some_work(bounds: blocks.Bounds, num_blocks: int) -> blocks.Bounds:
    """At least one block, if only to find that nothing in it is visible: the kernels' loops need no empty case."""
    first = jnp.minimum(bounds.first, num_blocks - 1)
    return bounds._replace(first=first, last=jnp.maximum(bounds.last, first + 1))


class Visit(NamedTuple):
    """Row blocks [first, last) that a block of keys visits.

    Attributes:
      first: the first row block.
      done: no later keys visit those before it.
      full_first: from here on,
      full_last: up to here, no element needs a mask.
      last: one past the last row block.
    """

    first: jax.Array
    done: jax.Array
    full_first: jax.Array
    full_last: jax.Array
    last: jax.Array


class Masks:
    """A `blocks.Mask` as arrays for a kernel, and what the kernel asks of them.

    Attributes:
      arrays: the kernel's inputs; it hands their references back as `refs`.
      spans: inputs after these for a kernel over rows: which keys each block's segments span, if there are segments.
      is_plain: causal or full, nothing else.
      mask: the mask itself.
      num_row_blocks: blocks of 64 rows.
    """

    def __init__(self, mask: blocks.Mask, num_queries: int, num_keys: int):
        self.mask, self._num_keys = mask, num_keys
        self._static = dict(num_queries=num_queries, is_causal=mask.is_causal, window=mask.window)
        self.is_plain = mask.window is None and mask.segment_ids is None and mask.lengths is None
        self.num_row_blocks = pl.cdiv(num_queries, BLOCK)
        self.arrays, self.spans = [jnp.reshape(mask.offset, (1,))], []
        if mask.lengths is not None:
            self.arrays.append(mask.lengths)
        if mask.segment_ids is not None:
            for ids in (mask.segment_ids, mask.segments_of_keys):
                self.arrays.append(jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % (GROUPS * BLOCK))), mode="edge"))
            self.spans.append(mask.row_spans(BLOCK))

    def _split(self, refs, batch):
        """(offset, length, references of the segments of rows and of keys, references of their spans)."""
        offset, *rest = refs
        length = rest.pop(0)[batch] if self.mask.lengths is not None else self._num_keys
        return offset[0], length, rest[:2], rest[2:]

    def key_bounds(self, refs, batch, row):
        """Key blocks of rows [row, row + 128): (first, last) of both warpgroups, each warpgroup's own bounds."""
        offset, length, _, spans = self._split(refs, batch)
        num_blocks, own = pl.cdiv(self._num_keys, BLOCK), []
        for position in (row, row + BLOCK):
            segment = None
            for ref in spans:
                block = jnp.minimum(lax.div(position, BLOCK), ref.shape[1] - 1)
                segment = tuple(ref[batch, block, i] for i in range(4))
            options = dict(offset=offset, length=length, segment=segment, **self._static)
            own.append(_some_work(blocks.key_bounds(position, BLOCK, BLOCK, **options), num_blocks))
        return jnp.minimum(own[0].first, own[1].first), jnp.maximum(own[0].last, own[1].last), own

    def _rows_of(self, key, offset, length, segment=None) -> blocks.Bounds:
        """Row blocks of keys [key, key + 128)."""
        options = dict(offset=offset, length=length, segment=segment, **self._static)
        return blocks.row_bounds(key, BLOCK, GROUPS * BLOCK, **options)

    def visits(self) -> list[jax.Array]:
        """Which row blocks each 128 keys visit, and which of these keys visit a row block first: inputs for `visit`.

        Visited are all row blocks that see one of the keys, and so many more that `first` and `last` never decrease
        from one key block to the next, that every row block has a visitor, and every key block something to visit. So
        the visitors of a row block are neighbours.

        Returns:
          The `Visit` of each key block, (B or 1, blocks, 5), and the first visitor of each row block, (B or 1, blocks),
          both int32. Nothing for causal and full masks: each key block visits what all later ones do.
        """
        mask, num_rows = self.mask, self.num_row_blocks
        if self.is_plain:
            return []
        key = jnp.arange(0, self._num_keys, GROUPS * BLOCK, dtype=jnp.int32)[None]
        length = self._num_keys if mask.lengths is None else mask.lengths[:, None]
        segment = mask.key_spans(GROUPS * BLOCK)
        segment = segment if segment is None else tuple(jnp.moveaxis(segment, -1, 0))
        *bounds, _ = jnp.broadcast_arrays(*self._rows_of(key, mask.offset, length, segment), key)
        first, full_first, full_last, last = bounds
        is_empty, is_last = first >= last, jnp.arange(key.size) == key.size - 1
        first, last = jnp.where(is_empty, num_rows, first), jnp.where(is_empty, 1, last)
        last = jnp.where(is_last, num_rows, last)
        visits_late = last[:, None] > jnp.arange(num_rows)[:, None]
        first_visitor = jnp.argmax(visits_late, axis=-1)
        last = lax.cummax(last, axis=1)
        last_before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
        first = jnp.minimum(lax.cummin(first, axis=1, reverse=True), jnp.minimum(last_before, last - 1))
        done = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=num_rows)
        return [jnp.stack(Visit(first, done, full_first, full_last, last), axis=-1), first_visitor.astype(jnp.int32)]

    def visit(self, visits, refs, batch, block) -> Visit:
        """Of key block `block` of `batch`; `visits` are references to the arrays of the function of that name."""
        if visits:
            table, _ = visits
            return Visit(*(table[jnp.minimum(batch, table.shape[0] - 1), block, i] for i in range(table.shape[2])))
        num_rows, num_blocks = self.num_row_blocks, pl.cdiv(self._num_keys, GROUPS * BLOCK)
        offset, length, *_ = self._split(refs, batch)
        here, after = (self._rows_of((block + i) * (GROUPS * BLOCK), offset, length) for i in range(2))
        first, done = (jnp.minimum(x.first, num_rows - 1) for x in (here, after))
        first, done = jnp.where(block == 0, 0, first), jnp.where(block == num_blocks - 1, num_rows, done)
        last = jnp.minimum(here.last, num_rows)  # always num_rows, which the compiler must not know: it would spill
        return Visit(first, done, here.full_first, here.full_last, last)

    def first_visitor(self, visits, batch, row_block) -> jax.Array:
        """The first key block that visits a row block."""
        return visits[1][jnp.minimum(batch, visits[1].shape[0] - 1), row_block] if visits else jnp.int32(0)

    def visible(self, refs, batch, row, key, key_axis: int = 1) -> jax.Array:
        """The tile of keys [key, key + 64) that rows [row, row + 64) see."""
        offset, length, segments, _ = self._split(refs, batch)
        tile = jax.ShapeDtypeStruct((BLOCK, BLOCK), jnp.int32)
        is_causal, window = self.mask.is_causal, self.mask.window
        across = plgpu.broadcasted_iota(jnp.int32, tile.shape, 1, layout=plgpu.Layout.WGMMA)
        conditions = []
        if key_axis == 1:  # bounds on the keys of each row: a thread holds two rows and 16 keys
            across += lax.shift_right_arithmetic(key, 31)  # 0 (see hidden_zero): computed here, not held all along
            left = length - key
            if is_causal or window is not None:
                down = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=row_layout(0))
                diagonal = down + (row + offset - key)
            if is_causal:
                conditions.append(across <= tiles.spread(jnp.minimum(diagonal, left - 1), tile))
            else:
                conditions.append(across < left)
            if window is not None:
                conditions.append(across > tiles.spread(diagonal - window, tile))
        else:  # bounds on the rows of each key
            down = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=row_layout(0))
            diagonal = down + (key - offset - row)
            visible_keys = down < length - key
            if is_causal:
                conditions.append(across >= tiles.spread(jnp.where(visible_keys, diagonal, BLOCK), tile))
            else:
                conditions.append(tiles.spread(visible_keys, tile))
            if window is not None:
                conditions.append(across < tiles.spread(diagonal + window, tile))
        if segments:
            axes = 1 - key_axis, key_axis
            row_ids, key_ids = (
                tiles.spread(
                    plgpu.load(ref.at[batch, pl.ds(start, BLOCK)], layout=row_layout(axis), optimized=False),
                    tile,
                    1 - axis,
                )
                for ref, start, axis in zip(segments, (row, key), axes, strict=True)
            )
            conditions.append(row_ids == key_ids)
        return functools.reduce(jnp.logical_and, conditions)

    def hide_padding(self, *arrays):
        """Zeroes keys and values that no query sees, whatever they hold: 0 * NaN would reach the products."""
        mask = self.mask
        if mask.lengths is None and (mask.end_aligned or not mask.is_causal):
            return arrays
        length = jnp.full((1,), self._num_keys, jnp.int32) if mask.lengths is None else mask.lengths
        end = blocks.visible_end(mask.offset, self._static["num_queries"], length, mask.is_causal)
        valid = jnp.arange(self._num_keys) < end[:, None]
        return [jnp.where(valid[:, :, None, None], x, jnp.zeros((), x.dtype)) for x in arrays]
