"""Decode: a few new tokens against a long cache. Split-KV programs, then a merge of their states (`tiles.merge`).

Time is the reading of keys and values, once: all query rows of a kv head's group share each tile, with their probes.
Every program takes an equal share of the keys that its own sequence has, so ragged lengths stay balanced.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import blocks, device, tiles, triton
from pallas_kernels.block_sizes import TritonDecodeBlockSizes
from pallas_kernels.triton import common

MAX_QUERIES = 16  # more new tokens than this are a prefill: the forward kernel's work
ROW_BYTES = 16384  # of queries that a program holds; larger groups are cut into blocks of rows


def unsupported(query, probe, key, value, mask, page_table, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if query.dtype == jnp.float64:
        return "query: float64 runs in 'reference' and 'xla' only"
    if page_table is not None and key.shape[1] % 16:
        return f"key_cache: page size must be a multiple of 16, got {key.shape[1]}"
    if block_sizes is not None and not isinstance(block_sizes, TritonDecodeBlockSizes):
        return f"block_sizes: needs TritonDecodeBlockSizes, got {type(block_sizes).__name__}"
    if block_sizes is not None and query.shape[1] > MAX_QUERIES:
        return f"block_sizes: more than {MAX_QUERIES} new tokens run in the forward kernel, which has its own"
    return None


def decode(query, probe, key, value, mask: blocks.Mask, page_table, *, scale, block_sizes):
    """Returns the output (B, T, N, Hv); `mask.lengths` is (B,), `mask.offset` (B,) or None for lengths - T."""
    if query.shape[1] > MAX_QUERIES:
        return _prefill(query, probe, key, value, mask, page_table, scale=scale)
    config = block_sizes or heuristic(query, key, value, mask, page_table)
    return device.run(
        functools.partial(_decode, scale=scale, config=config), query, probe, key, value, mask, page_table
    )


def heuristic(query, key, value, mask: blocks.Mask, page_table) -> TritonDecodeBlockSizes:
    """Launches that fit registers and shared memory; splits until one wave of programs fills the device."""
    batch, num_queries = query.shape[:2]
    rows = _Rows.of(query, key, value)
    num_keys = key.shape[1] * (1 if page_table is None else page_table.shape[1])
    if mask.window is not None:
        num_keys = min(num_keys, mask.window + num_queries - 1)
    programs = batch * key.shape[2] * rows.blocks
    splits = max(1, min(128 // programs, num_keys // 128))
    splits = 1 << (splits.bit_length() - 1)
    if query.dtype.itemsize == 4:
        return TritonDecodeBlockSizes(16, splits, 8, 3)
    width = _width(key, value)
    held = rows.size * width  # elements of each accumulator
    if held > 4096:
        return TritonDecodeBlockSizes(32 if width <= 128 else 16, splits, 8, 3)
    if held > 2048:
        return TritonDecodeBlockSizes(32, splits, 4, 3)
    if splits == 1:
        return TritonDecodeBlockSizes(32, 1, 2, 4 if width <= 128 else 3)
    return TritonDecodeBlockSizes(64 if width <= 128 else 32, splits, 4, 3)


def _width(key, value) -> int:
    return max(common.padded(key.shape[3]), common.padded(value.shape[3]))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The query rows of one kv head, token by token and head by head within a token, cut into blocks.

    Attributes:
      group: query heads of a kv head.
      total: rows.
      size: rows of a block, which one program holds. 8 where they are so few that queries and probes fit one tile of a
        tensor core together.
    """

    group: int
    total: int
    size: int

    @classmethod
    def of(cls, query, key, value) -> "_Rows":
        """As many rows a block as its accumulators have registers for."""
        group = query.shape[2] // key.shape[2]
        total = query.shape[1] * group
        most = ROW_BYTES // (_width(key, value) * query.dtype.itemsize)
        return cls(group, total, 8 if total <= 8 else max(16, min(pl.next_power_of_2(total), most)))

    @property
    def blocks(self) -> int:
        """Blocks that hold all rows."""
        return pl.cdiv(self.total, self.size)

    def read(self, row, kv):
        """(token, head) of rows of kv head `kv`."""
        token, member = _divmod(row, self.group)
        return token, kv * self.group + member

    def spread(self, width: int, row, *per_row):
        """Per-row values, column indices and whether row and column exist, as tiles (rows, padded width)."""
        shape = (row.shape[0], common.padded(width))
        row, *others = (lax.broadcast_in_dim(x, shape, (0,)) for x in (row, *per_row))
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        return row, *others, column, (row < self.total) & (column < width)


def _divmod(x, y: int):
    """Quotient and remainder of x >= 0, without the sign handling of // and %."""
    return lax.div(x, y), lax.rem(x, y)


def _stack(x: jax.Array, y: jax.Array) -> jax.Array:
    """Two (8, n) tiles as one (16, n). In a tensor core's layout rows i and i + 8 share a thread: nothing moves."""
    shape = (2, *x.shape)
    first = lax.broadcasted_iota(jnp.int32, shape, 0) == 0
    x, y = (lax.broadcast_in_dim(z, shape, (1, 2)) for z in (x, y))
    return jnp.where(first, x, y).reshape(16, x.shape[2])


def _unstack(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two (8, n) halves of a (16, n) tile."""
    x = x.reshape(2, 8, x.shape[1])
    first = lax.broadcasted_iota(jnp.int32, x.shape, 0) == 0
    return jnp.sum(jnp.where(first, x, 0.0), axis=0), jnp.sum(jnp.where(first, 0.0, x), axis=0)


def _kernel(q_ref, r_ref, k_ref, v_ref, mask, pages_ref, *out_refs, config, scale, rows: _Rows):
    num_queries = q_ref.shape[1]
    num_pages, page_size, num_kv_heads, value_dim = v_ref.shape
    num_keys = page_size if pages_ref is None else pages_ref.shape[1] * page_size

    program, split = _divmod(pl.program_id(0), config.num_splits)
    program, block = _divmod(program, rows.blocks)
    b, kv = _divmod(program, num_kv_heads)

    row = block * rows.size + jnp.arange(rows.size)
    token, head = rows.read(row, kv)
    precision = tiles.dot_precision(q_ref.dtype)
    dot = functools.partial(common.dot, precision=precision)
    if rows.size == 8:
        # Rows 0 to 7 of one tile are queries, the others their probes: each product with keys or values is one.
        both = jnp.arange(16)
        each = lax.rem(both, 8)
        half, tokens, heads, columns, inside = rows.spread(q_ref.shape[3], each, *rows.read(each, kv))
        is_query = lax.broadcast_in_dim(both < 8, half.shape, (0,))
        masks = (inside & is_query, inside & ~is_query)
        q, r = (
            plt.load(ref.at[b, tokens, heads, columns], mask=mask, other=0.0)
            for ref, mask in zip((q_ref, r_ref), masks, strict=True)
        )
        qr = q + r
        scores = lambda k: _unstack(dot(qr, k))
        times_value = lambda p, p2, v: _unstack(dot(_stack(p, p2).astype(v.dtype), v))
    else:
        _, tokens, heads, columns, inside = rows.spread(q_ref.shape[3], row, token, head)
        q, r = (plt.load(ref.at[b, tokens, heads, columns], mask=inside, other=0.0) for ref in (q_ref, r_ref))
        scores = lambda k: (dot(q, k), dot(r, k))
        times_value = lambda p, p2, v: (dot(p.astype(v.dtype), v), dot(p2.astype(v.dtype), v))

    length = jnp.minimum(mask.lengths[b], num_keys)
    offset = (length - num_queries) if mask.offset is None else mask.offset[b]
    sight = {"offset": offset, "length": length, "is_causal": True, "window": mask.window}
    first_token, _ = _divmod(block * rows.size, rows.group)
    num_tokens = num_queries if rows.blocks == 1 else pl.cdiv(rows.size, rows.group) + 1
    bounds = blocks.key_bounds(first_token, num_tokens, config.block_k, num_queries=num_queries, **sight)
    end = blocks.visible_end(offset, num_queries, length, True)
    share, _ = _divmod(bounds.last - bounds.first + config.num_splits - 1, config.num_splits)
    start = bounds.first + split * share

    def page_of(j):
        page, _ = _divmod(j * config.block_k, page_size)
        return jnp.clip(pages_ref[b, jnp.minimum(page, pages_ref.shape[1] - 1)], 0, num_pages - 1)

    def step(j, carry):
        key = j * config.block_k
        sequence, state = carry
        local = key if pages_ref is None else _divmod(key, page_size)[1]
        limit = end - key + local
        k = common.load_rows(k_ref, sequence, local, config.block_k, kv, limit).T
        v = common.load_rows(v_ref, sequence, local, config.block_k, kv, limit)
        shape = (rows.size, config.block_k)
        visible = blocks.visible_tile(
            lax.broadcast_in_dim(token, shape, (0,)),
            key + lax.broadcasted_iota(jnp.int32, shape, 1),
            num_queries=None,
            **sight,
        )
        state, p, p2 = tiles.weigh(state, *scores(k), scale * tiles.LOG2_E, visible)
        pv, p2v = times_value(p, p2, v)
        # The next page is looked up a tile ahead: loads that wait for a load cannot be pipelined.
        sequence = b if pages_ref is None else page_of(j + 1)
        return sequence, state._replace(o1=state.o1 + pv, o2=state.o2 + p2v)

    state = tiles.initial_state((rows.size,), common.padded(value_dim))
    first = b if pages_ref is None else page_of(start)
    _, state = lax.fori_loop(start, jnp.minimum(start + share, bounds.last), step, (first, state))

    rows_v, tokens, heads, columns, inside = rows.spread(value_dim, row, token, head)
    if config.num_splits == 1:
        out = tiles.finish(state)[0].astype(out_refs[0].dtype)
        plt.store(out_refs[0].at[b, tokens, heads, columns], out, mask=inside)
        return
    for ref, x in zip(out_refs, state, strict=True):
        if x.ndim == 1:
            plt.store(ref.at[b, kv, row, split], x, mask=row < rows.total)
        else:
            plt.store(ref.at[b, kv, rows_v, split, columns], x, mask=inside)


def _merge_kernel(state_refs: tiles.State, out_ref, *, rows: _Rows):
    _, num_kv_heads, _, num_splits, value_dim = state_refs.o1.shape
    program, row = _divmod(pl.program_id(0), rows.total)
    b, kv = _divmod(program, num_kv_heads)
    # A start known only at run time lets the slice reach past the head's width; the mask hides what lies there.
    splits, columns = pl.ds(0, num_splits), pl.ds(b * 0, common.padded(value_dim))
    inside = jnp.arange(common.padded(value_dim)) < value_dim
    spread = lax.broadcast_in_dim(inside, (num_splits, inside.shape[0]), (1,))
    values = lambda ref: plt.load(ref.at[b, kv, row, splits, columns], mask=spread, other=0.0)
    states = (values(ref) if ref.ndim == 5 else ref[b, kv, row, splits] for ref in state_refs)
    out, *_ = tiles.finish(tiles.merge(tiles.State(*states)))
    token, head = rows.read(row, kv)
    plt.store(out_ref.at[b, token, head, columns], out.astype(out_ref.dtype), mask=inside)


def _decode(query, probe, key, value, mask, page_table, *, scale, config: TritonDecodeBlockSizes, interpret: bool):
    batch, num_queries, num_heads, _ = query.shape
    page_size, num_kv_heads, value_dim = value.shape[1:]
    rows = _Rows.of(query, key, value)
    if page_table is not None:
        # The largest tile of which a page holds a whole number.
        config = dataclasses.replace(config, block_k=min(config.block_k, page_size & -page_size))
    out = jax.ShapeDtypeStruct((batch, num_queries, num_heads, value_dim), query.dtype)
    stat = jax.ShapeDtypeStruct((batch, num_kv_heads, rows.total, config.num_splits), jnp.float32)
    values = jax.ShapeDtypeStruct((*stat.shape, value_dim), jnp.float32)
    result = pl.pallas_call(
        functools.partial(_kernel, config=config, scale=scale, rows=rows),
        out_shape=out if config.num_splits == 1 else tiles.State(stat, stat, stat, values, values),
        grid=common.grid_size(batch, num_kv_heads, rows.blocks, config.num_splits),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="parallax_decode",
    )(query, probe, key, value, mask, page_table)
    if config.num_splits == 1:
        return result
    return pl.pallas_call(
        functools.partial(_merge_kernel, rows=rows),
        out_shape=out,
        grid=common.grid_size(batch, num_kv_heads, rows.total),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="parallax_decode_merge",
    )(result)


def _prefill(query, probe, key, value, mask, page_table, *, scale):
    """The forward kernel, each sequence with its own offset."""
    if page_table is not None:
        key, value = (jnp.take(x, page_table, axis=0, mode="clip") for x in (key, value))
        key, value = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (key, value))

    def one(offset, length, *operands):
        sequence_mask = blocks.Mask(offset, length[None], window=mask.window)
        return triton.forward(*(x[None] for x in operands), sequence_mask, scale=scale, block_sizes=None)[0][0]

    lengths = jnp.minimum(mask.lengths, key.shape[1])
    offset = lengths - query.shape[1] if mask.offset is None else mask.offset
    return jax.vmap(one)(offset, lengths, query, probe, key, value)
