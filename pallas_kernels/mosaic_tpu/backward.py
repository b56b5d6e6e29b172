"""Backward pass in two kernels: over query rows (dquery, dprobe), then over keys (dkey, dvalue).

Each gradient has one writer, so the result is the same bits from run to run. The rows kernel works on tiles
(rows, keys), the columns kernel on (keys, rows): each sums its gradients by products that transpose nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, tiles
from pallas_kernels.block_sizes import MosaicTpuBlockSizes
from pallas_kernels.mosaic_tpu import common


def _rows_kernel(codes_ref, limits_ref, q_ref, r_ref, do_ref, stats_ref, k_ref, v_ref, *refs, layout, scale):
    segment_refs, (dq_ref, dr_ref, dq_sum, dr_sum, columns) = refs[:-5], refs[-5:]
    step, sight = layout.read(codes_ref, limits_ref)
    precision = tiles.dot_precision(q_ref.dtype)

    @pl.when(step.first)
    def _():
        dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)
        dr_sum[...] = jnp.zeros(dr_sum.shape, jnp.float32)
        columns[...] = stats_ref[...].T

    def add(k, v, visible):
        _, ds1, ds2 = tiles.backward_tile(
            common.dot_transposed(q_ref[...], k, precision),
            common.dot_transposed(r_ref[...], k, precision),
            common.dot_transposed(do_ref[...], v, precision),
            scale * tiles.LOG2_E,
            visible,
            *(columns[:, i] for i in (common.LSE, common.T_MEAN, common.TAU, common.BETA)),
        )
        dq_sum[...] += common.dot(ds1.astype(k.dtype), k, precision)
        dr_sum[...] += common.dot(ds2.astype(k.dtype), k, precision)

    layout.over_tile(step, sight, k_ref, v_ref, segment_refs, add)

    @pl.when(step.last)
    def _():
        dq_ref[...] = (dq_sum[...] * scale).astype(dq_ref.dtype)
        dr_ref[...] = dr_sum[...].astype(dr_ref.dtype)


def _columns_kernel(codes_ref, limits_ref, q_ref, r_ref, do_ref, stats_ref, k_ref, v_ref, *refs, layout, scale):
    segment_refs, (dk_ref, dv_ref, dk_sum, dv_sum) = refs[:-4], refs[-4:]
    member, members = pl.program_id(3), pl.num_programs(3)
    step, sight = layout.read(codes_ref, limits_ref)
    precision = tiles.dot_precision(q_ref.dtype)

    @pl.when(step.first & (member == 0))
    def _():
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    def add(k, v, visible):
        q, r, do = q_ref[...], r_ref[...], do_ref[...]
        w, ds1, ds2 = tiles.backward_tile(
            common.dot_transposed(k, q, precision),
            common.dot_transposed(k, r, precision),
            common.dot_transposed(v, do, precision),
            scale * tiles.LOG2_E,
            visible,
            *(stats_ref[i] for i in (common.LSE, common.T_MEAN, common.TAU, common.BETA)),
            key_axis=-2,
        )
        dv_sum[...] += common.dot(w.astype(do.dtype), do, precision)
        dk_sum[...] += common.dot((ds1 * scale).astype(q.dtype), q, precision)
        dk_sum[...] += common.dot(ds2.astype(r.dtype), r, precision)

    layout.over_tile(step, sight, k_ref, v_ref, segment_refs, add)

    @pl.when(step.last & (member == members - 1))
    def _():
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _stats(out, v_mean, lse, t_mean, dout, block: int) -> jax.Array:
    """The row statistics as (B, N, STATS, T padded); rows past T have lse = +inf, so that they carry no weight."""
    wide = dout.astype(jnp.float32)
    rowsum = lambda x: jnp.swapaxes(jnp.sum(wide * x.astype(jnp.float32), axis=-1), 1, 2)
    stats = [common.pad(x, 2, block) for x in (t_mean, rowsum(out), rowsum(v_mean))]
    stats = jnp.stack([common.pad(lse, 2, block, jnp.inf), *stats], axis=2)
    return common.pad(stats, 2, common.STATS)


def backward(
    query,
    probe,
    key,
    value,
    mask: blocks.Mask,
    out,
    v_mean,
    lse,
    t_mean,
    dout,
    *,
    scale: float,
    block_sizes: MosaicTpuBlockSizes,
    vmem: int | None,
    interpret,
):
    """Returns (dquery, dprobe, dkey, dvalue)."""
    head_dim, value_dim = query.shape[3], value.shape[3]

    def run(kernel, config, by_rows: bool, products: int):
        layout = common.Layout.make(query, key, mask, config, by_rows)
        like = (query, probe) if by_rows else (key, value)
        block = layout.block_q if by_rows else layout.block_k
        shapes = [jax.eval_shape(functools.partial(common.heads_first, block=block), x) for x in like]
        sums = [pltpu.VMEM((block, x.shape[3]), jnp.float32) for x in like]
        results = layout.call(
            functools.partial(kernel, scale=scale),
            [
                *(layout.rows(width) for width in (head_dim, head_dim, value_dim)),
                layout.stats(),
                layout.keys(head_dim),
                layout.keys(value_dim),
            ],
            [
                *(common.heads_first(x, layout.block_q) for x in (query, probe, dout)),
                _stats(out, v_mean, lse, t_mean, dout, layout.block_q),
                *(common.heads_first(x, layout.block_k) for x in (key, value)),
            ],
            [(layout.rows if by_rows else layout.keys)(x.shape[3]) for x in like],
            shapes,
            # The rows kernel also keeps its row statistics as columns.
            [*sums, pltpu.VMEM((block, common.STATS), jnp.float32)] if by_rows else sums,
            vmem=vmem,
            cost_estimate=common.cost(products, query, key, mask, (query, probe, dout, key, value, *like)),
            interpret=interpret,
            name=f"parallax_backward_{'rows' if by_rows else 'columns'}",
        )
        return [common.rows_first(x, y.shape[1]) for x, y in zip(results, like, strict=True)]

    return (
        *run(_rows_kernel, block_sizes.rows, True, 4 * head_dim + value_dim),
        *run(_columns_kernel, block_sizes.columns, False, 4 * head_dim + 2 * value_dim),
    )
