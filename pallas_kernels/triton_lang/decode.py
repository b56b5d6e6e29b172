"""Decode: a few new tokens against a long cache. Split-KV programs, then a merge of their states.

Time is the reading of keys and values, once: all query rows of a kv head's group share each tile, with their probes.
Every program takes an equal share of the keys that its own sequence has, so ragged lengths stay balanced.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import blocks, triton_lang
from pallas_kernels.block_sizes import DECODE_TURN, TritonLangDecodeBlockSizes, decode_merge, decode_rows
from pallas_kernels.triton_lang import common, launch, tiles

MAX_QUERIES = 16  # more new tokens than this are a prefill: the forward kernel's work


def unsupported(query, probe, key, value, mask, page_table, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if block_sizes is not None and query.shape[1] > MAX_QUERIES:
        return f"block_sizes: more than {MAX_QUERIES} new tokens run in the forward kernel, which has its own"
    return triton_lang.unsupported_anywhere(query, block_sizes, TritonLangDecodeBlockSizes)


def decode(query, probe, key, value, mask: blocks.Mask, page_table, *, scale, block_sizes):
    """Returns the output (B, T, N, Hv); `mask.lengths` is (B,), `mask.offset` (B,) or None for lengths - T."""
    if query.shape[1] > MAX_QUERIES:
        return _prefill(query, probe, key, value, mask, page_table, scale=scale)
    config = block_sizes or TritonLangDecodeBlockSizes.heuristic(query, key, value, mask, page_table)
    if page_table is not None:
        return _decode(query, probe, key, value, mask, page_table, scale=scale, config=config)

    def run(mask, *operands):
        return (_decode(*operands, mask, None, scale=scale, config=config),)

    return launch.batched(run)(mask, query, probe, key, value)[0]


@dataclasses.dataclass(frozen=True)
class Call(common.Scores):
    """What the kernels know when they are compiled.

    The rows of one kv head are its queries, token by token and head by head within a token, in `row_blocks` blocks of
    `size`. A contiguous cache is one page for each sequence, and `table_width` is 0.
    """

    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    num_pages: int
    page_size: int
    table_width: int
    window: int | None
    has_offset: bool
    size: int
    row_blocks: int
    block_k: int
    num_splits: int
    turn: int  # tiles by which a program begins behind the one before, 0 for none

    group = property(lambda self: self.heads // self.kv_heads)
    rows = property(lambda self: self.queries * self.group)
    capacity = property(lambda self: self.page_size * max(self.table_width, 1))
    value_width = property(lambda self: common.padded(self.value_dim))
    merged_columns = property(lambda self: decode_merge(self.num_splits, self.value_width)[0])
    merge_programs = property(lambda self: -(-self.value_dim // self.merged_columns))
    # Whether the rows of a tile may lie in several pages.
    scattered = property(lambda self: self.table_width > 0 and self.page_size % self.block_k > 0)
    # Tokens that a block of rows touches.
    tokens = property(lambda self: self.queries if self.row_blocks == 1 else -(-self.size // self.group) + 1)


@triton.jit
def _pointers(ptr, b, kv, row, width: tl.constexpr, call: tl.constexpr):
    """Pointers to rows of kv head `kv` in a (B, T, N, width) array, and which of them exist."""
    token = tl.cast(b, tl.int64) * call.queries + row // call.group
    start = (token * call.heads + kv * call.group + row % call.group) * width
    column = tl.arange(0, common.padded(width))
    return ptr + start[:, None] + column[None, :], (row < call.rows)[:, None] & (column < width)[None, :]


@triton.jit
def _page(pages_ptr, b, j, call: tl.constexpr):
    """The page that holds key block j of sequence b; of a scattered tile that of each row."""
    if call.table_width == 0:
        page = b
    else:
        key = j * call.block_k
        if call.scattered:
            key += tl.arange(0, call.block_k)
        entry = tl.minimum(key // call.page_size, call.table_width - 1)
        page = tl.load(pages_ptr + tl.cast(b, tl.int64) * call.table_width + entry)
        page = tl.minimum(tl.maximum(page, 0), call.num_pages - 1)
    return page


@triton.jit
def _load(ptr, page, key, end, kv, width: tl.constexpr, call: tl.constexpr):
    """Keys [key, key + block_k) of a kv head, or their values; those from `end` on are 0 and are not read."""
    if call.scattered:
        keys = key + tl.arange(0, call.block_k)
        row = tl.cast(page, tl.int64) * call.page_size + keys % call.page_size
        pointers = ptr + ((row * call.kv_heads + kv) * width)[:, None] + tl.arange(0, common.padded(width))[None, :]
        tile = tl.load(pointers, mask=common.inside(key, end, width, call.block_k), other=0.0)
    else:
        local = key % call.page_size  # of a contiguous cache too: so the compiler knows that it is small
        limit = end - key + local
        tile = common.load_rows(ptr, page, local, limit, kv, call.page_size, call.kv_heads, width, call.block_k)
    return tile


@triton.jit
def _is_first():
    return tl.arange(0, 2)[:, None, None] == 0


@triton.jit
def _stack(x, y):
    """`tiles.stack` without a join: a product whose operand was joined gets a layout that takes many moves."""
    return tl.where(_is_first(), x[None, :, :], y[None, :, :]).reshape(2 * x.shape[0], x.shape[1])


@triton.jit
def _unstack(x):
    """The two halves of `_stack`, in layouts that it takes without moving anything."""
    # As integers: the compiler drops a sum with 0.
    x = x.reshape(2, x.shape[0] // 2, x.shape[1]).to(tl.int32, bitcast=True)
    first, second = tl.sum(tl.where(_is_first(), x, 0), 0), tl.sum(tl.where(_is_first(), 0, x), 0)
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def _place(j, turn, stop, count, call: tl.constexpr):
    """The tile that step j reads; any order of the tiles gives the same sums."""
    if call.turn:
        j += turn
        j = tl.where(j < stop, j, j - count)
    return j


@triton.jit
def _state(q_ptr, r_ptr, k_ptr, v_ptr, offset_ptr, lengths_ptr, pages_ptr, b, kv, block, split, call: tl.constexpr):
    """State of one block of rows over one share of the keys."""
    size: tl.constexpr = call.size
    width: tl.constexpr = call.value_width
    row = block * size + tl.arange(0, size)
    if size == 8:
        # Rows 0 to 7 of one tile are queries, the others their probes: each product with keys or values is one.
        both = tl.arange(0, 16)
        q_pointers, inside = _pointers(q_ptr, b, kv, block * size + both % 8, call.head_dim, call)
        r_pointers, _ = _pointers(r_ptr, b, kv, block * size + both % 8, call.head_dim, call)
        qr = tl.load(tl.where((both < 8)[:, None], q_pointers, r_pointers), mask=inside, other=0.0)
    else:
        q_pointers, inside = _pointers(q_ptr, b, kv, row, call.head_dim, call)
        q = tl.load(q_pointers, mask=inside, other=0.0)
        r_pointers, _ = _pointers(r_ptr, b, kv, row, call.head_dim, call)
        r = tl.load(r_pointers, mask=inside, other=0.0)

    length = tl.minimum(tl.load(lengths_ptr + b), call.capacity)
    offset = length - call.queries
    if call.has_offset:
        offset = tl.load(offset_ptr + b)
    end = tl.minimum(length, offset + call.queries)
    position = row // call.group + offset
    first_token = block * size // call.group
    last = tl.minimum(length, tl.minimum(first_token + call.tokens, call.queries) + offset)
    first = 0
    if call.window is not None:
        first = tl.maximum(first_token + offset - call.window + 1, 0) // call.block_k
    last = tl.maximum((tl.maximum(last, 0) + call.block_k - 1) // call.block_k, first)
    share = (last - first + call.num_splits - 1) // call.num_splits
    start = first + split * share
    stop = tl.minimum(start + share, last)
    count = tl.maximum(stop - start, 1)
    turn = (b * call.num_splits + split) * call.turn % count

    state = tiles.initial_state(size, width)
    page = _page(pages_ptr, b, _place(start, turn, stop, count, call), call)
    # The launch's stages: given to this loop they would cover the load of the page, and then nothing overlaps.
    for j in range(start, stop):
        key = _place(j, turn, stop, count, call) * call.block_k
        k = _load(k_ptr, page, key, end, kv, call.head_dim, call)
        v = _load(v_ptr, page, key, end, kv, call.value_dim, call)
        keys = (key + tl.arange(0, call.block_k))[None, :]
        visible = (keys < length) & (keys <= position[:, None])
        if call.window is not None:
            visible = visible & (keys > position[:, None] - call.window)
        if size == 8:
            s1, s2 = _unstack(tiles.dot(qr, tl.trans(k), call))
            state, p, p2 = tiles.weigh(state, s1, s2, visible, call)
            o1, o2 = tiles.unstack(tiles.add_dot(_stack(p, p2), v, tiles.stack(state[3], state[4]), call))
            state = (state[0], state[1], state[2], o1, o2)
        else:
            s1 = tiles.dot(q, tl.trans(k), call)
            s2 = tiles.dot(r, tl.trans(k), call)
            state, p, p2 = tiles.weigh(state, s1, s2, visible, call)
            state = tiles.add_values(state, p, p2, v, call)
        # The next page is looked up a tile ahead: loads that wait for a load cannot be pipelined.
        page = _page(pages_ptr, b, _place(j + 1, turn, stop, count, call), call)
    return state


@triton.jit
def parallax_decode(
    q_ptr, r_ptr, k_ptr, v_ptr, offset_ptr, lengths_ptr, pages_ptr, out_ptr, call: tl.constexpr
):  # fmt: skip
    program, block = tl.program_id(0) // call.row_blocks, tl.program_id(0) % call.row_blocks
    b, kv = program // call.kv_heads, program % call.kv_heads
    state = _state(q_ptr, r_ptr, k_ptr, v_ptr, offset_ptr, lengths_ptr, pages_ptr, b, kv, block, 0, call)
    out, _, _, _ = tiles.finish(state)
    pointers, inside = _pointers(out_ptr, b, kv, block * call.size + tl.arange(0, call.size), call.value_dim, call)
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def parallax_decode_split(
    q_ptr, r_ptr, k_ptr, v_ptr, offset_ptr, lengths_ptr, pages_ptr, m_ptr, d1_ptr, t_mean_ptr, o1_ptr, o2_ptr,
    call: tl.constexpr,
):  # fmt: skip
    program, split = tl.program_id(0) // call.num_splits, tl.program_id(0) % call.num_splits
    program, block = program // call.row_blocks, program % call.row_blocks
    b, kv = program // call.kv_heads, program % call.kv_heads
    m, d1, t_mean, o1, o2 = _state(
        q_ptr, r_ptr, k_ptr, v_ptr, offset_ptr, lengths_ptr, pages_ptr, b, kv, block, split, call
    )
    # States are (B, K, rows, splits) and (B, K, rows, splits, Hv).
    row = block * call.size + tl.arange(0, call.size)
    at = (tl.cast(program, tl.int64) * call.rows + row) * call.num_splits + split
    tl.store(m_ptr + at, m, mask=row < call.rows)
    tl.store(d1_ptr + at, d1, mask=row < call.rows)
    tl.store(t_mean_ptr + at, t_mean, mask=row < call.rows)
    column = tl.arange(0, call.value_width)[None, :]
    inside = (row < call.rows)[:, None] & (column < call.value_dim)
    tl.store(o1_ptr + at[:, None] * call.value_dim + column, o1, mask=inside)
    tl.store(o2_ptr + at[:, None] * call.value_dim + column, o2, mask=inside)


@triton.jit
def parallax_decode_merge(m_ptr, d1_ptr, t_mean_ptr, o1_ptr, o2_ptr, out_ptr, call: tl.constexpr):
    """One row and `merged_columns` of its columns."""
    column = tl.program_id(0) % call.merge_programs * call.merged_columns + tl.arange(0, call.merged_columns)
    rows = tl.program_id(0) // call.merge_programs
    program, row = rows // call.rows, rows % call.rows
    at = tl.cast(rows, tl.int64) * call.num_splits + tl.arange(0, call.num_splits)
    values = at[:, None] * call.value_dim + column[None, :]
    inside = tl.broadcast_to((column < call.value_dim)[None, :], (call.num_splits, call.merged_columns))
    o1 = tl.load(o1_ptr + values, mask=inside, other=0.0)
    o2 = tl.load(o2_ptr + values, mask=inside, other=0.0)
    out = tiles.merged_output(tl.load(m_ptr + at), tl.load(d1_ptr + at), tl.load(t_mean_ptr + at), o1, o2)
    token = tl.cast(program // call.kv_heads, tl.int64) * call.queries + row // call.group
    head = program % call.kv_heads * call.group + row % call.group
    pointers = out_ptr + (token * call.heads + head) * call.value_dim + column
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=column < call.value_dim)


def _decode(query, probe, key, value, mask, page_table, *, scale, config: TritonLangDecodeBlockSizes):
    batch, num_queries, num_heads, head_dim = query.shape
    num_pages, page_size, num_kv_heads, value_dim = value.shape
    size, row_blocks = decode_rows(query, key, value)
    call = Call(
        scale=scale,
        precision=common.precision(query.dtype),
        queries=num_queries,
        heads=num_heads,
        kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        num_pages=num_pages,
        page_size=page_size,
        table_width=0 if page_table is None else page_table.shape[1],
        window=mask.window,
        has_offset=mask.offset is not None,
        size=size,
        row_blocks=row_blocks,
        block_k=config.block_k,
        num_splits=config.num_splits,
        turn=DECODE_TURN if config.rotate else 0,
    )
    out = jax.ShapeDtypeStruct((batch, num_queries, num_heads, value_dim), query.dtype)
    unread = mask.lengths
    arrays = (query, probe, key, value, *(unread if x is None else x for x in (mask.offset, mask.lengths, page_table)))
    programs = batch * num_kv_heads * row_blocks
    if config.num_splits == 1:
        return launch.launch(parallax_decode, arrays, (out,), programs=programs, config=config, call=call)[0]
    stat = jax.ShapeDtypeStruct((batch, num_kv_heads, call.rows, config.num_splits), jnp.float32)
    values = jax.ShapeDtypeStruct((*stat.shape, value_dim), jnp.float32)
    states = launch.launch(
        parallax_decode_split,
        arrays,
        (stat, stat, stat, values, values),
        programs=programs * config.num_splits,
        config=config,
        call=call,
    )
    merging = dataclasses.replace(config, num_warps=decode_merge(call.num_splits, call.value_width)[1], num_stages=1)
    programs = batch * num_kv_heads * call.rows * call.merge_programs
    return launch.launch(parallax_decode_merge, states, (out,), programs=programs, config=merging, call=call)[0]


def _prefill(query, probe, key, value, mask, page_table, *, scale):
    """The forward kernel, each sequence with its own offset."""
    if page_table is not None:
        key, value = (jnp.take(x, page_table, axis=0, mode="clip") for x in (key, value))
        key, value = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (key, value))
    lengths = jnp.minimum(mask.lengths, key.shape[1])
    offset = lengths - query.shape[1] if mask.offset is None else mask.offset
    sequence_masks = blocks.Mask(offset, lengths, window=mask.window)
    return triton_lang.forward(query, probe, key, value, sequence_masks, scale=scale, block_sizes=None)[0]
