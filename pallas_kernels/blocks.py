"""Which keys a block of query rows sees, as plain integer functions that run inside and outside kernels.

Query row t sits at position `t + offset` on the key axis. It sees the keys s of its own segment with
`s < length`, `s <= t + offset` (causal) and `s > t + offset - window` (window).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["offset", "lengths", "segment_ids", "key_segment_ids"],
    meta_fields=["is_causal", "window", "end_aligned"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Everything that hides keys. `is_causal` and `window` are static, the rest are arrays.

    Attributes:
      offset: int32 (), position of query row 0 on the key axis.
      lengths: int32 (B,), keys from this index on are padding; None for all S keys.
      segment_ids: int32 (B, T); None for one segment.
      is_causal: query t sees keys s <= t + offset.
      window: number of most recent keys seen, the diagonal included; None for all.
      key_segment_ids: int32 (B, S), segments of the keys; None for those of the queries.
      end_aligned: whether offset is known to be S - T, so that under a causal mask no key lies past all queries.
    """

    offset: jax.Array
    lengths: jax.Array | None = None
    segment_ids: jax.Array | None = None
    is_causal: bool = True
    window: int | None = None
    key_segment_ids: jax.Array | None = None
    end_aligned: bool = False

    @property
    def segments_of_keys(self) -> jax.Array | None:
        """Segment of each key, or None."""
        return self.segment_ids if self.key_segment_ids is None else self.key_segment_ids

    def row_spans(self, block: int) -> jax.Array | None:
        """`segment_spans` of blocks of rows among the keys, or None."""
        return None if self.segment_ids is None else segment_spans(self.segment_ids, block, self.segments_of_keys)

    def key_spans(self, block: int) -> jax.Array | None:
        """`segment_spans` of blocks of keys among the rows, or None."""
        return None if self.segment_ids is None else segment_spans(self.segments_of_keys, block, self.segment_ids)


class Bounds(NamedTuple):
    """Half-open ranges of blocks: [first, last) to visit, of which [full_first, full_last) need no mask."""

    first: jax.Array
    full_first: jax.Array
    full_last: jax.Array
    last: jax.Array


def floor_div(a, b):
    """a // b for integers a >= 0, b > 0, without the sign handling that costs instructions inside kernels."""
    return jax.lax.div(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))


def _ordered(first, full_first, full_last, last) -> Bounds:
    """Clips the ranges so that first <= full_first <= full_last <= last."""
    last = jnp.maximum(last, first)
    full_first = jnp.clip(full_first, first, last)
    return Bounds(first, full_first, jnp.clip(full_last, full_first, last), last)


def visible_end(offset, num_queries: int, length, is_causal: bool):
    """First key index that no query of the call sees: loads stop there, so padding may hold anything."""
    return jnp.minimum(length, offset + num_queries) if is_causal else length


def key_bounds(
    row: jax.Array,
    block_q: int,
    block_k: int,
    *,
    num_queries: int,
    offset,
    length,
    is_causal: bool,
    window: int | None,
    segment: tuple | None = None,
) -> Bounds:
    """Key blocks that query rows [row, row + block_q) visit.

    The window's unmasked start comes from the block's last row, the causal unmasked end from its first.

    Args:
      row: first query row of the block.
      block_q: rows in the block.
      block_k: keys in a key block.
      num_queries: T; rows past it do not count.
      offset: position of query row 0 on the key axis.
      length: number of valid keys, at most S.
      is_causal: see `Mask`.
      window: see `Mask`.
      segment: from `segment_spans`, this block's (first key, first key of the unmasked span, its end, last key + 1).
    """
    row_last = jnp.minimum(row + block_q, num_queries) - 1
    first_key, last_key = 0, length
    full_first_key, full_last_key = 0, length
    if is_causal:
        last_key = jnp.minimum(last_key, row_last + offset + 1)
        full_last_key = jnp.minimum(full_last_key, row + offset + 1)
    if window is not None:
        first_key = jnp.maximum(first_key, row + offset - window + 1)
        full_first_key = jnp.maximum(full_first_key, row_last + offset - window + 1)
    if segment is not None:
        first_key = jnp.maximum(first_key, segment[0])
        full_first_key = jnp.maximum(full_first_key, segment[1])
        full_last_key = jnp.minimum(full_last_key, segment[2])
        last_key = jnp.minimum(last_key, segment[3])
    last_key = jnp.maximum(last_key, 0)
    full_last_key = jnp.maximum(full_last_key, 0)
    return _ordered(
        floor_div(first_key, block_k),
        floor_div(full_first_key + block_k - 1, block_k),
        floor_div(full_last_key, block_k),
        floor_div(last_key + block_k - 1, block_k),
    )


def row_bounds(
    key: jax.Array,
    block_q: int,
    block_k: int,
    *,
    num_queries: int,
    offset,
    length,
    is_causal: bool,
    window: int | None,
    segment: tuple | None = None,
) -> Bounds:
    """Query blocks that see keys [key, key + block_k): `key_bounds` for passes over keys.

    `segment` holds the rows: (first row, first row of the unmasked span, its end, last row + 1).
    """
    key_last = jnp.minimum(key + block_k, length) - 1
    first_row, last_row = 0, num_queries
    full_first_row, full_last_row = 0, num_queries
    if is_causal:
        first_row = jnp.maximum(first_row, key - offset)
        full_first_row = jnp.maximum(full_first_row, key + block_k - 1 - offset)
    if window is not None:
        last_row = jnp.minimum(last_row, key_last - offset + window)
        full_last_row = jnp.minimum(full_last_row, key - offset + window)
    if segment is not None:
        first_row = jnp.maximum(first_row, segment[0])
        full_first_row = jnp.maximum(full_first_row, segment[1])
        full_last_row = jnp.minimum(full_last_row, segment[2])
        last_row = jnp.minimum(last_row, segment[3])
    # Past the length nothing is visible; a block that straddles it is masked throughout.
    last_row = jnp.maximum(last_row, 0) * jnp.clip(length - key, 0, 1)
    full_last_row = jnp.maximum(full_last_row, 0) * jnp.clip(length - key - block_k + 1, 0, 1)
    return _ordered(
        floor_div(first_row, block_q),
        floor_div(full_first_row + block_q - 1, block_q),
        floor_div(full_last_row, block_q),
        floor_div(last_row + block_q - 1, block_q),
    )


def segment_spans(segment_ids: jax.Array, block: int, others: jax.Array | None = None) -> jax.Array:
    """Where each block of positions finds its own segments among `others`: (B, blocks, 4) int32.

    The four numbers are the first of the others that may share a segment with the block, the span [start, end) in which
    each of them has the one segment of the whole block (empty where the block holds several), and one past the last
    that may share one. Tight where ids do not decrease along the row (packed rows); right for any ids.

    Args:
      segment_ids: int32 (B, positions).
      block: positions in a block.
      others: int32 (B, others); None for the positions themselves.
    """
    others = segment_ids if others is None else others
    length, size = segment_ids.shape[1], others.shape[1]
    blocks = -(-length // block)
    tiles = jnp.pad(segment_ids, ((0, 0), (0, blocks * block - length)), mode="edge").reshape(-1, blocks, block)
    low, high = tiles.min(-1), tiles.max(-1)
    search = lambda ids, wanted, side: jax.vmap(
        functools.partial(jnp.searchsorted, side=side, method="scan_unrolled"), in_axes=(0, 0)
    )(ids, wanted)
    # Before `first` every id is below the block's; from `last` on every id is above it.
    first = search(jax.lax.cummax(others, axis=1), low, "left")
    last = search(jax.lax.cummin(others, axis=1, reverse=True), high, "right")
    change = others[:, 1:] != others[:, :-1]
    ends = jnp.pad(change, ((0, 0), (0, 1)), constant_values=True)
    run_end = jnp.where(ends, jnp.arange(1, size + 1, dtype=jnp.int32), size)
    run_end = jax.lax.cummin(run_end, axis=1, reverse=True)
    at_first = lambda x: jnp.take_along_axis(x, jnp.minimum(first, size - 1), axis=1)
    single = (low == high) & (at_first(others) == low)
    spans = (first, jnp.where(single, first, size), jnp.where(single, at_first(run_end), 0), last)
    return jnp.stack(spans, axis=-1).astype(jnp.int32)


def visible_tile(
    row: jax.Array,
    key: jax.Array,
    *,
    num_queries: int | None,
    offset,
    length,
    is_causal: bool,
    window: int | None,
    row_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
) -> jax.Array:
    """Bool tile of visible keys.

    Args:
      row: int32 query rows, already broadcast against `key` (a tile, or (rows, 1) where the backend broadcasts).
      key: int32 key indices, likewise.
      num_queries: T where rows past it must be hidden (passes over keys), else None.
      offset: see `Mask`.
      length: number of valid keys, at most S.
      is_causal: see `Mask`.
      window: see `Mask`.
      row_segments: segment of each row, broadcast likewise, or None.
      key_segments: segment of each key, broadcast likewise, or None.
    """
    visible = key < length
    if is_causal:
        visible &= key <= row + offset
    if window is not None:
        visible &= key > row + offset - window
    if num_queries is not None:
        visible &= row < num_queries
    if row_segments is not None:
        visible &= row_segments == key_segments
    return visible
