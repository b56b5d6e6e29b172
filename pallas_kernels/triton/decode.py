"""Decode: a few new tokens against a long cache. Split-KV programs, then a merge (`tiles.merged_output`).

Time is the reading of keys and values, once: all query rows of a kv head's group share each tile, with their probes.
Every program takes an equal share of the keys that its own sequence has, so ragged lengths stay balanced.

`append` is a step of generation in one kernel: it norms and rotates what the projections left, writes the new key and
value, attends, and the last program of a head to finish merges the splits, always in the same order.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import blocks, device, tiles, triton
from pallas_kernels.block_sizes import (
    DECODE_TURN,
    TritonDecodeBlockSizes,
    decode_merge,
    decode_rows,
    shared_memory_limit,
)
from pallas_kernels.triton import common

MAX_QUERIES = 16  # more new tokens than this are a prefill: the forward kernel's work
MERGED = 2048  # elements of an accumulator that a warp of `append` merges at once


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "gains", "rotations"],
    meta_fields=["epsilon", "ring"],
)
@dataclasses.dataclass(frozen=True)
class Fresh:
    """One new token per sequence as the projections leave it, for `append`.

    Attributes:
      key: (B, 1, K, H), neither normed nor rotated, as are query and probe.
      value: (B, 1, K, Hv).
      gains: (H,) gain of the RMS norm of query, probe and key, None where there is no norm.
      rotations: for query, probe and key None or the factors (B, H), float32, of a dimension and of its partner.
      epsilon: of the norms.
      ring: key s sits in row s % S of the cache, which holds the window and no more.
    """

    key: jax.Array
    value: jax.Array
    gains: tuple
    rotations: tuple
    epsilon: float
    ring: bool


def unsupported(query, probe, key, value, mask, page_table, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if query.dtype == jnp.float64:
        return "query: float64 runs in 'reference' and 'xla' only"
    if block_sizes is not None and not isinstance(block_sizes, TritonDecodeBlockSizes):
        return f"block_sizes: needs TritonDecodeBlockSizes, got {type(block_sizes).__name__}"
    if block_sizes is not None and query.shape[1] > MAX_QUERIES:
        return f"block_sizes: more than {MAX_QUERIES} new tokens run in the forward kernel, which has its own"
    return None


def decode(query, probe, key, value, mask: blocks.Mask, page_table, *, scale, block_sizes):
    """Returns the output (B, T, N, Hv); `mask.lengths` is (B,), `mask.offset` (B,) or None for lengths - T.

    A probe that is None asks for softmax attention, of at most `MAX_QUERIES` new tokens.
    """
    if query.shape[1] > MAX_QUERIES:
        return _prefill(query, probe, key, value, mask, page_table, scale=scale)
    config = block_sizes or TritonDecodeBlockSizes.heuristic(query, key, value, mask, page_table)
    call = functools.partial(_decode, scale=scale, config=config)
    return device.run(call, query, probe, key, value, None, mask, page_table, None)


def append(query, probe, key, value, counters, mask: blocks.Mask, page_table, fresh: Fresh, *, scale, block_sizes=None):
    """Writes each sequence's new token to its cache and attends from it.

    Args:
      query: (B, 1, N, H), neither normed nor rotated.
      probe: (B, 1, N, H), likewise; None for softmax attention.
      key: the cache's keys, as `parallax_decode` takes them.
      value: its values.
      counters: int32, B times the query heads or more of them, all zero; they come back zero.
      mask: `offset` (B,) is the sequences' lengths so far, `lengths` (B,) those with the new token; where they are the
        same there is none. A window, unless the cache is a ring.
      page_table: as in `parallax_decode`.
      fresh: the new keys and values, and what is to be done to them.
      scale: factor on query . key.
      block_sizes: the launch; None for the default.

    Returns:
      The output (B, 1, N, Hv), key, value and counters. A token without a place in the cache is written nowhere.
    """
    heuristic = TritonDecodeBlockSizes.heuristic(query, key, value, mask, page_table)
    config = block_sizes or _append_launch(heuristic, key, value)
    call = functools.partial(_decode, scale=scale, config=config)
    return device.run(call, query, probe, key, value, counters, mask, page_table, fresh)


def _append_launch(config: TritonDecodeBlockSizes, key, value) -> TritonDecodeBlockSizes:
    """The launch of `append` where plain decode has `config`."""
    changes = {}
    if config.block_k * max(64, key.shape[3], value.shape[3]) > 4096:
        changes["num_warps"] = max(4, config.num_warps)  # two have no registers for new rows beside a long tile
    kind = device.target()[1]
    if config.num_splits >= 32 and any(name in kind for name in device.HOPPER):
        # One program merges them all: half as many, each with more tiles on their way.
        tile = config.block_k * sum(common.padded(x.shape[3]) * x.dtype.itemsize for x in (key, value))
        stages = min(5, shared_memory_limit(kind) // tile)
        changes |= {"num_splits": config.num_splits // 2, "num_stages": max(config.num_stages, stages)}
    return dataclasses.replace(config, **changes)


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
        """Those of `decode_rows`."""
        group = query.shape[2] // key.shape[2]
        return cls(group, query.shape[1] * group, decode_rows(query, key, value)[0])

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


def _pair(x: jax.Array, y: jax.Array) -> jax.Array:
    """Two arrays of one shape along a new first axis."""
    shape = (2, *x.shape)
    first = lax.broadcasted_iota(jnp.int32, shape, 0) == 0
    x, y = (lax.broadcast_in_dim(z, shape, tuple(range(1, len(shape)))) for z in (x, y))
    return jnp.where(first, x, y)


def _unpair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two along the first axis."""
    first = lax.broadcasted_iota(jnp.int32, x.shape, 0) == 0
    # The compiler drops a sum with -0.0, one with 0.0 it must not.
    return jnp.sum(jnp.where(first, x, -0.0), axis=0), jnp.sum(jnp.where(first, -0.0, x), axis=0)


def _stack(x: jax.Array, y: jax.Array | None = None) -> jax.Array:
    """Two (8, n) tiles, the second 0 where it is None, as one (16, n).

    In a tensor core's layout rows i and i + 8 share a thread: nothing moves.
    """
    return _pair(x, jnp.zeros_like(x) if y is None else y).reshape(16, x.shape[1])


def _unstack(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two (8, n) halves of a (16, n) tile."""
    return _unpair(x.reshape(2, 8, x.shape[1]))


def _sums(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over the keys of two (8, n) tiles, for which the warps of a program meet once."""
    return _unpair(jnp.sum(_pair(x, y), axis=2))


def _turned(ref, gain_ref, rotation, epsilon, b, heads, columns, inside):
    """Loads rows of token 0 of `heads`; returns a function that norms and rotates them, when all is asked for."""
    width = ref.shape[3]
    load = lambda columns: plt.load(ref.at[b, heads * 0, heads, columns], mask=inside, other=0.0).astype(jnp.float32)
    factor = lambda ref, columns: plt.load(ref.at[columns], mask=inside, other=0.0).astype(jnp.float32)
    partners = _divmod(columns + width // 2, width)[1]
    x, y = load(columns), load(partners)
    gains = None if gain_ref is None else (factor(gain_ref, columns), factor(gain_ref, partners))
    factors = None
    if rotation is not None:
        factors = [plt.load(ref.at[b, columns], mask=inside, other=0.0) for ref in rotation]

    def turn():
        rows = x, y
        if gains is not None:
            # Not ** -0.5, whose branches hold up the loads after them.
            inverse = tiles.spread(lax.rsqrt(jnp.sum(x * x, axis=1) / width + epsilon), x)
            rows = [z * inverse * gain for z, gain in zip(rows, gains, strict=True)]
        turned = rows[0] if factors is None else rows[0] * factors[0] + rows[1] * factors[1]
        return turned.astype(ref.dtype)

    return turn


@dataclasses.dataclass
class _New:
    """The new token of one kv head in one program.

    Attributes:
      turn: gives the key (1, padded H), normed and rotated.
      value: (1, padded Hv).
      is_new: whether there is one.
      sequence: sequence or page of the cache in which it belongs.
      row: its row there.
      has_place: whether there is such a place.
    """

    turn: Callable[[], jax.Array]
    value: jax.Array
    is_new: jax.Array
    sequence: jax.Array
    row: jax.Array
    has_place: jax.Array

    @classmethod
    def read(cls, k_ref, fresh: Fresh, pages_ref, b, kv, *, is_new, offset):
        """Loads it and looks up its place."""
        num_pages, page_size = k_ref.shape[:2]
        if fresh.ring:
            place = b, _divmod(offset, page_size)[1], is_new
        elif pages_ref is None:
            place = b, offset, is_new & (offset < page_size)
        else:
            number, row = _divmod(offset, page_size)
            page = pages_ref[b, jnp.minimum(number, pages_ref.shape[1] - 1)]
            place = page, row, is_new & (number < pages_ref.shape[1]) & (page >= 0) & (page < num_pages)
        heads, columns, inside = cls._tile(kv, fresh.key.shape[3])
        turn = _turned(fresh.key, fresh.gains[2], fresh.rotations[2], fresh.epsilon, b, heads, columns, inside)
        heads, columns, inside = cls._tile(kv, fresh.value.shape[3])
        value = plt.load(fresh.value.at[b, heads * 0, heads, columns], mask=inside, other=0.0)
        return cls(turn, value, is_new, *place)

    @staticmethod
    def _tile(kv, width: int):
        """Head and column of each element, and which are there."""
        column = lax.broadcasted_iota(jnp.int32, (1, common.padded(width)), 1)
        return kv + column * 0, column, column < width

    @staticmethod
    def tile(x: jax.Array) -> jax.Array:
        """16 rows, of which the first is `x` and the others are 0."""
        shape = (16, x.shape[1])
        return jnp.where(lax.broadcasted_iota(jnp.int32, shape, 0) == 0, jnp.broadcast_to(x, shape), jnp.zeros_like(x))

    def store(self, key_ref, value_ref, key, kv, here):
        """Writes it to the cache, where `here` says that this program does."""
        for ref, x in ((key_ref, key), (value_ref, self.value)):
            heads, columns, inside = self._tile(kv, ref.shape[3])
            at = ref.at[self.sequence, self.row + columns * 0, heads, columns]
            plt.store(at, x, mask=inside & (here & self.has_place))


def _kernel(
    q_ref,
    r_ref,
    k_ref,
    v_ref,
    counters,
    mask,
    pages_ref,
    fresh,
    *out_refs,
    config,
    scale,
    rows: _Rows,
    interpret: bool,
):
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

    def read(tokens, heads, columns, inside_q, inside_r):
        """Loads tiles of queries and, where there are any, probes; returns functions that give them."""

        def load(i, ref, inside):
            if fresh is None:
                x = plt.load(ref.at[b, tokens, heads, columns], mask=inside, other=0.0)
                return lambda: x
            return _turned(ref, fresh.gains[i], fresh.rotations[i], fresh.epsilon, b, heads, columns, inside)

        q = load(0, q_ref, inside_q)
        return (q,) if r_ref is None else (q, load(1, r_ref, inside_r))

    if rows.size == 8:
        # Rows 0 to 7 of one tile are queries, the others their probes: each product with keys or values is one.
        both = jnp.arange(16)
        of_row = lax.rem(both, 8)
        half, tokens, heads, columns, inside = rows.spread(q_ref.shape[3], of_row, *rows.read(of_row, kv))
        is_query = lax.broadcast_in_dim(both < 8, half.shape, (0,))
        loaded = read(tokens, heads, columns, inside & is_query, inside & ~is_query)
        scores, sums = lambda k: _unstack(dot(each[0], k)), _sums
        add = lambda o, p, v: _unstack(_stack(*o) + dot(_stack(*p).astype(v.dtype), v))
    else:
        _, tokens, heads, columns, inside = rows.spread(q_ref.shape[3], row, token, head)
        loaded = read(tokens, heads, columns, inside, inside)
        scores, sums = lambda k: [dot(x, k) for x in each], tiles.sums
        add = lambda o, p, v: [o_ + dot(p_.astype(v.dtype), v) for o_, p_ in zip(o, p, strict=True)]

    length = jnp.minimum(mask.lengths[b], num_keys)
    offset = (length - num_queries) if mask.offset is None else mask.offset[b]
    if fresh is not None:
        length = jnp.minimum(offset, num_keys)  # what the cache holds: the new key is at hand
        new = _New.read(k_ref, fresh, pages_ref, b, kv, is_new=mask.lengths[b] > offset, offset=offset)
    each = [give() for give in loaded]
    if rows.size == 8:
        each = [functools.reduce(jnp.add, each)]
    sight = {"offset": offset, "length": length, "is_causal": True, "window": mask.window}
    first_token, _ = _divmod(block * rows.size, rows.group)
    num_tokens = num_queries if rows.blocks == 1 else pl.cdiv(rows.size, rows.group) + 1
    bounds = blocks.key_bounds(first_token, num_tokens, config.block_k, num_queries=num_queries, **sight)
    end = blocks.visible_end(offset, num_queries, length, True)
    share, _ = _divmod(bounds.last - bounds.first + config.num_splits - 1, config.num_splits)
    start = bounds.first + split * share
    stop = jnp.minimum(start + share, bounds.last)
    count = jnp.maximum(stop - start, 1)
    turn = _divmod((b * config.num_splits + split) * DECODE_TURN, count)[1] if config.rotate else 0
    # Any order of the tiles gives the same sums.
    place = lambda j: jnp.where(j + turn < stop, j + turn, j + turn - count) if config.rotate else j

    def absorb(state, k, v, visible):
        s1, *s2 = scores(k)
        if r_ref is None:
            state, p = tiles.weigh_softmax(state, s1, scale * tiles.LOG2_E, visible)
            return state._replace(o1=add([state.o1], [p], v)[0])
        state, p, p2 = tiles.weigh(state, s1, *s2, scale * tiles.LOG2_E, visible, sums)
        o1, o2 = add([state.o1, state.o2], [p, p2], v)
        return state._replace(o1=o1, o2=o2)

    def page_of(j):
        """The page of tile j, or of each of its rows where a tile may span pages."""
        key = j * config.block_k
        if page_size % config.block_k:
            key += jnp.arange(config.block_k)
        entry = jnp.minimum(_divmod(key, page_size)[0], pages_ref.shape[1] - 1)
        page = pages_ref[b, entry] if entry.ndim == 0 else plt.load(pages_ref.at[b, entry])
        return jnp.clip(page, 0, num_pages - 1)

    def load(ref, sequence, key):
        """Keys [key, key + block_k) of a sequence or its pages, or values; those from `end` on are 0 and not read."""
        local = key if pages_ref is None else _divmod(key, page_size)[1]
        if jnp.ndim(sequence) == 0:
            return common.load_rows(ref, sequence, local, config.block_k, kv, end - key + local)
        keys, width = key + jnp.arange(config.block_k), common.padded(ref.shape[3])
        spread = lambda x: lax.broadcast_in_dim(x, (config.block_k, width), (0,))
        column = lax.broadcasted_iota(jnp.int32, (config.block_k, width), 1)
        inside = spread(keys < end) & (column < ref.shape[3])
        at = ref.at[spread(sequence), spread(_divmod(keys, page_size)[1]), kv + column * 0, column]
        return plt.load(at, mask=inside, other=0.0)

    def step(j, carry):
        key = place(j) * config.block_k
        sequence, state = carry
        k, v = load(k_ref, sequence, key).T, load(v_ref, sequence, key)
        shape = (rows.size, config.block_k)
        visible = blocks.visible_tile(
            lax.broadcast_in_dim(token, shape, (0,)),
            key + lax.broadcasted_iota(jnp.int32, shape, 1),
            num_queries=None,
            **sight,
        )
        if fresh is not None and fresh.ring:
            visible &= key + lax.broadcasted_iota(jnp.int32, shape, 1) != new.row  # it left the window
        # The next page is looked up a tile ahead: loads that wait for a load cannot be pipelined.
        sequence = b if pages_ref is None else page_of(place(j + 1))
        return sequence, absorb(state, k, v, visible)

    state = tiles.initial_state((rows.size,), common.padded(value_dim))
    if r_ref is None:
        state = state._replace(t_mean=None, o2=None)
    first = b if pages_ref is None else page_of(place(start))
    _, state = lax.fori_loop(start, stop, step, (first, state))
    if fresh is not None:
        is_last = split == config.num_splits - 1  # it has the fewest keys
        only = lax.broadcasted_iota(jnp.int32, (rows.size, 16), 1) == 0
        out_ref, key_out, value_out, *rest = out_refs
        counters, out_refs = rest or (None, out_refs)

        def take(state):
            new_key = new.turn()
            new.store(key_out, value_out, new_key, kv, block == 0)
            return absorb(state, new.tile(new_key).T, new.tile(new.value), only & new.is_new)

        state = take(state) if config.num_splits == 1 else lax.cond(is_last, take, lambda state: state, state)
        if not interpret:  # not before: the next kernel's programs would crowd where the first of these end
            state = state._replace(m=common.release_next(state.m))

    rows_v, tokens, heads, columns, inside = rows.spread(value_dim, row, token, head)
    if config.num_splits == 1:
        out = tiles.finish(state)[0].astype(out_refs[0].dtype)
        plt.store(out_refs[0].at[b, tokens, heads, columns], out, mask=inside)
        return
    for ref, x in zip(jax.tree.leaves(tuple(out_refs)), jax.tree.leaves(state), strict=True):
        if x.ndim == 1:
            plt.store(ref.at[b, kv, row, split], x, mask=row < rows.total)
        else:
            plt.store(ref.at[b, kv, rows_v, split, columns], x, mask=inside)
    if fresh is None:
        return
    if not interpret:
        plt.debug_barrier()  # the program's states are written before one of its threads says so
    arrived = plt.atomic_add(counters, (program * rows.blocks + block,), jnp.int32(1))

    @pl.when(arrived == config.num_splits - 1)
    def _():
        width, held = common.padded(value_dim), min(rows.size, pl.next_power_of_2(rows.total))
        # Few rows at once, each of which is code of its own.
        size = min(held, 4, max(1, MERGED * config.num_warps // (config.num_splits * width)))
        states, first = tiles.State(*out_refs), block * rows.size
        merge = lambda i, _: _merge(states, out_ref, b, kv, first + i * size, size, rows, 0, width)
        lax.fori_loop(0, held // size, merge, None)
        counters[program * rows.blocks + block] = 0  # for the next layer


def _merge_kernel(state_refs: tiles.State, out_ref, *, rows: _Rows, width: int):
    columns = pl.cdiv(out_ref.shape[3], width)
    program, column = _divmod(pl.program_id(0), columns)
    program, row = _divmod(program, rows.total)
    b, kv = _divmod(program, state_refs.o1.shape[1])
    _merge(state_refs, out_ref, b, kv, row, 1, rows, column * width, width)


def _merge(state_refs: tiles.State, out_ref, b, kv, first, size: int, rows: _Rows, first_column, width: int) -> None:
    """Merges the splits' states of `size` rows and `width` columns from the first of each on; writes their output.

    Tiles of two axes alone: a third, of rows, costs moves between layouts that take longer than the sums.
    """
    num_splits, value_dim = state_refs.o1.shape[3:]
    split = jnp.arange(num_splits)
    shape = (num_splits, width)
    splits, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    column += first_column

    def load(ref, row):
        if ref.ndim == 4:
            return plt.load(ref.at[b, kv, row, split], mask=split * 0 + row < rows.total, other=0.0)
        return plt.load(ref.at[b, kv, row, splits, column], mask=(row < rows.total) & (column < value_dim), other=0.0)

    numbers = [first + i for i in range(size)]
    loaded = [jax.tree.map(functools.partial(load, row=row), state_refs) for row in numbers]  # all before the first sum
    column = first_column + jnp.arange(width)
    for row, states in zip(numbers, loaded, strict=True):
        token, head = rows.read(row, kv)
        out = tiles.merged_output(states).astype(out_ref.dtype)
        plt.store(out_ref.at[b, token, head, column], out, mask=(row < rows.total) & (column < value_dim))


def _decode(
    query,
    probe,
    key,
    value,
    counters,
    mask,
    page_table,
    fresh: Fresh | None,
    *,
    scale,
    config: TritonDecodeBlockSizes,
    interpret: bool,
):
    batch, num_queries, num_heads, _ = query.shape
    num_kv_heads, value_dim = value.shape[2:]
    rows = _Rows.of(query, key, value)
    out = jax.ShapeDtypeStruct((batch, num_queries, num_heads, value_dim), query.dtype)
    stat = jax.ShapeDtypeStruct((batch, num_kv_heads, rows.total, config.num_splits), jnp.float32)
    values = jax.ShapeDtypeStruct((*stat.shape, value_dim), jnp.float32)
    states = tiles.State(stat, stat, stat, values, values)
    if probe is None:
        states = states._replace(t_mean=None, o2=None)
    shapes, aliases = (out,) if config.num_splits == 1 else states, {}
    if fresh is not None:
        inputs = (key, value) if config.num_splits == 1 else (key, value, counters)
        first = 1 if probe is None else 2
        aliases = {first + i: 1 + i for i in range(len(inputs))}
        shapes = (out, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs))
        shapes += () if config.num_splits == 1 else (states,)
    results = pl.pallas_call(
        functools.partial(_kernel, config=config, scale=scale, rows=rows, interpret=interpret),
        out_shape=shapes,
        grid=common.grid_size(batch, num_kv_heads, rows.blocks, config.num_splits),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        input_output_aliases=aliases,
        interpret=interpret,
        name="parallax_decode",
    )(query, probe, key, value, counters, mask, page_table, fresh)
    if fresh is not None:
        return *results[:3], counters if config.num_splits == 1 else results[3]
    if config.num_splits == 1:
        return results[0]
    width, num_warps = decode_merge(config.num_splits, common.padded(value_dim))
    return pl.pallas_call(
        functools.partial(_merge_kernel, rows=rows, width=width),
        out_shape=out,
        grid=common.grid_size(batch, num_kv_heads, rows.total, pl.cdiv(value_dim, width)),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="parallax_decode_merge",
    )(results)


def _prefill(query, probe, key, value, mask, page_table, *, scale):
    """The forward kernel, each sequence with its own offset."""
    if probe is None:
        raise NotImplementedError(f"probe: None takes at most {MAX_QUERIES} new tokens, got {query.shape[1]}")
    if page_table is not None:
        key, value = (jnp.take(x, page_table, axis=0, mode="clip") for x in (key, value))
        key, value = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (key, value))

    def one(offset, length, *operands):
        sequence_mask = blocks.Mask(offset, length[None], window=mask.window)
        return triton.forward(*(x[None] for x in operands), sequence_mask, scale=scale, block_sizes=None)[0][0]

    lengths = jnp.minimum(mask.lengths, key.shape[1])
    offset = lengths - query.shape[1] if mask.offset is None else mask.offset
    return jax.vmap(one)(offset, lengths, query, probe, key, value)
