"""What the Triton kernels share: masked loads and stores of one head's rows, bounds, and the loop over blocks."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import blocks, device


def padded(width: int) -> int:
    """Width of a tile that holds a head: a power of two, at least 16 for the tensor cores."""
    return max(16, pl.next_power_of_2(width))


def _inside(start, size: int, limit, width: int, actual_width: int) -> jax.Array | None:
    """Bool (size, width), or None where nothing needs to be hidden."""
    mask = None
    if limit is not None:
        mask = jnp.broadcast_to((start + jnp.arange(size) < limit)[:, None], (size, width))
    if width != actual_width:
        columns = jnp.broadcast_to((jnp.arange(width) < actual_width)[None, :], (size, width))
        mask = columns if mask is None else mask & columns
    return mask


def _rows(ref, b, start, size: int, head, width: int):
    # A start known only at run time lets the slice reach past the head's width; the mask hides what lies there.
    columns = pl.ds(0, width) if width == ref.shape[3] else pl.ds(b * 0, width)
    return ref.at[b, pl.ds(start, size), head, columns]


def load_rows(ref, b, start, size: int, head, limit) -> jax.Array:
    """Loads rows [start, start + size) of one head of a (B, T, N, H) array as (size, padded(H)).

    Rows from `limit` on (None: all are there) and columns past H are zero and are not read.
    """
    width = padded(ref.shape[3])
    mask = _inside(start, size, limit, width, ref.shape[3])
    return plt.load(_rows(ref, b, start, size, head, width), mask=mask, other=None if mask is None else 0.0)


def store_rows(ref, b, start, head, x: jax.Array, limit) -> None:
    """Stores what `load_rows` would load."""
    size, width = x.shape
    mask = _inside(start, size, limit, width, ref.shape[3])
    plt.store(_rows(ref, b, start, size, head, width), x.astype(ref.dtype), mask=mask)


def load_stat(ref, b, head, start, size: int, limit, other: float = 0.0) -> jax.Array:
    """Loads rows [start, start + size) of a (B, N, T) row statistic; `other` from `limit` on."""
    mask = None if limit is None else start + jnp.arange(size) < limit
    return plt.load(ref.at[b, head, pl.ds(start, size)], mask=mask, other=None if mask is None else other)


def store_stat(ref, b, head, start, x: jax.Array, limit) -> None:
    """Stores what `load_stat` would load."""
    mask = None if limit is None else start + jnp.arange(x.shape[0]) < limit
    plt.store(ref.at[b, head, pl.ds(start, x.shape[0])], x, mask=mask)


def load_segments(ref, b, start, size: int, limit) -> jax.Array:
    """Loads segment ids of positions [start, start + size)."""
    return plt.load(ref.at[b, pl.ds(start, size)], mask=start + jnp.arange(size) < limit, other=0)


class Sight(NamedTuple):
    """A mask as one program of a kernel knows it: scalars read, spans at hand."""

    mask: blocks.Mask
    b: jax.Array
    num_queries: int
    offset: jax.Array
    length: jax.Array
    end: jax.Array
    span: tuple | None

    @classmethod
    def read(cls, mask: blocks.Mask, spans, b, block, num_queries: int, num_keys: int) -> "Sight":
        """Reads the scalars of batch row `b` and the segment span of `block` from refs."""
        offset = mask.offset[...]
        length = num_keys if mask.lengths is None else jnp.minimum(mask.lengths[b], num_keys)
        end = blocks.visible_end(offset, num_queries, length, mask.is_causal)
        span = None if spans is None else tuple(spans[b, block, e] for e in range(4))
        return cls(mask, b, num_queries, offset, length, end, span)

    @property
    def hides_start(self) -> bool:
        """Whether a row's keys may start after key 0."""
        return self.mask.window is not None or self.mask.segment_ids is not None

    @property
    def hides_keys(self) -> bool:
        """Whether lengths or segments may end a row's keys anywhere."""
        return self.mask.lengths is not None or self.mask.segment_ids is not None

    @property
    def static(self) -> dict:
        """What `blocks.key_bounds`, `row_bounds` and `visible_tile` all take."""
        return dict(offset=self.offset, is_causal=self.mask.is_causal, window=self.mask.window)

    def bounds(self, function: Callable, start, config) -> blocks.Bounds:
        """`blocks.key_bounds` or `blocks.row_bounds` of the block at `start`."""
        return function(
            start,
            config.block_q,
            config.block_k,
            num_queries=self.num_queries,
            length=self.length,
            segment=self.span,
            **self.static,
        )

    def visible(self, row, key, config, key_axis: int) -> jax.Array:
        """Bool tile of rows [row, row + block_q) and keys [key, key + block_k), keys along `key_axis`."""
        shape = (config.block_q, config.block_k) if key_axis == 1 else (config.block_k, config.block_q)
        spread = lambda x, axis: lax.broadcast_in_dim(x, shape, (axis,))
        row_segments = key_segments = None
        if self.mask.segment_ids is not None:
            load = lambda ids, start, size: load_segments(ids, self.b, start, size, ids.shape[1])
            row_segments = spread(load(self.mask.segment_ids, row, config.block_q), 1 - key_axis)
            key_segments = spread(load(self.mask.segments_of_keys, key, config.block_k), key_axis)
        return blocks.visible_tile(
            row + lax.broadcasted_iota(jnp.int32, shape, 1 - key_axis),
            key + lax.broadcasted_iota(jnp.int32, shape, key_axis),
            num_queries=None,  # rows past T carry zero weight by their statistics
            length=self.end,
            row_segments=row_segments,
            key_segments=key_segments,
            **self.static,
        )


def over_blocks(bounds: blocks.Bounds, step: Callable, carry, *, masked_start: bool, masked_end: bool):
    """Runs carry = step(block, carry, masked) over the bounds; the unmasked middle is its own loop.

    `masked_start` and `masked_end` say which masked loops can have work at all.
    """
    loop = lambda masked: lambda j, c: step(j, c, masked)
    if masked_start:
        carry = lax.fori_loop(bounds.first, bounds.full_first, loop(True), carry)
    carry = lax.fori_loop(bounds.full_first, bounds.full_last, loop(False), carry)
    if masked_end:
        carry = lax.fori_loop(bounds.full_last, bounds.last, loop(True), carry)
    return carry


def dot(x: jax.Array, y: jax.Array, precision) -> jax.Array:
    """x @ y with a float32 result."""
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def work_group(heads: int, bytes_per_head: int) -> int:
    """Heads whose row blocks are interleaved in launch order: as many as keep their keys and values in L2."""
    return max(1, min(heads, (24 << 20) // max(bytes_per_head, 1)))


def work_item(pid, heads: int, num_blocks: int, group: int):
    """(head, block) of program `pid`: groups of heads in turn, inside a group block by block over its heads."""
    per_group = group * num_blocks
    first = lax.div(pid, per_group) * group
    size = jnp.minimum(group, heads - first)
    rest = lax.rem(pid, per_group)
    return first + lax.rem(rest, size), lax.div(rest, size)


def grid_size(*sizes: int) -> tuple[int]:
    """A one-axis grid: CUDA bounds only the first axis by 2^31 - 1."""
    return (math.prod(sizes),)


def _has_dependents() -> bool:
    """Whether XLA launches Triton kernels as programmatic dependents: on Hopper and later."""
    return any(name in device.target()[1] for name in device.HOPPER + device.BLACKWELL)


def release_next(x: jax.Array) -> jax.Array:
    """`x`, float32; from its first use on the next kernel may take its place on the device and wait there.

    On Hopper and later XLA launches Triton kernels as programmatic dependents: each waits at its start until the one
    before has ended.
    """
    if not _has_dependents():
        return x
    asm = "griddepcontrol.launch_dependents; mov.f32 $0, $1;"
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plt.elementwise_inline_asm(asm, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[shape])[0]


def prefetch(refs, sizes: Sequence[int], programs: int) -> jax.Array:
    """Asks the device to read arrays into its L2 cache, each of `programs` programs its share; nobody waits for it.

    Args:
      refs: of one element each, the arrays' first.
      sizes: of the arrays, in bytes.
      programs: of the kernel.

    Returns:
      0, int32, which the kernel must use: without a use there is no prefetch.
    """
    total = jnp.int32(0)
    for ref, size in zip(refs, sizes, strict=True) if _has_dependents() else ():
        size = size // 16 * 16
        share = max(-(-size // (16 * programs)) * 16, 1024)
        asm = f"""{{
            .reg .pred here; .reg .b32 number; .reg .b64 start, rest;
            mov.u32 number, %tid.x; setp.eq.u32 here, number, 0;
            mov.u32 number, %ctaid.x; mul.wide.u32 start, number, {share}; setp.lt.and.u64 here, start, {size}, here;
            sub.u64 rest, {size}, start; min.u64 rest, rest, {share}; cvt.u32.u64 number, rest;
            add.u64 start, start, $1;
            @here cp.async.bulk.prefetch.L2.global [start], number;
            mov.b32 $0, $2;
        }}"""
        zero = jnp.zeros(ref.shape, jnp.int32)
        shape = jax.ShapeDtypeStruct(zero.shape, zero.dtype)
        (zero,) = plt.elementwise_inline_asm(
            asm, args=[ref, zero], constraints="=r,l,r", pack=1, result_shape_dtypes=[shape]
        )
        total += jnp.sum(zero)
    return total
