"""Backward pass in two kernels: over query rows (dquery, dprobe, row sums), then over keys (dkey, dvalue).

Each gradient has one writer, so there are no atomics and the result is the same bits from run to run.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import blocks, tiles
from pallas_kernels.block_sizes import TritonBlockSizes
from pallas_kernels.triton import common


def _rows_kernel(
    q_ref,
    r_ref,
    k_ref,
    v_ref,
    mask,
    spans,
    out_ref,
    v_mean_ref,
    lse_ref,
    t_mean_ref,
    do_ref,
    dq_ref,
    dr_ref,
    tau_ref,
    beta_ref,
    *,
    config,
    scale,
    group,
):
    batch, num_queries, num_heads, _ = q_ref.shape
    num_keys, num_kv_heads = k_ref.shape[1:3]
    num_blocks = pl.cdiv(num_queries, config.block_q)
    head, block = common.work_item(pl.program_id(0), batch * num_heads, num_blocks, group)
    if mask.is_causal:
        block = num_blocks - 1 - block  # longest rows first
    b, n = lax.div(head, num_heads), lax.rem(head, num_heads)
    kv = lax.div(n, num_heads // num_kv_heads)
    row = block * config.block_q
    row_limit = num_queries if num_queries % config.block_q else None

    sight = common.Sight.read(mask, spans, b, block, num_queries, num_keys)
    precision = tiles.dot_precision(q_ref.dtype)
    rows = lambda ref: common.load_rows(ref, b, row, config.block_q, n, row_limit)
    q, r, do = rows(q_ref), rows(r_ref), rows(do_ref)
    wide = do.astype(jnp.float32)
    tau = jnp.sum(wide * rows(out_ref).astype(jnp.float32), axis=1)
    beta = jnp.sum(wide * rows(v_mean_ref).astype(jnp.float32), axis=1)
    common.store_stat(tau_ref, b, n, row, tau, row_limit)
    common.store_stat(beta_ref, b, n, row, beta, row_limit)
    lse = common.load_stat(lse_ref, b, n, row, config.block_q, row_limit, jnp.inf)
    t_mean = common.load_stat(t_mean_ref, b, n, row, config.block_q, row_limit)

    def step(j, sums, masked):
        dq, dr = sums
        key = j * config.block_k
        key_limit = sight.end if masked else None
        k = common.load_rows(k_ref, b, key, config.block_k, kv, key_limit)
        v = common.load_rows(v_ref, b, key, config.block_k, kv, key_limit)
        visible = sight.visible(row, key, config, 1) if masked else None
        p = tiles.backward_weights(common.dot(q, k.T, precision), scale * tiles.LOG2_E, visible, lse)
        w = tiles.combined_weights(p, common.dot(r, k.T, precision), t_mean)
        ds1, ds2 = tiles.score_gradients(p, w, common.dot(do, v.T, precision), tau, beta)
        return (
            dq + common.dot(ds1.astype(k.dtype), k, precision),
            dr + common.dot(ds2.astype(k.dtype), k, precision),
        )

    zeros = jnp.zeros(q.shape, jnp.float32)
    dq, dr = common.over_blocks(
        sight.bounds(blocks.key_bounds, row, config),
        step,
        (zeros, zeros),
        masked_start=sight.hides_start,
        masked_end=mask.is_causal or sight.hides_keys or num_keys % config.block_k != 0,
    )
    common.store_rows(dq_ref, b, row, n, dq * scale, row_limit)
    common.store_rows(dr_ref, b, row, n, dr, row_limit)


def _columns_kernel(
    q_ref,
    r_ref,
    k_ref,
    v_ref,
    mask,
    spans,
    lse_ref,
    t_mean_ref,
    tau_ref,
    beta_ref,
    do_ref,
    dk_ref,
    dv_ref,
    *,
    config,
    scale,
    group,
):
    batch, num_queries, num_heads, _ = q_ref.shape
    num_keys, num_kv_heads = k_ref.shape[1:3]
    heads_per_kv = num_heads // num_kv_heads
    num_blocks = pl.cdiv(num_keys, config.block_k)
    head, block = common.work_item(pl.program_id(0), batch * num_kv_heads, num_blocks, group)
    b, kv = lax.div(head, num_kv_heads), lax.rem(head, num_kv_heads)
    key = block * config.block_k

    sight = common.Sight.read(mask, spans, b, block, num_queries, num_keys)
    precision = tiles.dot_precision(q_ref.dtype)
    k = common.load_rows(k_ref, b, key, config.block_k, kv, sight.end)
    v = common.load_rows(v_ref, b, key, config.block_k, kv, sight.end)
    bounds = sight.bounds(blocks.row_bounds, key, config)
    ragged = num_queries % config.block_q != 0 or num_keys % config.block_k != 0

    def of_head(g, sums):
        n = kv * heads_per_kv + g

        def step(i, sums, masked):
            dk, dv = sums
            row = i * config.block_q
            row_limit = num_queries if masked and num_queries % config.block_q else None
            q, r, do = (common.load_rows(ref, b, row, config.block_q, n, row_limit) for ref in (q_ref, r_ref, do_ref))
            stat = lambda ref, other=0.0: common.load_stat(ref, b, n, row, config.block_q, row_limit, other)
            visible = sight.visible(row, key, config, 0) if masked else None
            # In the order that keeps the fewest tiles alive. Rows past T: lse = +inf makes their weights zero.
            s1 = common.dot(k, q.T, precision)
            p = tiles.backward_weights(s1, scale * tiles.LOG2_E, visible, stat(lse_ref, jnp.inf), key_axis=0)
            w = tiles.combined_weights(p, common.dot(k, r.T, precision), stat(t_mean_ref), key_axis=0)
            dv = dv + common.dot(w.astype(do.dtype), do, precision)
            a = common.dot(v, do.T, precision)
            ds1, ds2 = tiles.score_gradients(p, w, a, stat(tau_ref), stat(beta_ref), key_axis=0)
            dk = dk + common.dot((ds1 * scale).astype(q.dtype), q, precision)
            return dk + common.dot(ds2.astype(r.dtype), r, precision), dv

        return common.over_blocks(
            bounds,
            step,
            sums,
            masked_start=mask.is_causal or mask.segment_ids is not None,
            masked_end=sight.hides_start or sight.hides_keys or ragged,
        )

    sums = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = of_head(0, sums) if heads_per_kv == 1 else lax.fori_loop(0, heads_per_kv, of_head, sums)
    key_limit = num_keys if num_keys % config.block_k else None
    common.store_rows(dk_ref, b, key, kv, dk, key_limit)
    common.store_rows(dv_ref, b, key, kv, dv, key_limit)


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
    block_sizes: TritonBlockSizes,
    interpret: bool,
):
    """Returns (dquery, dprobe, dkey, dvalue)."""
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    rows, columns = block_sizes.rows, block_sizes.columns
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    heads_per_kv = num_heads // num_kv_heads
    row_group = heads_per_kv * common.work_group(
        batch * num_kv_heads, num_keys * (head_dim + value.shape[3]) * key.dtype.itemsize
    )
    column_group = common.work_group(
        batch * num_kv_heads, heads_per_kv * num_queries * (2 * head_dim + value.shape[3]) * query.dtype.itemsize
    )
    dq, dr, tau, beta = pl.pallas_call(
        functools.partial(_rows_kernel, config=rows, scale=scale, group=row_group),
        out_shape=(like(query), like(probe), like(lse), like(lse)),
        grid=common.grid_size(batch, num_heads, pl.cdiv(num_queries, rows.block_q)),
        compiler_params=plt.CompilerParams(num_warps=rows.num_warps, num_stages=rows.num_stages),
        interpret=interpret,
        name="parallax_backward_rows",
    )(query, probe, key, value, mask, mask.row_spans(rows.block_q), out, v_mean, lse, t_mean, dout)
    dk, dv = pl.pallas_call(
        functools.partial(_columns_kernel, config=columns, scale=scale, group=column_group),
        out_shape=(like(key), like(value)),
        grid=common.grid_size(batch, num_kv_heads, pl.cdiv(num_keys, columns.block_k)),
        compiler_params=plt.CompilerParams(num_warps=columns.num_warps, num_stages=columns.num_stages),
        interpret=interpret,
        name="parallax_backward_columns",
    )(query, probe, key, value, mask, mask.key_spans(columns.block_k), lse, t_mean, tau, beta, dout)
    return dq, dr, dk, dv
