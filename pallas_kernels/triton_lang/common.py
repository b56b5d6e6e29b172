"""What the kernels share: what a call knows at compile time, loads and stores, and which blocks are visible."""

import dataclasses

import triton
import triton.language as tl

from pallas_kernels import tiles
from pallas_kernels.block_sizes import TritonPass
from pallas_kernels.blocks import Mask


def precision(dtype) -> str:
    """Triton's name for `pallas_kernels.tiles.dot_precision`."""
    return "tf32" if tiles.dot_precision(dtype) is None else "ieee"


@triton.constexpr_function
def padded(width):
    """Width of a tile that holds a head: a power of two, at least 16 for the tensor cores."""
    return max(16, 1 << (width - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Scores:
    """How scores are computed: what the functions of `tiles` ask of a call.

    Attributes:
      scale: factor on query . key.
      precision: of float32 products, "ieee" or "tf32".
    """

    scale: float
    precision: str

    c = property(lambda self: self.scale * tiles.LOG2_E)
    # A scale that is not positive goes into the scores before their maximum is taken.
    scores_first = property(lambda self: self.scale <= 0)
    positive_c = property(lambda self: 1.0 if self.scores_first else self.c)


@dataclasses.dataclass(frozen=True)
class Call(Scores):
    """What a kernel of the forward or backward pass knows when it is compiled: shapes, masks and tiles."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    is_causal: bool
    window: int | None
    has_lengths: bool
    has_segments: bool
    offset_per_row: bool
    block_q: int
    block_k: int
    num_stages: int

    @classmethod
    def of(cls, query, key, value, mask: Mask, scale: float, launch: TritonPass) -> "Call":
        """From the operands (B, T, N, H), (B, S, K, H), (B, S, K, Hv)."""
        batch, queries, heads, head_dim = query.shape
        keys, kv_heads, value_dim = value.shape[1:]
        return cls(
            scale=scale,
            precision=precision(query.dtype),
            batch=batch,
            queries=queries,
            keys=keys,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            is_causal=mask.is_causal,
            window=mask.window,
            has_lengths=mask.lengths is not None,
            has_segments=mask.segment_ids is not None,
            offset_per_row=mask.offset.ndim > 0,
            block_q=launch.block_q,
            block_k=launch.block_k,
            num_stages=launch.num_stages,
        )

    heads_per_kv = property(lambda self: self.heads // self.kv_heads)
    row_blocks = property(lambda self: -(-self.queries // self.block_q))
    key_blocks = property(lambda self: -(-self.keys // self.block_k))
    hides_start = property(lambda self: self.window is not None or self.has_segments)
    hides_end = property(
        lambda self: self.is_causal or self.has_lengths or self.has_segments or self.key_limit is not None
    )
    hides_first_rows = property(lambda self: self.is_causal or self.has_segments)
    hides_last_rows = property(
        lambda self: self.hides_start or self.has_lengths or self.row_limit is not None or self.key_limit is not None
    )
    # Limits of loads and stores where tiles may reach past the arrays.
    row_limit = property(lambda self: self.queries if self.queries % self.block_q else None)
    key_limit = property(lambda self: self.keys if self.keys % self.block_k else None)
    head_width = property(lambda self: padded(self.head_dim))
    value_width = property(lambda self: padded(self.value_dim))


@triton.jit
def at(ptr, b, start, head, length: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, size: tl.constexpr):
    """Pointers to rows [start, start + size) of one head of a (B, length, heads, width) array, in 64 bits once."""
    base = ptr + ((tl.cast(b, tl.int64) * length + start) * heads + head) * width
    return base + tl.arange(0, size)[:, None] * (heads * width) + tl.arange(0, padded(width))[None, :]


@triton.jit
def inside(start, limit, width: tl.constexpr, size: tl.constexpr):
    """Bool (size, padded width) of rows below `limit` (None: all) and columns below `width`; None where that is all."""
    if limit is None and padded(width) == width:
        mask = None
    elif limit is None:
        mask = tl.broadcast_to((tl.arange(0, padded(width)) < width)[None, :], (size, padded(width)))
    elif padded(width) == width:
        mask = tl.broadcast_to((start + tl.arange(0, size) < limit)[:, None], (size, padded(width)))
    else:
        mask = (start + tl.arange(0, size) < limit)[:, None] & (tl.arange(0, padded(width)) < width)[None, :]
    return mask


@triton.jit
def load_rows(
    ptr, b, start, limit, head, length: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, size: tl.constexpr
):
    """Rows [start, start + size) of one head as (size, padded width); those from `limit` on are 0 and are not read."""
    mask = inside(start, limit, width, size)
    return tl.load(at(ptr, b, start, head, length, heads, width, size), mask=mask, other=None if mask is None else 0.0)


@triton.jit
def load_stacked(
    x_ptr, y_ptr, b, start, limit, head, length: tl.constexpr, heads: tl.constexpr, width: tl.constexpr,
    size: tl.constexpr,
):  # fmt: skip
    """The same rows of two arrays as one (2 size, padded width) tile, so that one product serves both."""
    row = tl.arange(0, 2 * size)
    base = ((tl.cast(b, tl.int64) * length + start) * heads + head) * width
    offsets = base + (row % size)[:, None] * (heads * width) + tl.arange(0, padded(width))[None, :]
    pointers = tl.where((row < size)[:, None], x_ptr + offsets, y_ptr + offsets)
    if limit is None and padded(width) == width:
        mask = None
    else:
        mask = (tl.arange(0, padded(width)) < width)[None, :]
        if limit is not None:
            mask = mask & (start + row % size < limit)[:, None]
        mask = tl.broadcast_to(mask, (2 * size, padded(width)))
    return tl.load(pointers, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def store_rows(
    ptr, x, b, start, limit, head, length: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, size: tl.constexpr
):
    """Stores what `load_rows` would load."""
    pointers = at(ptr, b, start, head, length, heads, width, size)
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=inside(start, limit, width, size))


@triton.jit
def load_stat(ptr, b, n, row, limit, other, call: tl.constexpr):
    """Rows [row, row + block_q) of a (B, N, T) row statistic; `other` from `limit` on."""
    rows = row + tl.arange(0, call.block_q)
    mask = None if limit is None else rows < limit
    pointers = ptr + (tl.cast(b, tl.int64) * call.heads + n) * call.queries + rows
    return tl.load(pointers, mask=mask, other=None if limit is None else other)


@triton.jit
def store_stat(ptr, x, b, n, row, limit, call: tl.constexpr):
    """Stores what `load_stat` would load."""
    rows = row + tl.arange(0, call.block_q)
    pointers = ptr + (tl.cast(b, tl.int64) * call.heads + n) * call.queries + rows
    tl.store(pointers, x, mask=None if limit is None else rows < limit)


@triton.jit
def work_item(pid, heads: tl.constexpr, num_blocks: tl.constexpr, group: tl.constexpr):
    """(head, block) of program `pid`: groups of heads in turn, inside a group block by block over its heads."""
    first = pid // (group * num_blocks) * group
    size = tl.minimum(group, heads - first)
    rest = pid % (group * num_blocks)
    return first + rest % size, rest // size


@triton.jit
def read_mask(offset_ptr, lengths_ptr, b, call: tl.constexpr):
    """(offset, length, end) of batch row b; loads stop at `end`, the first key that no query of the call sees."""
    offset = tl.load(offset_ptr + b) if call.offset_per_row else tl.load(offset_ptr)
    length = tl.minimum(tl.load(lengths_ptr + b), call.keys) if call.has_lengths else call.keys
    end = tl.minimum(length, offset + call.queries) if call.is_causal else length
    return offset, length, end


@triton.jit
def read_span(spans_ptr, b, block, num_blocks: tl.constexpr):
    """The four numbers of `blocks.segment_spans` for one block."""
    span = spans_ptr + (b * num_blocks + block) * 4
    return tl.load(span), tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)


@triton.jit
def ordered(first, full_first, full_last, last):
    """Clips the ranges so that first <= full_first <= full_last <= last."""
    last = tl.maximum(last, first)
    full_first = tl.minimum(tl.maximum(full_first, first), last)
    return first, full_first, tl.minimum(tl.maximum(full_last, full_first), last), last


@triton.jit
def key_bounds(row, block, spans_ptr, b, offset, length, call: tl.constexpr):
    """`blocks.key_bounds` of query rows [row, row + block_q)."""
    row_last = tl.minimum(row + call.block_q, call.queries) - 1
    first, full_first = row * 0, row * 0
    full_last, last = row * 0 + length, row * 0 + length
    if call.is_causal:
        last = tl.minimum(last, row_last + offset + 1)
        full_last = tl.minimum(full_last, row + offset + 1)
    if call.window is not None:
        first = tl.maximum(first, row + offset - call.window + 1)
        full_first = tl.maximum(full_first, row_last + offset - call.window + 1)
    if call.has_segments:
        span = read_span(spans_ptr, b, block, call.row_blocks)
        first, full_first = tl.maximum(first, span[0]), tl.maximum(full_first, span[1])
        full_last, last = tl.minimum(full_last, span[2]), tl.minimum(last, span[3])
    return ordered(
        first // call.block_k,
        (full_first + call.block_k - 1) // call.block_k,
        tl.maximum(full_last, 0) // call.block_k,
        (tl.maximum(last, 0) + call.block_k - 1) // call.block_k,
    )


@triton.jit
def row_bounds(key, block, spans_ptr, b, offset, length, call: tl.constexpr):
    """`blocks.row_bounds` of keys [key, key + block_k)."""
    key_last = tl.minimum(key + call.block_k, length) - 1
    first, full_first = key * 0, key * 0
    full_last, last = key * 0 + call.queries, key * 0 + call.queries
    if call.is_causal:
        first = tl.maximum(first, key - offset)
        full_first = tl.maximum(full_first, key + call.block_k - 1 - offset)
    if call.window is not None:
        last = tl.minimum(last, key_last - offset + call.window)
        full_last = tl.minimum(full_last, key - offset + call.window)
    if call.has_segments:
        span = read_span(spans_ptr, b, block, call.key_blocks)
        first, full_first = tl.maximum(first, span[0]), tl.maximum(full_first, span[1])
        full_last, last = tl.minimum(full_last, span[2]), tl.minimum(last, span[3])
    # Past the length nothing is visible; a block that straddles it is masked throughout.
    last = tl.where(key < length, tl.maximum(last, 0), 0)
    full_last = tl.where(key + call.block_k <= length, tl.maximum(full_last, 0), 0)
    return ordered(
        first // call.block_q,
        (full_first + call.block_q - 1) // call.block_q,
        full_last // call.block_q,
        (last + call.block_q - 1) // call.block_q,
    )


@triton.jit
def visible_tile(row, key, sight, call: tl.constexpr):
    """`blocks.visible_tile` of int32 rows and keys that broadcast to a tile.

    `sight` is the mask as one program knows it: (segments, segments of keys, batch row, offset, end).
    """
    segments_ptr, key_segments_ptr, b, offset, end = sight
    visible = key < end
    if call.is_causal:
        visible = visible & (key <= row + offset)
    if call.window is not None:
        visible = visible & (key > row + offset - call.window)
    if call.has_segments:
        row_segments = tl.load(segments_ptr + b * call.queries + row, mask=row < call.queries, other=0)
        key_segments = tl.load(key_segments_ptr + b * call.keys + key, mask=key < call.keys, other=0)
        visible = visible & (row_segments == key_segments)
    return visible


def work_group(heads: int, bytes_per_head: int) -> int:
    """Heads whose row blocks are interleaved in launch order: as many as keep their keys and values in L2."""
    return max(1, min(heads, (24 << 20) // max(bytes_per_head, 1)))


def nbytes(*arrays) -> int:
    """Bytes of one batch row and head of (B, T, N, H) arrays."""
    return sum(x.shape[1] * x.shape[3] * x.dtype.itemsize for x in arrays)
