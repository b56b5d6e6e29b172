"""Decode: a few new tokens against a long cache. One step reads a block of keys and values of all kv heads, once.

A cache (B, S, K, H) is contiguous along (S, K), so a block of it is read as the matrix (keys K, H), and all query rows
(T N, H) are multiplied with it; a row sees the columns of its own kv head. The steps of all sequences form one plan, so
short sequences next to long ones cost nothing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, device, mosaic_tpu, tiles
from pallas_kernels.block_sizes import MosaicTpuDecodeBlockSizes, vmem_limit
from pallas_kernels.mosaic_tpu import common

MAX_QUERIES = 16  # more new tokens than this are a prefill: the forward kernel's work
MAX_ROWS = 256  # query rows (T N) of a step; more are a prefill too
MAX_PAGES = 16  # pages of one step: each is an operand of the kernel
TWO_CORES = ("TPU v4", "TPU v5")  # one device of these is two cores: each takes half of the batch
BLOCK_BYTES = 1 << 20  # of keys in one step: long enough that the fetch, not the step, takes the time


def _is_prefill(query) -> bool:
    return query.shape[1] > MAX_QUERIES or query.shape[1] * query.shape[2] > MAX_ROWS


def unsupported(query, probe, key, value, mask, page_table, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if query.dtype == jnp.float64:
        return "query: float64 runs in 'reference' and 'xla' only"
    if query.dtype == jnp.float16 and device.target()[0] == "tpu":
        return mosaic_tpu.NO_FLOAT16
    if block_sizes is not None and not isinstance(block_sizes, MosaicTpuDecodeBlockSizes):
        return f"block_sizes: needs MosaicTpuDecodeBlockSizes, got {type(block_sizes).__name__}"
    if _is_prefill(query):
        if block_sizes is not None:
            return f"block_sizes: more than {MAX_QUERIES} new tokens run in the forward kernel, which has its own"
        return mosaic_tpu.unsupported(
            *_contiguous(query, probe, key, value, mask, page_table), scale=scale, block_sizes=None
        )
    page_rows = key.shape[1] * key.shape[2]
    if page_table is not None and page_rows % 16:
        return f"key_cache: page size times kv heads must be a multiple of 16, got {page_rows}"
    tiling = _Tiling.make(query, key, value, page_table, block_sizes)
    steps = query.shape[0] * tiling.steps
    words = steps + (0 if page_table is None else page_table.size)
    if words > common.MAX_STEPS or max(query.shape[0], tiling.steps) > common.MAX_BLOCKS:
        return f"key_cache: {steps} steps and the page table are more than the scalar memory's {common.MAX_STEPS} words"
    return None


def decode(query, probe, key, value, mask: blocks.Mask, page_table, *, scale, block_sizes):
    """Returns the output (B, T, N, Hv); `mask.lengths` is (B,), `mask.offset` (B,) or None for lengths - T."""
    if _is_prefill(query):
        operands = _contiguous(query, probe, key, value, mask, page_table)
        return mosaic_tpu.forward(*operands, scale=scale, block_sizes=None)[0]
    tiling, vmem = _Tiling.make(query, key, value, page_table, block_sizes), vmem_limit(device.target()[1])
    cores = 2 if device.target()[1] in TWO_CORES and query.shape[0] % 2 == 0 else 1
    kernel = functools.partial(_decode, scale=scale, tiling=tiling, cores=cores, vmem=vmem)
    return device.run(kernel, query, probe, key, value, mask, page_table)


def _contiguous(query, probe, key, value, mask: blocks.Mask, page_table):
    """Operands of the forward kernel: pages gathered, an offset for each sequence."""
    if page_table is not None:
        key, value = (jnp.take(x, page_table, axis=0, mode="clip") for x in (key, value))
        key, value = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (key, value))
    length = jnp.minimum(mask.lengths, key.shape[1])
    offset = length - query.shape[1] if mask.offset is None else mask.offset
    return query, probe, key, value, blocks.Mask(offset, length, window=mask.window)


class _Tiling(NamedTuple):
    """How the keys of a sequence are cut.

    Attributes:
      unit: keys of one operand of a step: a page, a part of one, or a block of a contiguous cache.
      operands: units of a step.
      units: units of a page, or of a contiguous cache.
      steps: most steps of a sequence.
    """

    unit: int
    operands: int
    units: int
    steps: int

    @classmethod
    def make(cls, query, key, value, page_table, block_sizes) -> "_Tiling":
        page_size, num_kv_heads = key.shape[1:3]
        width = max(common.round_up(x.shape[3], common.LANES) for x in (key, value))
        if block_sizes is not None:
            block = block_sizes.block_k
        else:
            # A tile of scores has T N rows: with many, fewer keys.
            rows = common.round_up(query.shape[1] * query.shape[2], 16)
            columns = min(BLOCK_BYTES // (width * key.dtype.itemsize), (1 << 19) // rows)
            block = common.round_up(max(1, columns // num_kv_heads), common.LANES)
        if page_table is None:
            unit = min(block, page_size)
            return cls(unit, 1, pl.cdiv(page_size, unit), pl.cdiv(page_size, unit))
        # The largest part of a page that fits the block and whole tiles of the matrix (keys K, H).
        fits = lambda size: page_size % size == 0 and size * num_kv_heads % 16 == 0
        unit = next((size for size in range(min(block, page_size), 0, -1) if fits(size)), page_size)
        units = page_size // unit
        operands = max(1, min(block // unit, MAX_PAGES, units * page_table.shape[1]))
        return cls(unit, operands, units, pl.cdiv(units * page_table.shape[1], operands))

    @property
    def block(self) -> int:
        """Keys of a step."""
        return self.unit * self.operands


def _kernel(codes_ref, limits_ref, _, x_ref, rows_ref, columns_ref, *refs, plan, tiling, scale, window, num_kv_heads):
    cache_refs, (out_ref, *state_refs) = refs[:-6], refs[-6:]
    k_refs, v_refs = cache_refs[: tiling.operands], cache_refs[tiling.operands :]
    core = pl.program_id(0)
    step = plan.read(codes_ref, core, pl.program_id(1))
    sight = common.Limits.read(limits_ref, core * plan.outer + step.outer)
    precision = tiles.dot_precision(x_ref.dtype)
    state = common.StateRefs(*state_refs)
    num_rows, shape = rows_ref.shape[0], (rows_ref.shape[0], columns_ref.shape[1])
    key = step.inner * tiling.block

    @pl.when(step.first)
    def _():
        state.clear()

    def update(masked: bool):
        k, v = (jnp.concatenate([ref[...] for ref in refs], axis=0) for refs in (k_refs, v_refs))
        of_rows = lambda i: jnp.broadcast_to(rows_ref[:, i : i + 1], shape)
        of_columns = lambda i: jnp.broadcast_to(columns_ref[i : i + 1, :], shape)
        visible = None if num_kv_heads == 1 else of_rows(1) == of_columns(1)
        if masked:
            k, v = (common.keep_rows(x, (sight.end - key) * num_kv_heads) for x in (k, v))
            visible = blocks.visible_tile(
                of_rows(0),
                key + of_columns(0),
                num_queries=None,
                offset=sight.offset,
                length=sight.length,
                is_causal=True,
                window=window,
                row_segments=None if num_kv_heads == 1 else of_rows(1),
                key_segments=None if num_kv_heads == 1 else of_columns(1),
            )
        scores = common.dot_transposed(x_ref[...], k, precision)
        times_value = lambda p: common.dot(p.astype(v.dtype), v, precision)
        s1, s2 = scores[:num_rows], scores[num_rows:]
        state.store(tiles.update(state.load(), s1, s2, scale * tiles.LOG2_E, visible, times_value))

    pl.when(step.work & step.masked)(functools.partial(update, True))
    pl.when(step.work & ~step.masked)(functools.partial(update, False))

    @pl.when(step.last)
    def _():
        out_ref[...] = tiles.finish(state.load())[0].astype(out_ref.dtype)


def _decode(query, probe, key, value, mask, page_table, *, scale, tiling: _Tiling, cores: int, vmem, interpret):
    batch, num_queries, num_heads, head_dim = query.shape
    num_pages, page_size, num_kv_heads, value_dim = value.shape
    num_keys = page_size * (1 if page_table is None else page_table.shape[1])
    heads_per_kv = num_heads // num_kv_heads
    total = num_queries * num_heads
    num_rows = common.round_up(total, 16)

    length = jnp.minimum(mask.lengths, num_keys)
    offset = length - num_queries if mask.offset is None else mask.offset
    sight = common.Limits(offset, length, blocks.visible_end(offset, num_queries, length, True))

    def bounds(offset, length):
        return blocks.key_bounds(
            jnp.int32(0),
            num_queries,
            tiling.block,
            num_queries=num_queries,
            offset=offset,
            length=length,
            is_causal=True,
            window=mask.window,
        )

    by_core = lambda x: x.reshape(cores, batch // cores)
    plan_bounds = blocks.Bounds(*(by_core(x) for x in jax.vmap(bounds)(offset, length)))
    plan = common.make_plan(plan_bounds, tiling.steps, batch // cores * tiling.steps)

    def sequence(c, s, codes):
        step = plan.read(codes, c, s)
        return c * plan.outer + step.outer, step.inner

    def unit(operand: int):
        """Index map of one unit of keys; past a sequence's end its last unit again, which is not fetched twice."""

        def index(c, s, codes, limits, pages):
            b, inner = sequence(c, s, codes)
            end = common.Limits.read(limits, b).end
            last = lax.div(jnp.maximum(end - 1, 0), tiling.unit)
            at = jnp.minimum(inner * tiling.operands + operand, last)
            if page_table is None:
                return b, at, 0
            return pages[b * page_table.shape[1] + lax.div(at, tiling.units)], lax.rem(at, tiling.units), 0

        return index

    rows_of = lambda height, width: pl.BlockSpec(
        (None, height, width), lambda c, s, codes, *_: (sequence(c, s, codes)[0], 0, 0)
    )
    whole = lambda x: pl.BlockSpec(x.shape, lambda c, s, *_: (0, 0))
    cache = lambda x: x.reshape(num_pages, page_size * num_kv_heads, x.shape[3])
    unit_spec = lambda i, x: pl.BlockSpec((None, tiling.unit * num_kv_heads, x.shape[3]), unit(i))
    x = [common.pad(x.reshape(batch, total, head_dim), 1, 16) for x in (query, probe)]
    row, column = jnp.arange(num_rows, dtype=jnp.int32), jnp.arange(tiling.block * num_kv_heads, dtype=jnp.int32)
    # Token and kv head of each row (none past the end), key and kv head of each column.
    rows = jnp.stack([row // num_heads, jnp.where(row < total, row % num_heads // heads_per_kv, -1)], axis=1)
    columns = jnp.stack([column // num_kv_heads, column % num_kv_heads])
    pages = jnp.zeros(1, jnp.int32) if page_table is None else jnp.clip(page_table, 0, num_pages - 1).reshape(-1)
    out = pl.pallas_call(
        functools.partial(
            _kernel, plan=plan, tiling=tiling, scale=scale, window=mask.window, num_kv_heads=num_kv_heads
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, plan.size),
            in_specs=[
                rows_of(2 * num_rows, head_dim),
                whole(rows),
                whole(columns),
                *(unit_spec(i, x) for x in (key, value) for i in range(tiling.operands)),
            ],
            out_specs=rows_of(num_rows, value_dim),
            scratch_shapes=common.StateRefs.scratch(num_rows, value_dim),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, num_rows, value_dim), query.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * total * num_keys * num_kv_heads * (head_dim + value_dim),
            transcendentals=batch * total * num_keys * num_kv_heads,
            bytes_accessed=batch * num_keys * num_kv_heads * (head_dim + value_dim) * key.dtype.itemsize,
        ),
        interpret=interpret,
        name="parallax_decode",
    )(
        plan.codes,
        sight.pack(),
        pages,
        jnp.concatenate(x, axis=1),
        rows,
        columns,
        *[cache(key)] * tiling.operands,
        *[cache(value)] * tiling.operands,
    )
    return out[:, :total].reshape(batch, num_queries, num_heads, value_dim)
