"""Decode for Hopper in one kernel: the programs that share a head's keys are a cluster, which merges their states.

A program's warpgroups take the tiles of keys in turn with those of the cluster's other programs. At its end each writes
its states into the shared memory of these programs, a row of queries to each, and where they have met, every program
merges its rows. So there is no second kernel and no way through global memory, and since the first tile of a warpgroup
lies where it lies whatever the lengths are, it is on its way before they are known.

Of each tile a warp takes a quarter of the keys, with matrix instructions of its own, and keeps a state of its own; at
the end a warpgroup's four become one.
"""

import functools
import math
import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks, tiles
from pallas_kernels.block_sizes import SHARED_MEMORY, MosaicGpuDecodeBlockSizes, decode_capacity
from pallas_kernels.mosaic_gpu import common, registers
from pallas_kernels.mosaic_gpu.registers import ROWS

BARRIERS = 1024  # bytes of shared memory, no fewer than barriers take


def unsupported(query, probe, key, value, mask, page_table, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query: needs bfloat16 or float16, got {query.dtype}"
    rows = query.shape[1] * query.shape[2] // key.shape[2]
    if rows > ROWS:
        return f"query: needs at most {ROWS} rows for each kv head, got {rows}"
    if key.shape[3] not in common.WIDTHS or value.shape[3] != key.shape[3]:
        return f"key_cache: needs keys and values both {common.WIDTHS} wide, got {key.shape[3]} and {value.shape[3]}"
    if key.shape[1] % 8:  # the rows of a swizzled tile
        return f"key_cache: needs room for a multiple of 8 keys, got {key.shape[1]}"
    if block_sizes is not None and not isinstance(block_sizes, MosaicGpuDecodeBlockSizes):
        return f"block_sizes: needs MosaicGpuDecodeBlockSizes, got {type(block_sizes).__name__}"
    config = block_sizes or MosaicGpuDecodeBlockSizes.heuristic(query, key, value, mask, page_table)
    if page_table is not None and max(key.shape[1], config.block_k) % min(key.shape[1], config.block_k):
        return f"page_table: needs pages of a multiple or a part of {config.block_k} keys, got {key.shape[1]}"
    tiles_there = pl.cdiv(decode_capacity(key, page_table), config.block_k)
    if config.num_parts > tiles_there:
        return f"block_sizes: {config.num_parts} warpgroups share the cache's {tiles_there} tiles"
    width, num_sums = key.shape[3], 1 if probe is None else 2
    states = pl.cdiv(rows, config.num_splits) * config.num_parts if config.num_parts > 1 else 0
    of_warps = math.prod(registers.sums_scratch(rows, num_sums, width)) + math.prod(registers.stats_scratch(rows))
    num_bytes = config.num_groups * (config.num_stages * 4 * config.block_k * width + 4 * of_warps)
    num_bytes += states * 4 * (num_sums * width + 4)
    if num_bytes > SHARED_MEMORY["H100"] - BARRIERS:
        return f"block_sizes: tiles under way and states take {num_bytes} bytes, more than shared memory has"
    return common.unsupported_device()


def outrun(query, probe, key, value, mask, page_table) -> str | None:
    """Why another backend is faster at a call that this one supports, or None."""
    return MosaicGpuDecodeBlockSizes.outrun(query, key, value, mask, page_table)


class Walk(NamedTuple):
    """A warpgroup's way along its tiles of keys and values.

    Attributes:
      count: tiles, at least one.
      wait_for: (name, i) -> tile i of "k" or "v" in shared memory, once it has landed.
      done: (name, i) says that the tile has been used.
      visible: (i, like) -> which rows see which keys of their warp's quarter of tile i, as `like` is laid out.
      num_keys: i -> from which row on nothing is known of tile i.
    """

    count: jax.Array | int
    wait_for: Callable
    done: Callable
    visible: Callable
    num_keys: Callable


def attend(queries, rows: int, num_sums: int, walk: Walk, stats_ref, sums_ref, *, c, block, interpret) -> tiles.State:
    """The state of rows of queries over some tiles of keys, of each of which a warp takes a quarter.

    The loop is rotated as in the forward pass: the product with the values of tile i runs under the softmax of tile
    i + 1.

    Args:
      queries: queries and probes, as `registers.gather` gives them; the values' width is theirs.
      rows: queries that there are.
      num_sums: 2, or 1 where there are no probes.
      walk: the tiles.
      stats_ref: for `registers.of_all_warps`.
      sums_ref: for `registers.share_out`.
      c: factor on scores, in base 2.
      block: keys of a tile.
      interpret: whether Pallas' interpreter runs.

    Returns:
      A state of all keys, whose sums over values are shared out among warps.
    """
    num_rows = queries.shape[0] // 2
    of_results = registers.results_layout(num_rows)
    zeros = lambda *shape: plgpu.layout_cast(
        jnp.zeros((num_rows, *shape), jnp.float32), of_results if shape else of_results.reduce(1)
    )

    def scores(i):
        products = registers.scores(queries, walk.wait_for("k", i), num_sums, interpret)
        walk.done("k", i)
        return products

    def weights(i, stats, s1, t=None):
        """Statistics of the rows moved by tile i, the factor of their sums, and its weights."""
        visible = walk.visible(i, s1)
        m, d1, t_mean = stats
        if t is None:
            m, a, p = tiles.softmax_weights(m, s1, c, visible)
            return (m, a * d1 + jnp.sum(p, axis=-1), None), a, registers.interleaved([p], queries.dtype, interpret)
        t = jnp.where(visible, t, 0.0)  # whatever lies there
        stats, a, *both = tiles.weigh_rows(m, d1, t_mean, s1, t, c, visible)
        return stats, a, registers.interleaved(both, queries.dtype, interpret)

    def add_values(i, sums, p):
        num_keys, values = walk.num_keys(i), walk.wait_for("v", i)
        pl.when(num_keys < block)(lambda: registers.hide(values, num_keys, interpret))
        sums = registers.add_values(sums, p, values, interpret)
        walk.done("v", i)
        return sums

    def body(i, carry):
        stats, p, sums = carry
        products = scores(i)
        sums = add_values(i - 1, sums, p)
        moved, a, p = weights(i, stats, *products)
        if num_sums == 1:
            return moved, p, [tiles.spread(a, sums[0]) * sums[0]]
        return moved, p, list(tiles.move_values(*sums, a, stats[2] - moved[2]))

    sums = [zeros(queries.shape[1]) for _ in range(num_sums)]
    stats, _, p = weights(0, (zeros() - jnp.inf, zeros(), zeros() if num_sums == 2 else None), *scores(0))
    if not isinstance(walk.count, int) or walk.count > 1:
        stats, p, sums = lax.fori_loop(1, walk.count, body, (stats, p, sums))
    stats = registers.of_all_warps([x for x in stats if x is not None], stats_ref, interpret)
    sums = registers.share_out(add_values(walk.count - 1, sums, p), sums_ref, rows, interpret)
    absent = [None] * (2 - num_sums)
    return tiles.merge([tiles.State(*x, *absent, *y, *absent) for x, y in zip(stats, sums, strict=True)])


def decode(query, probe, key, value, mask: blocks.Mask, page_table, *, scale, block_sizes):
    """Returns the output (B, T, N, Hv); `mask.lengths` is (B,), `mask.offset` (B,) or None for lengths - T.

    A probe that is None asks for softmax attention.
    """
    config = block_sizes or MosaicGpuDecodeBlockSizes.heuristic(query, key, value, mask, page_table)
    interpret = common.is_interpreted()
    batch, num_queries, heads, width = query.shape
    num_pages, page_size, kv_heads, _ = key.shape
    group_heads = heads // kv_heads
    rows = num_queries * group_heads
    dtype, c = query.dtype, scale * tiles.LOG2_E
    block, num_splits, groups, stages = config.block_k, config.num_splits, config.num_groups, config.num_stages
    num_parts, num_keys = config.num_parts, decode_capacity(key, page_table)
    has_one_tile = num_keys <= num_parts * block  # every warpgroup, of each head
    slots = pl.cdiv(rows, num_splits)
    pieces = 1 if page_table is None else pl.cdiv(block, page_size)  # of a tile
    integers = {"lengths": mask.lengths, "offset": mask.offset, "pages": page_table}
    integers = {name: x for name, x in integers.items() if x is not None}
    probes = [] if probe is None else [probe]
    num_sums = 1 + len(probes)

    def kernel(q_ref, *refs, **scratch):
        s = types.SimpleNamespace(**scratch)
        (*r_ref, k_ref, v_ref), refs = refs[: len(probes) + 2], refs[len(probes) + 2 :]
        given, out_refs = dict(zip(integers, refs, strict=False)), refs[len(integers) :]
        program, group = lax.axis_index("program"), lax.axis_index("group")
        if interpret:
            program, own = lax.div(program, num_splits), lax.rem(program, num_splits)
        else:
            own = lax.axis_index("split") if num_splits > 1 else 0
        part = own * groups + group
        b, kv = (f(program, kv_heads) for f in (lax.div, lax.rem))
        slot = lambda i: group * stages + common.ring_slot(i, stages)  # of the warpgroup's i-th tile

        def copy(i, start, names="kv"):
            """Starts to copy keys [start, start + block), their values or both, into the slots of tile i."""

            def piece(first, sequence, row):
                for name in names:
                    ref, to, ready = (k_ref, s.k, s.k_ready) if name == "k" else (v_ref, s.v, s.v_ready)
                    here = ref.at[sequence, pl.ds(row, block // pieces), kv]
                    there = to.at[slot(i), pl.ds(first, block // pieces)]
                    plgpu.copy_gmem_to_smem(here, there, ready.at[slot(i)])

            if page_table is None:
                return piece(0, b, start)
            for first in range(0, block, block // pieces):
                entry = jnp.minimum(lax.div(start + first, page_size), page_table.shape[1] - 1)
                page = jnp.clip(given["pages"][b, entry], 0, num_pages - 1)
                piece(first, page, lax.rem(start + first, page_size))

        is_early, is_large = mask.window is None, 2 * block * width >= 32 << 10
        if is_early:
            copy(0, part * block, "k" if is_large else "kv")
        if page_table is not None and not interpret:
            registers.prefetch(given["pages"], b)
        if num_splits > 1 and not interpret:
            rows_here = lax.div(rows - 1 - own + num_splits, num_splits)
            registers.expect(s.inbox, rows_here * num_parts * 4 * (4 + num_sums * width))

        of_head = b, pl.ds(0, num_queries), pl.ds(kv * group_heads, group_heads)
        queries = registers.gather([x.at[*of_head] for x in (q_ref, *r_ref)], rows, interpret)
        if is_early and is_large:  # queries do not wait behind these values, which nobody needs yet
            copy(0, part * block, "v")
        length = jnp.minimum(given["lengths"][b], num_keys)
        offset = given["offset"][b] if "offset" in given else length - num_queries
        end = blocks.visible_end(offset, num_queries, length, True)
        first = part
        if mask.window is not None:
            in_window = lax.div(jnp.maximum(offset - mask.window + 1, 0), block)
            first += jnp.clip(in_window, 0, pl.cdiv(num_keys, block) - num_parts)
        count = 1 if has_one_tile else jnp.maximum(1, lax.div(pl.cdiv(end, block) - first - 1, num_parts) + 1)
        first_key = lambda i: (first + i * num_parts) * block  # of the warpgroup's i-th tile

        copy_tile = lambda i, names="kv": pl.when(i < count)(lambda: copy(i, first_key(i), names))
        for i in range(is_early, 1 if has_one_tile else stages):
            copy_tile(jnp.int32(i))
        position = offset + lax.div(registers.row_numbers(rows), group_heads)
        own_quarter = registers.first_of_quarter(block, position.size)
        last_seen = jnp.minimum(position, length - 1) - own_quarter

        def visible(i, like):
            key = first_key(i)
            across = plgpu.broadcasted_iota(jnp.int32, like.shape, 1, layout=registers.results_layout(position.size))
            seen = across <= tiles.spread(last_seen - key, like)
            if mask.window is not None:
                seen &= across > tiles.spread(position - mask.window - own_quarter - key, like)
            return seen

        def wait_for(name, i):
            to, ready = (s.k, s.k_ready) if name == "k" else (s.v, s.v_ready)
            plgpu.barrier_wait(ready.at[slot(i)])
            return to.at[slot(i)]

        def done(name, i):
            """Tile i has been used: its slot takes the next that goes there."""
            if not has_one_tile:
                copy_tile(i + stages, name)

        walk = Walk(count, wait_for, done, visible, lambda i: end - first_key(i))
        of_group = lambda name: None if interpret else getattr(s, name).at[group]
        exchanged = of_group("warp_stats"), of_group("warp_sums")
        state = attend(queries, rows, num_sums, walk, *exchanged, c=c, block=block, interpret=interpret)
        if interpret:  # Pallas' interpreter has no memory that a cluster shares: see below
            for ref, x in zip(out_refs, jax.tree.leaves(state), strict=True):
                ref[part, program] = registers.whole_rows(x, rows, width)
            return
        if num_parts == 1:
            out, *_ = tiles.finish(state)
            return registers.store_rows(out, out_refs[0].at[*of_head], rows)
        registers.exchange(state, part, scratch.get("inbox"), s.stats, s.sums, rows=rows, num_splits=num_splits)

        def merge(slot, row):
            states = [registers.received(s.stats.at[slot, i], s.sums.at[slot, i]) for i in range(num_parts)]
            out = tiles.output(states)
            to = out_refs[0].at[b, lax.div(row, group_heads), kv * group_heads + lax.rem(row, group_heads)]
            registers.put(to, out.astype(dtype), registers.in_columns(width).reduce(0), interpret)

        for i in range(0, slots, groups):
            row = own + (i + group) * num_splits
            pl.when(row < rows)(functools.partial(merge, i + group, row))

    programs = batch * kv_heads
    stat = jax.ShapeDtypeStruct((num_parts, programs, rows), jnp.float32)
    sums = jax.ShapeDtypeStruct((*stat.shape, width), jnp.float32)
    states = tiles.State(stat, stat, stat, sums, sums) if probes else tiles.State(stat, stat, None, sums, None)
    ready = plgpu.Barrier(num_arrivals=pieces, num_barriers=groups * stages)
    tiles_here = common.swizzled(block, width, groups * stages, dtype=dtype)
    scratch = dict(k=tiles_here, v=tiles_here, k_ready=ready, v_ready=ready)
    launch = dict(grid=(programs,))
    if interpret:
        launch = dict(grid=(programs * num_splits,), interpret=plgpu.InterpretGPUParams())
    else:
        if num_splits > 1:
            launch |= dict(cluster=(num_splits,), cluster_names=("split",))
            scratch["inbox"] = plgpu.SMEM((2,), jnp.int32)
        if num_parts > 1:
            scratch["stats"] = plgpu.SMEM((slots, num_parts, 4), jnp.float32)
            scratch["sums"] = plgpu.SMEM((slots, num_parts, width, num_sums), jnp.float32)
        of_warps = dict(
            warp_stats=registers.stats_scratch(rows), warp_sums=registers.sums_scratch(rows, num_sums, width)
        )
        scratch |= {name: plgpu.SMEM((groups, *shape), jnp.float32) for name, shape in of_warps.items()}
    results = plgpu.kernel(
        kernel,
        out_type=jax.tree.leaves(states) if interpret else jax.ShapeDtypeStruct(query.shape, dtype),
        scratch_types=scratch,
        grid_names=("program",),
        num_threads=groups,
        thread_name="group",
        kernel_name="parallax_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **launch,
    )(query, *probes, key, value, *integers.values())
    if not interpret:
        return results
    states = [jax.tree.unflatten(jax.tree.structure(states), part) for part in zip(*results, strict=True)]
    out = tiles.output(states).reshape(batch, kv_heads, num_queries, group_heads, width)
    return jnp.moveaxis(out, 1, 2).reshape(query.shape).astype(dtype)
