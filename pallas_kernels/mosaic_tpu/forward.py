"""Forward pass: row blocks outside, their visible key blocks inside, the state in scratch memory (`tiles.update`)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import blocks, tiles
from pallas_kernels.block_sizes import MosaicTpuPass
from pallas_kernels.mosaic_tpu import common


def _kernel(codes_ref, limits_ref, q_ref, r_ref, k_ref, v_ref, *refs, layout: common.Layout, scale):
    segment_refs, (out_ref, v_mean_ref, stats_ref, *state_refs) = refs[:-8], refs[-8:]
    step, sight = layout.read(codes_ref, limits_ref)
    precision = tiles.dot_precision(q_ref.dtype)
    state = common.StateRefs(*state_refs)

    @pl.when(step.first)
    def _():
        state.clear()

    def add(k, v, visible):
        s1 = common.dot_transposed(q_ref[...], k, precision)
        s2 = common.dot_transposed(r_ref[...], k, precision)
        times_value = lambda p: common.dot(p.astype(v.dtype), v, precision)
        state.store(tiles.update(state.load(), s1, s2, scale * tiles.LOG2_E, visible, times_value))

    layout.over_tile(step, sight, k_ref, v_ref, segment_refs, add)

    @pl.when(step.last)
    def _():
        out, v_mean, lse, t_mean = tiles.finish(state.load())
        out_ref[...] = out.astype(out_ref.dtype)
        v_mean_ref[...] = v_mean.astype(v_mean_ref.dtype)
        lane = lax.broadcasted_iota(jnp.int32, (layout.block_q, common.LANES), 1)
        stats = jnp.where(lane == common.LSE, tiles.spread(lse, lane), tiles.spread(t_mean, lane))
        stats_ref[...] = stats.T[: common.STATS]


def forward(
    query, probe, key, value, mask: blocks.Mask, *, scale: float, config: MosaicTpuPass, vmem: int | None, interpret
):
    """Returns (out, v_mean, lse, t_mean); see `tiles.finish`. `mask.offset` is (), or (B,) for one per batch row."""
    batch, num_queries, num_heads, head_dim = query.shape
    value_dim = value.shape[3]
    layout = common.Layout.make(query, key, mask, config, by_rows=True)
    padded = common.round_up(num_queries, layout.block_q)
    values = jax.ShapeDtypeStruct((batch, num_heads, padded, value_dim), query.dtype)
    stats = jax.ShapeDtypeStruct((batch, num_heads, common.STATS, padded), jnp.float32)
    out, v_mean, stats = layout.call(
        functools.partial(_kernel, scale=scale),
        [layout.rows(head_dim), layout.rows(head_dim), layout.keys(head_dim), layout.keys(value_dim)],
        [common.heads_first(x, layout.block_q) for x in (query, probe)]
        + [common.heads_first(x, layout.block_k) for x in (key, value)],
        [layout.rows(value_dim), layout.rows(value_dim), layout.stats()],
        (values, values, stats),
        common.StateRefs.scratch(layout.block_q, value_dim),
        vmem=vmem,
        cost_estimate=common.cost(
            2 * (head_dim + value_dim), query, key, mask, (query, probe, key, value, values, values, stats)
        ),
        interpret=interpret,
        name="parallax_forward",
    )
    lse, t_mean = (stats[:, :, i, :num_queries] for i in (common.LSE, common.T_MEAN))
    return common.rows_first(out, num_queries), common.rows_first(v_mean, num_queries), lse, t_mean
