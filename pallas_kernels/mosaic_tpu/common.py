"""What the TPU kernels share: the plan of tiles that a call visits, masks, row statistics, products, padding.

A TPU runs a grid in order, so the inner loop over tiles is a grid axis. Its steps follow a plan worked out beforehand:
step s of a group names the outer block, the inner block and what to do there. Only tiles with something visible are
steps, and none is fetched for nothing. The number of steps is an operand: new offsets and lengths compile nothing.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, tiles

LANES = 128
MAX_STEPS = 1 << 17  # half of the scalar memory, in four-byte words
MAX_BLOCKS = 1 << 13  # blocks along an axis, by the bits of a step's code
STATS = 8  # rows of the array of row statistics: the sublanes of a vector register
LSE, T_MEAN, TAU, BETA = range(4)

_FIRST, _LAST, _WORK, _MASKED = 1, 2, 4, 8


class Step(NamedTuple):
    """One step of a plan: which tile, and what to do there. `first` and `last` are those of the outer block."""

    outer: jax.Array
    inner: jax.Array
    first: jax.Array
    last: jax.Array
    work: jax.Array
    masked: jax.Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a kernel's inner axis.

    Attributes:
      codes: int32 (groups * capacity,), the steps of each group, as `read` unpacks them.
      size: int32 (), steps that the longest group takes; the others do nothing in their last steps.
      groups: 1 where all batch rows share a plan, else their number.
      outer: outer blocks of a group.
      capacity: most steps that a group can take.
    """

    codes: jax.Array
    size: jax.Array
    groups: int
    outer: int
    capacity: int

    def read(self, codes_ref, group, step) -> Step:
        """Unpacks a step."""
        code = codes_ref[step if self.groups == 1 else group * self.capacity + step]
        flag = lambda bit: (code & bit) != 0
        outer, inner = lax.shift_right_logical(code, 17), lax.shift_right_logical(code, 4) & (MAX_BLOCKS - 1)
        return Step(outer, inner, flag(_FIRST), flag(_LAST), flag(_WORK), flag(_MASKED))


def make_plan(bounds: blocks.Bounds, inner_blocks: int, capacity: int) -> Plan:
    """Lays out the tiles of `bounds` (groups, outer blocks) in order. An outer block without tiles takes one step."""
    bounds = blocks.Bounds(*(jnp.minimum(x, inner_blocks) for x in bounds))
    groups, outer_blocks = bounds.first.shape
    counts = jnp.maximum(bounds.last - bounds.first, 1)
    ends = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
    total = ends[:, -1:]
    wanted = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (groups, capacity))
    step = jnp.minimum(wanted, total - 1)[:, :, None]
    ends = ends[:, None, :]
    starts = ends - counts[:, None, :]
    # Sums over one-hot rows in place of gathers, which are slow on a TPU.
    here = (step >= starts) & (step < ends)
    pick = lambda x: jnp.sum(jnp.where(here, x, 0), axis=-1, dtype=jnp.int32)
    bounds = blocks.Bounds(*(x[:, None, :] for x in bounds))
    inner = jnp.minimum(bounds.first + step - starts, inner_blocks - 1)
    masked = (inner < bounds.full_first) | (inner >= bounds.full_last)
    flag = lambda on, bit: jnp.where(on, bit, 0)
    flags = flag(step == starts, _FIRST) | flag(step == ends - 1, _LAST)
    flags |= flag(bounds.last > bounds.first, _WORK) | flag(masked, _MASKED)
    outer = lax.broadcasted_iota(jnp.int32, here.shape, 2)
    code = pick((outer << 17) | (inner << 4)) | jnp.where(wanted < total, pick(flags), 0)
    return Plan(code.reshape(-1), jnp.max(total), groups, outer_blocks, capacity)


def capacity(outer: int, inner: int, block_outer: int, block_inner: int, mask: blocks.Mask) -> int:
    """Most tiles that the plan of an attention call can hold."""
    if mask.is_causal and mask.window is not None:
        inner = min(inner, pl.cdiv(block_outer + mask.window - 2, block_inner) + 1)
    return outer * inner


class Limits(NamedTuple):
    """Scalars of one batch row: offset, number of keys, and the first key that no query sees."""

    offset: jax.Array
    length: jax.Array
    end: jax.Array

    def pack(self) -> jax.Array:
        """The limits of all groups as one int32 operand, for `read`."""
        return jnp.stack(self, axis=-1).reshape(-1)

    @classmethod
    def read(cls, ref, group) -> "Limits":
        """Reads a group's limits."""
        return cls(*(ref[3 * group + i] for i in range(3)))


def alike(mask: blocks.Mask) -> bool:
    """Whether all batch rows see the same keys, so that they share a plan."""
    return mask.lengths is None and mask.segment_ids is None and mask.offset.ndim == 0


def limits(mask: blocks.Mask, batch: int, num_queries: int, num_keys: int) -> Limits:
    """Limits (groups,) of a call; one group where batch rows do not differ. `mask.offset` is () or (B,)."""
    groups = 1 if alike(mask) else batch
    length = jnp.int32(num_keys) if mask.lengths is None else jnp.minimum(mask.lengths, num_keys)
    offset, length = (jnp.broadcast_to(x, (groups,)) for x in (mask.offset, length))
    return Limits(offset, length, blocks.visible_end(offset, num_queries, length, mask.is_causal))


def attention_plan(
    mask: blocks.Mask, sight: Limits, num_queries: int, num_keys: int, block_q: int, block_k: int, by_rows: bool
) -> Plan:
    """The plan with row blocks outside (`blocks.key_bounds`) or with key blocks outside (`blocks.row_bounds`)."""
    function = blocks.key_bounds if by_rows else blocks.row_bounds
    sizes = (num_queries, block_q, num_keys, block_k) if by_rows else (num_keys, block_k, num_queries, block_q)
    outer, inner = pl.cdiv(sizes[0], sizes[1]), pl.cdiv(sizes[2], sizes[3])
    starts = jnp.arange(outer, dtype=jnp.int32) * sizes[1]

    def of_block(start, span, offset, length):
        return function(
            start,
            block_q,
            block_k,
            num_queries=num_queries,
            offset=offset,
            length=length,
            is_causal=mask.is_causal,
            window=mask.window,
            segment=None if span is None else tuple(span[i] for i in range(4)),
        )

    spans = mask.row_spans(sizes[1]) if by_rows else mask.key_spans(sizes[1])
    of_group = jax.vmap(of_block, in_axes=(0, None if spans is None else 0, None, None))
    of_groups = jax.vmap(of_group, in_axes=(None, None if spans is None else 0, 0, 0))
    bounds = of_groups(starts, spans, sight.offset, sight.length)
    return make_plan(bounds, inner, capacity(outer, inner, sizes[1], sizes[3], mask))


def _visible(sight: Limits, mask: blocks.Mask, row, key, shape, key_axis: int, row_segments, key_segments) -> jax.Array:
    """Bool tile of the rows from `row` and the keys from `key`; segment ids broadcast against each other, or None."""
    return blocks.visible_tile(
        row + lax.broadcasted_iota(jnp.int32, shape, 1 - key_axis),
        key + lax.broadcasted_iota(jnp.int32, shape, key_axis),
        num_queries=None,  # rows past T are cut off, or carry zero weight by their statistics
        offset=sight.offset,
        length=sight.end,
        is_causal=mask.is_causal,
        window=mask.window,
        row_segments=row_segments,
        key_segments=key_segments,
    )


def keep_rows(x: jax.Array, count) -> jax.Array:
    """`x` with zeros from row `count` on, whatever lies there. In float32: older TPUs select no narrower elements."""
    wide = x.astype(jnp.float32)
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < count, wide, 0.0).astype(x.dtype)


class StateRefs(NamedTuple):
    """Scratch memory of a `tiles.State`; a row statistic stands in every lane of (rows, LANES)."""

    m: jax.Ref
    d1: jax.Ref
    t_mean: jax.Ref
    o1: jax.Ref
    o2: jax.Ref

    @staticmethod
    def scratch(rows: int, value_dim: int) -> tuple:
        """Shapes of the scratch memory."""
        stat, values = pltpu.VMEM((rows, LANES), jnp.float32), pltpu.VMEM((rows, value_dim), jnp.float32)
        return (stat, stat, stat, values, values)

    def load(self) -> tiles.State:
        """Reads the state."""
        return tiles.State(*(ref[:, 0] for ref in self[:3]), *(ref[...] for ref in self[3:]))

    def store(self, state: tiles.State) -> None:
        """Writes the state."""
        for ref, x in zip(self, state, strict=True):
            ref[...] = x if x.ndim == 2 else tiles.spread(x, ref)

    def clear(self) -> None:
        """Writes the state before any key."""
        self.store(tiles.initial_state((self.o1.shape[0],), self.o1.shape[1]))


def dot(x: jax.Array, y: jax.Array, precision) -> jax.Array:
    """x @ y with a float32 result."""
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def dot_transposed(x: jax.Array, y: jax.Array, precision) -> jax.Array:
    """x @ y.T with a float32 result."""
    return lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def round_up(size: int, multiple: int) -> int:
    """The next multiple."""
    return pl.cdiv(size, multiple) * multiple


def pad(x: jax.Array, axis: int, multiple: int, value: float = 0) -> jax.Array:
    """`x` with `value` appended along `axis` up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def heads_first(x: jax.Array, block: int) -> jax.Array:
    """(B, T, N, H) to (B, N, T, H), T padded to whole blocks: a TPU tiles the last two axes."""
    return pad(jnp.swapaxes(x, 1, 2), 2, block)


def rows_first(x: jax.Array, length: int) -> jax.Array:
    """Undoes `heads_first`."""
    return jnp.swapaxes(x[:, :, :length], 1, 2)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Blocks, grid and operands of one attention kernel.

    Attributes:
      plan: its steps.
      sight: limits of its groups.
      mask: the call's mask.
      block_q: query rows of a tile.
      block_k: keys of a tile.
      heads_per_kv: query heads that share a kv head.
      by_rows: grid (B, N, steps) with row blocks outside; else (B, K, steps, heads_per_kv) with key blocks outside.
    """

    plan: Plan
    sight: Limits
    mask: blocks.Mask
    block_q: int
    block_k: int
    heads_per_kv: int
    by_rows: bool

    @classmethod
    def make(cls, query, key, mask: blocks.Mask, config, by_rows: bool) -> "Layout":
        """The layout of a call with the blocks of `config`, made smaller where the call is."""
        batch, num_queries, num_heads, _ = query.shape
        num_keys, num_kv_heads = key.shape[1:3]
        block_q = min(config.block_q, round_up(num_queries, LANES))
        block_k = min(config.block_k, round_up(num_keys, LANES))
        sight = limits(mask, batch, num_queries, num_keys)
        plan = attention_plan(mask, sight, num_queries, num_keys, block_q, block_k, by_rows)
        return cls(plan, sight, mask, block_q, block_k, num_heads // num_kv_heads, by_rows)

    def _spec(self, shape, at) -> pl.BlockSpec:
        """A block of `shape` at index at(b, query head, kv head, row block, key block)."""

        def rows_index(b, n, s, codes, _):
            step = self.plan.read(codes, b, s)
            return at(b, n, lax.div(n, self.heads_per_kv), step.outer, step.inner)

        def columns_index(b, kv, s, g, codes, _):
            step = self.plan.read(codes, b, s)
            return at(b, kv * self.heads_per_kv + g, kv, step.inner, step.outer)

        return pl.BlockSpec(shape, rows_index if self.by_rows else columns_index)

    def rows(self, width: int) -> pl.BlockSpec:
        """A block of a (B, N, T, width) array."""
        return self._spec((None, None, self.block_q, width), lambda b, n, kv, i, j: (b, n, i, 0))

    def keys(self, width: int) -> pl.BlockSpec:
        """A block of a (B, K, S, width) array."""
        return self._spec((None, None, self.block_k, width), lambda b, n, kv, i, j: (b, kv, j, 0))

    def stats(self) -> pl.BlockSpec:
        """A block of a (B, N, STATS, T) array."""
        return self._spec((None, None, STATS, self.block_q), lambda b, n, kv, i, j: (b, n, 0, i))

    def segment_specs(self) -> list[pl.BlockSpec]:
        """Blocks of `segment_ids`."""
        if self.mask.segment_ids is None:
            return []
        rows, keys = lambda b, n, kv, i, j: (b, i), lambda b, n, kv, i, j: (b, j)
        column = lambda block, at: self._spec((None, block, 1), lambda *x: (*at(*x), 0))
        lanes = lambda block, at: self._spec((None, 1, block), lambda *x: (at(*x)[0], 0, at(*x)[1]))
        if self.by_rows:
            return [column(self.block_q, rows), lanes(self.block_k, keys)]
        return [lanes(self.block_q, rows), column(self.block_k, keys)]

    def segment_ids(self) -> list[jax.Array]:
        """Segment ids of rows and of keys, along the axes that they have in a tile; nothing without segments."""
        if self.mask.segment_ids is None:
            return []
        along = (1, 2) if self.by_rows else (2, 1)  # sublanes, or lanes
        expand = lambda ids, axis, block: pad(jnp.expand_dims(ids, 3 - axis), axis, block)
        return [
            expand(self.mask.segment_ids, along[0], self.block_q),
            expand(self.mask.segments_of_keys, along[1], self.block_k),
        ]

    def call(self, kernel, in_specs, operands, out_specs, out_shape, scratch, *, vmem: int | None, **options):
        """Runs a kernel over the plan; segment ids come after `operands`."""
        batch, num_heads = out_shape[0].shape[:2]
        grid = (batch, num_heads, self.plan.size, *([] if self.by_rows else [self.heads_per_kv]))
        return pl.pallas_call(
            functools.partial(kernel, layout=self),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=grid,
                in_specs=[*in_specs, *self.segment_specs()],
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")[: len(grid)],
                vmem_limit_bytes=vmem,
            ),
            **options,
        )(self.plan.codes, self.sight.pack(), *operands, *self.segment_ids())

    def read(self, codes_ref, limits_ref) -> tuple[Step, Limits]:
        """Inside the kernel: what to do in this step, and the limits of its batch row."""
        group = pl.program_id(0) if self.plan.groups > 1 else 0
        return self.plan.read(codes_ref, group, pl.program_id(2)), Limits.read(limits_ref, group)

    def over_tile(self, step: Step, sight: Limits, k_ref, v_ref, segment_refs, add) -> None:
        """Runs add(k, v, visible) on the step's tile if there is one, with a mask where it needs one.

        Keys that no query sees may hold anything: a masked tile sees zeros in their place.
        """
        i, j = (step.outer, step.inner) if self.by_rows else (step.inner, step.outer)
        row, key = i * self.block_q, j * self.block_k

        @pl.when(step.work & step.masked)
        def _():
            shape = (self.block_q, self.block_k) if self.by_rows else (self.block_k, self.block_q)
            segments = [ref[...] for ref in segment_refs] or (None, None)
            visible = _visible(sight, self.mask, row, key, shape, 1 if self.by_rows else 0, *segments)
            add(*(keep_rows(ref[...], sight.end - key) for ref in (k_ref, v_ref)), visible)

        @pl.when(step.work & ~step.masked)
        def _():
            add(k_ref[...], v_ref[...], None)


def cost(products: int, query, key, mask: blocks.Mask, arrays) -> pl.CostEstimate:
    """What a kernel with `products` multiplications for each pair of query and key is told to cost."""
    pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[1] // (2 if mask.is_causal else 1)
    return pl.CostEstimate(
        flops=2 * pairs * products,
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
