"""Backward pass in two kernels: over query rows (dquery, dprobe, row sums), then over keys (dkey, dvalue).

Each gradient has one writer, so there are no atomics and the result is the same bits from run to run.
"""

import jax
import triton
import triton.language as tl

from pallas_kernels import blocks
from pallas_kernels.block_sizes import TritonLangBlockSizes
from pallas_kernels.triton_lang import common, launch, tiles


@triton.jit
def _rows_step(dqr, qr, do, stats, k_ptr, v_ptr, sight, row, key, masked, call):
    lse, t_mean, tau, beta = stats
    b, end = sight[2], sight[4]
    limit = end if masked else None
    k = common.load_rows(k_ptr, b, key, limit, 0, call.keys, call.kv_heads, call.head_dim, call.block_k)
    v = common.load_rows(v_ptr, b, key, limit, 0, call.keys, call.kv_heads, call.value_dim, call.block_k)
    visible = None
    if masked:
        rows = (row + tl.arange(0, call.block_q))[:, None]
        keys = (key + tl.arange(0, call.block_k))[None, :]
        visible = common.visible_tile(rows, keys, sight, call)
    s1, s2 = tiles.unstack(tiles.dot(qr, tl.trans(k), call))
    p = tiles.backward_weights(s1, lse[:, None], visible, call)
    w = tiles.combined_weights(p, s2, t_mean[:, None])
    ds1, ds2 = tiles.score_gradients(p, w, tiles.dot(do, tl.trans(v), call), tau[:, None], beta[:, None])
    return tiles.add_dot(tiles.stack(ds1, ds2), k, dqr, call)


@triton.jit
def parallax_backward_rows(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    v_mean_ptr,
    lse_ptr,
    t_mean_ptr,
    do_ptr,
    offset_ptr,
    lengths_ptr,
    segments_ptr,
    key_segments_ptr,
    spans_ptr,
    dq_ptr,
    dr_ptr,
    tau_ptr,
    beta_ptr,
    call: tl.constexpr,
    group: tl.constexpr,
):
    head, block = common.work_item(tl.program_id(0), call.batch * call.heads, call.row_blocks, group)
    if call.is_causal:
        block = call.row_blocks - 1 - block  # longest rows first
    b, n = head // call.heads, head % call.heads
    # Offsets of heads are not taken in the loops: see `forward`.
    kv = n // call.heads_per_kv
    k_ptr += kv * call.head_dim
    v_ptr += kv * call.value_dim
    row = block * call.block_q
    limit: tl.constexpr = call.row_limit
    block_q: tl.constexpr = call.block_q
    width: tl.constexpr = call.head_width

    offset, length, end = common.read_mask(offset_ptr, lengths_ptr, b, call)
    bounds = common.key_bounds(row, block, spans_ptr, b, offset, length, call)
    qr = common.load_stacked(q_ptr, r_ptr, b, row, limit, n, call.queries, call.heads, call.head_dim, call.block_q)
    do = common.load_rows(do_ptr, b, row, limit, n, call.queries, call.heads, call.value_dim, call.block_q)
    out = common.load_rows(out_ptr, b, row, limit, n, call.queries, call.heads, call.value_dim, call.block_q)
    tau = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    v_mean = common.load_rows(v_mean_ptr, b, row, limit, n, call.queries, call.heads, call.value_dim, call.block_q)
    beta = tl.sum(do.to(tl.float32) * v_mean.to(tl.float32), 1)
    common.store_stat(tau_ptr, tau, b, n, row, limit, call)
    common.store_stat(beta_ptr, beta, b, n, row, limit, call)
    lse = common.load_stat(lse_ptr, b, n, row, limit, float("inf"), call)
    t_mean = common.load_stat(t_mean_ptr, b, n, row, limit, 0.0, call)

    sight = (segments_ptr, key_segments_ptr, b, offset, end)
    stats = (lse, t_mean, tau, beta)
    dqr = tl.zeros([2 * block_q, width], tl.float32)
    for part in tl.static_range(3):
        if part == 1 or (part == 0 and call.hides_start) or (part == 2 and call.hides_end):
            for j in tl.range(bounds[part], bounds[part + 1], num_stages=call.num_stages):
                dqr = _rows_step(dqr, qr, do, stats, k_ptr, v_ptr, sight, row, j * call.block_k, part != 1, call)
    dq, dr = tiles.unstack(dqr)
    common.store_rows(dq_ptr, dq * call.scale, b, row, limit, n, call.queries, call.heads, call.head_dim, call.block_q)
    common.store_rows(dr_ptr, dr, b, row, limit, n, call.queries, call.heads, call.head_dim, call.block_q)


@triton.jit
def _columns_step(dk, dv, k, v, q_ptr, r_ptr, do_ptr, stat_ptrs, sight, n, row, key, masked, call):
    lse_ptr, t_mean_ptr, tau_ptr, beta_ptr = stat_ptrs
    b = sight[2]
    limit: tl.constexpr = call.row_limit if masked else None
    qr = common.load_stacked(q_ptr, r_ptr, b, row, limit, n, call.queries, call.heads, call.head_dim, call.block_q)
    do = common.load_rows(do_ptr, b, row, limit, n, call.queries, call.heads, call.value_dim, call.block_q)
    visible = None
    if masked:
        rows = (row + tl.arange(0, call.block_q))[None, :]
        keys = (key + tl.arange(0, call.block_k))[:, None]
        visible = common.visible_tile(rows, keys, sight, call)
    # In the order that keeps the fewest tiles alive. Rows past T: lse = +inf makes their weights zero.
    lse = common.load_stat(lse_ptr, b, n, row, limit, float("inf"), call)
    s1, s2 = tiles.apart(tiles.dot(k, tl.trans(qr), call))
    p = tiles.backward_weights(s1, lse[None, :], visible, call)
    t_mean = common.load_stat(t_mean_ptr, b, n, row, limit, 0.0, call)
    w = tiles.combined_weights(p, s2, t_mean[None, :])
    dv = tiles.add_dot(w, do, dv, call)
    a = tiles.dot(v, tl.trans(do), call)
    tau = common.load_stat(tau_ptr, b, n, row, limit, 0.0, call)
    beta = common.load_stat(beta_ptr, b, n, row, limit, 0.0, call)
    ds1, ds2 = tiles.score_gradients(p, w, a, tau[None, :], beta[None, :])
    return tiles.add_dot(tiles.beside(ds1 * call.scale, ds2), qr, dk, call), dv


@triton.jit
def parallax_backward_columns(
    q_ptr,
    r_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    t_mean_ptr,
    tau_ptr,
    beta_ptr,
    do_ptr,
    offset_ptr,
    lengths_ptr,
    segments_ptr,
    key_segments_ptr,
    spans_ptr,
    dk_ptr,
    dv_ptr,
    call: tl.constexpr,
    group: tl.constexpr,
):
    head, block = common.work_item(tl.program_id(0), call.batch * call.kv_heads, call.key_blocks, group)
    b, kv = head // call.kv_heads, head % call.kv_heads
    key = block * call.block_k
    limit: tl.constexpr = call.key_limit
    block_k: tl.constexpr = call.block_k
    head_width: tl.constexpr = call.head_width
    value_width: tl.constexpr = call.value_width

    offset, length, end = common.read_mask(offset_ptr, lengths_ptr, b, call)
    bounds = common.row_bounds(key, block, spans_ptr, b, offset, length, call)
    k = common.load_rows(k_ptr, b, key, end, kv, call.keys, call.kv_heads, call.head_dim, call.block_k)
    v = common.load_rows(v_ptr, b, key, end, kv, call.keys, call.kv_heads, call.value_dim, call.block_k)

    sight = (segments_ptr, key_segments_ptr, b, offset, end)
    stat_ptrs = (lse_ptr, t_mean_ptr, tau_ptr, beta_ptr)
    dk = tl.zeros([block_k, head_width], tl.float32)
    dv = tl.zeros([block_k, value_width], tl.float32)
    for n in tl.range(kv * call.heads_per_kv, (kv + 1) * call.heads_per_kv):
        for part in tl.static_range(3):
            if part == 1 or (part == 0 and call.hides_first_rows) or (part == 2 and call.hides_last_rows):
                for i in tl.range(bounds[part], bounds[part + 1], num_stages=call.num_stages):
                    dk, dv = _columns_step(
                        dk, dv, k, v, q_ptr, r_ptr, do_ptr, stat_ptrs, sight, n, i * call.block_q, key, part != 1, call
                    )
    common.store_rows(dk_ptr, dk, b, key, limit, kv, call.keys, call.kv_heads, call.head_dim, call.block_k)
    common.store_rows(dv_ptr, dv, b, key, limit, kv, call.keys, call.kv_heads, call.value_dim, call.block_k)


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
    block_sizes: TritonLangBlockSizes,
):
    """Returns (dquery, dprobe, dkey, dvalue)."""
    rows, columns = (
        common.Call.of(query, key, value, mask, scale, config) for config in (block_sizes.rows, block_sizes.columns)
    )
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    kv_heads = rows.batch * rows.kv_heads
    dq, dr, tau, beta = launch.launch(
        parallax_backward_rows,
        (query, probe, key, value, out, v_mean, lse, t_mean, dout)
        + launch.mask_arrays(mask, mask.row_spans(rows.block_q)),
        (like(query), like(probe), like(lse), like(lse)),
        programs=rows.batch * rows.heads * rows.row_blocks,
        config=block_sizes.rows,
        call=rows,
        group=rows.heads_per_kv * common.work_group(kv_heads, common.nbytes(key, value)),
    )
    dk, dv = launch.launch(
        parallax_backward_columns,
        (query, probe, key, value, lse, t_mean, tau, beta, dout)
        + launch.mask_arrays(mask, mask.key_spans(columns.block_k)),
        (like(key), like(value)),
        programs=kv_heads * columns.key_blocks,
        config=block_sizes.columns,
        call=columns,
        group=common.work_group(kv_heads, rows.heads_per_kv * common.nbytes(query, probe, dout)),
    )
    return dq, dr, dk, dv
