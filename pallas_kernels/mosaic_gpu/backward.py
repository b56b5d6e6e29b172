"""Backward pass of Parallax attention for Hopper: one kernel for plain masks, else one over rows and one over keys."""

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles
from pallas_kernels.mosaic_gpu import common, fused
from pallas_kernels.mosaic_gpu.common import BLOCK, GROUPS


def backward(
    query,
    probe,
    key,
    value,
    mask,
    out,
    v_mean,
    lse,
    t_mean,
    dout,
    *,
    scale,
    fused_stages,
    row_stages,
    column_stages,
    interpret,
):
    """Returns (dquery, dprobe, dkey, dvalue); widths of heads and values are both 64 or both 128."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    masks = common.Masks(mask, num_queries, num_keys)
    static = dict(scale=scale, interpret=interpret)
    query, probe, key, value, dout = common.pad_rows(query, probe, *masks.hide_padding(key, value), dout)
    out, v_mean = common.pad_rows(out, v_mean, multiple=GROUPS * BLOCK)
    pad = ((0, 0), (0, 0), (0, -num_queries % (GROUPS * BLOCK)))
    lse, t_mean = jnp.pad(lse, pad, constant_values=jnp.inf), jnp.pad(t_mean, pad)  # rows past T get p = 0
    operands, results = (query, probe, key, value, dout), (out, v_mean, lse, t_mean)
    if masks.is_plain:  # earlier keys see all rows that later keys see: sums over keys need no more than an order
        dq, dr, dk, dv = fused.gradients(*operands, *results, masks, stages=fused_stages, **static)
    else:
        dq, dr, stats = _rows(*operands, *results, masks, stages=row_stages, **static)
        dk, dv = _columns(*operands, stats, masks, stages=column_stages, **static)
    return dq[:, :num_queries], dr[:, :num_queries], dk[:, :num_keys], dv[:, :num_keys]


def _rows(query, probe, key, value, dout, out, v_mean, lse, t_mean, masks, *, scale, stages, interpret):
    """Returns (dquery, dprobe) and the rows' statistics for the other pass: (B, N, 4, T'), T' is T in whole blocks."""
    batch, _, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    dtype = query.dtype
    c = scale * tiles.LOG2_E
    num_row_blocks = lse.shape[2] // (GROUPS * BLOCK)

    def kernel(q_ref, r_ref, k_ref, v_ref, do_ref, out_ref, v_mean_ref, lse_ref, t_mean_ref, *refs, **scratch):
        s = types.SimpleNamespace(**scratch)
        mask_refs, (dq_ref, dr_ref, stat_ref) = refs[:-3], refs[-3:]
        group = lax.axis_index("group")
        batch_index, head, block = common.work_item(batch, heads)
        row = (num_row_blocks - 1 - block) * (GROUPS * BLOCK)  # the longest rows start first
        first, last, bounds = masks.key_bounds(mask_refs, batch_index, row)

        def slot(j):
            return common.ring_slot(j - first, stages)

        @pl.when(group < GROUPS)
        def _compute():
            plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")
            own = jax.tree.map(functools.partial(jnp.where, group == 0), *bounds)
            rows = pl.ds(row + group * BLOCK, BLOCK)
            q, r, do, stat = s.q.at[group], s.r.at[group], s.do.at[group], s.stat.at[group]
            turns = common.Turns(s.turn, group)
            results = [
                plgpu.load(x.at[batch_index, rows, head], layout=plgpu.Layout.WGMMA, optimized=False)
                for x in (out_ref, v_mean_ref)
            ]

            def skip(j, _):
                for ring in (s.k_ring, s.v_ring):
                    plgpu.barrier_wait(ring["ready"].at[slot(j)])
                    plgpu.barrier_arrive(ring["free"].at[slot(j)])
                turns.take()
                turns.give()

            def row_stat(i):  # read where it is needed: registers are scarce
                return plgpu.load(stat.at[i], layout=common.row_layout(0), optimized=False)

            def attend(dq, dr, s1, s2, a):
                def start_scores(j, before_s2=lambda: None):
                    plgpu.barrier_wait(s.k_ring["ready"].at[slot(j)])
                    common.start_product(s1, q, s.k.at[slot(j)], interpret)
                    before_s2()
                    common.start_product(s2, r, s.k.at[slot(j)], interpret)
                    plgpu.barrier_wait(s.v_ring["ready"].at[slot(j)])

                def weights(j, masked):
                    t1 = common.read(s1, pending=1)
                    visible = masks.visible(mask_refs, batch_index, rows.start, j * BLOCK) if masked else None
                    return tiles.backward_weights(t1, c, visible, row_stat(0))

                def add_keys(j, p, then):
                    w = tiles.combined_weights(p, common.read(s2), row_stat(1))
                    p, w = lax.optimization_barrier((p.astype(jnp.float16), w))
                    common.start_product(a, do, s.v.at[slot(j)], interpret)
                    x = common.read(a)
                    plgpu.barrier_arrive(s.v_ring["free"].at[slot(j)])
                    ds1, ds2 = tiles.score_gradients(p.astype(jnp.float32), w, x, row_stat(2), row_stat(3))
                    ds1, ds2 = lax.optimization_barrier((ds1.astype(dtype), ds2.astype(dtype)))
                    turns.take()
                    common.add_product(dq, ds1, s.k.at[slot(j)], interpret)
                    common.add_product(dr, ds2, s.k.at[slot(j)], interpret)
                    then()

                def keys_done(j, pending):
                    plgpu.wgmma_wait(pending)
                    turns.give()
                    plgpu.barrier_arrive(s.k_ring["free"].at[slot(j)])

                def body(j, p, masked):
                    add_keys(j - 1, p, lambda: start_scores(j, functools.partial(keys_done, j - 1, 1)))
                    return weights(j, masked)

                start_scores(own.first)
                p = weights(own.first, True)
                for start, stop, masked in common.phases(own, masks.keys_start_masked):
                    p = lax.fori_loop(start, stop, functools.partial(body, masked=masked), p)
                add_keys(own.last - 1, p, functools.partial(keys_done, own.last - 1, 0))
                return common.read(dq, dr)

            lax.fori_loop(first, own.first, skip, None)
            plgpu.barrier_wait(s.rows_ready.at[group])
            dout = plgpu.load(do, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            # tau = rowsum(dO * out), beta = rowsum(dO * v_mean)
            stat[2], stat[3] = [jnp.sum(dout * x.astype(jnp.float32), axis=-1) for x in results]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stat, stat_ref.at[batch_index, head, :, rows])
            dq, dr = pl.run_scoped(attend, *common.accumulators(head_dim, head_dim, BLOCK, BLOCK, BLOCK))
            lax.fori_loop(own.last, last, skip, None)
            q[...], r[...] = (dq * scale).astype(dtype), dr.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq_ref.at[batch_index, rows, head])
            plgpu.copy_smem_to_gmem(r, dr_ref.at[batch_index, rows, head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            turns.end()

        @pl.when(group == GROUPS)
        def _copy():
            plgpu.set_max_registers(common.COPY_REGISTERS, action="decrease")
            kv_head = lax.div(head, heads // kv_heads)

            def load_rows(i):
                rows, ready = pl.ds(row + i * BLOCK, BLOCK), s.rows_ready.at[i]
                for src, dst in ((q_ref, s.q), (r_ref, s.r), (do_ref, s.do)):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, rows, head], dst.at[i], ready)
                for n, src in enumerate((lse_ref, t_mean_ref)):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, head, rows], s.stat.at[i, n], ready)

            def load_keys(j, wait=True):
                keys = pl.ds(j * BLOCK, BLOCK)
                for src, dst, ring in ((k_ref, s.k, s.k_ring), (v_ref, s.v, s.v_ring)):
                    free, ready = ring["free"].at[slot(j)], ring["ready"].at[slot(j)]
                    if wait:
                        pl.when(j - first >= stages)(functools.partial(plgpu.barrier_wait, free))
                    plgpu.copy_gmem_to_smem(src.at[batch_index, keys, kv_head], dst.at[slot(j)], ready)

            load_rows(0)
            load_keys(first, wait=False)
            load_rows(1)
            lax.fori_loop(first + 1, last, lambda j, _: load_keys(j), None)
            for ring in (s.k_ring, s.v_ring):
                common.drain(ring["free"], last - first, stages)

    tile = functools.partial(common.swizzled, BLOCK, head_dim, dtype=dtype)
    gradient = jax.ShapeDtypeStruct(query.shape, dtype)
    return plgpu.kernel(
        kernel,
        out_type=(gradient, gradient, jax.ShapeDtypeStruct((batch, heads, 4, lse.shape[2]), jnp.float32)),
        scratch_types=dict(
            q=tile(GROUPS),
            r=tile(GROUPS),
            do=tile(GROUPS),
            k=tile(stages),
            v=tile(stages),
            stat=plgpu.SMEM((GROUPS, 4, BLOCK), jnp.float32),
            rows_ready=plgpu.Barrier(num_arrivals=5, num_barriers=GROUPS),
            k_ring=common.ring(stages),
            v_ring=common.ring(stages),
            turn=plgpu.Barrier(num_barriers=GROUPS),
        ),
        **common.launch("parallax_backward_rows", batch * heads * num_row_blocks, interpret),
    )(query, probe, key, value, dout, out, v_mean, lse, t_mean, *masks.arrays)


def _columns(query, probe, key, value, dout, stats, masks, *, scale, stages, interpret):
    """Returns (dkey, dvalue), summed over the query heads that share a key. Tiles are transposed: (keys, rows)."""
    batch, _, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    group_heads = heads // kv_heads
    dtype = query.dtype
    c = scale * tiles.LOG2_E
    num_key_blocks = pl.cdiv(num_keys, GROUPS * BLOCK)

    def kernel(q_ref, r_ref, k_ref, v_ref, do_ref, stat_ref, *refs, **scratch):
        s = types.SimpleNamespace(**scratch)
        mask_refs, (dk_ref, dv_ref) = refs[:-2], refs[-2:]
        group = lax.axis_index("group")
        batch_index, kv_head, block = common.work_item(batch, kv_heads)
        key = block * (GROUPS * BLOCK)  # under a causal mask the first keys have the most rows
        first, last, bounds = masks.row_bounds(mask_refs, batch_index, key)

        @pl.when(group < GROUPS)
        def _compute():
            plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")
            own = jax.tree.map(functools.partial(jnp.where, group == 0), *bounds)
            keys = pl.ds(key + group * BLOCK, BLOCK)
            k, v = s.k.at[group], s.v.at[group]
            turns = common.Turns(s.turn, group)

            def add_head(g, accumulators):
                dk, dv, s1, s2, a = accumulators

                def slot(j):
                    return common.ring_slot(g * (last - first) + j - first, stages)

                def skip(j, _):
                    plgpu.barrier_wait(s.ring["ready"].at[slot(j)])
                    plgpu.barrier_arrive(s.ring["free"].at[slot(j)])
                    turns.take()
                    turns.give()

                def row_stat(j, i):
                    return plgpu.load(s.stat.at[slot(j), i], layout=common.row_layout(1), optimized=False)

                def start_scores(j, before_s2=lambda: None):
                    plgpu.barrier_wait(s.ring["ready"].at[slot(j)])
                    common.start_product(s1, k, s.q.at[slot(j)], interpret)
                    before_s2()
                    common.start_product(s2, k, s.r.at[slot(j)], interpret)

                def weights(j, masked):
                    t1 = common.read(s1, pending=1)
                    tile = j * BLOCK, keys.start
                    visible = masks.visible(mask_refs, batch_index, *tile, key_axis=0) if masked else None
                    return tiles.backward_weights(t1, c, visible, row_stat(j, 0), key_axis=0)

                def add_rows(j, p, then):
                    w = tiles.combined_weights(p, common.read(s2), row_stat(j, 1), key_axis=0)
                    p, w = lax.optimization_barrier((p.astype(jnp.float16), w.astype(dtype)))
                    common.start_product(a, v, s.do.at[slot(j)], interpret)
                    common.add_product(dv, w, s.do.at[slot(j)], interpret)
                    p, w = p.astype(jnp.float32), w.astype(jnp.float32)
                    ds1, ds2 = tiles.score_gradients(
                        p, w, common.read(a, pending=1), row_stat(j, 2), row_stat(j, 3), key_axis=0
                    )
                    ds1, ds2 = lax.optimization_barrier(((ds1 * scale).astype(dtype), ds2.astype(dtype)))
                    turns.take()
                    common.add_product(dk, ds1, s.q.at[slot(j)], interpret)
                    common.add_product(dk, ds2, s.r.at[slot(j)], interpret)
                    then()

                def rows_done(j, pending):
                    plgpu.wgmma_wait(pending)
                    turns.give()
                    plgpu.barrier_arrive(s.ring["free"].at[slot(j)])

                def body(j, p, masked):
                    add_rows(j - 1, p, lambda: start_scores(j, functools.partial(rows_done, j - 1, 1)))
                    return weights(j, masked)

                lax.fori_loop(first, own.first, skip, None)
                start_scores(own.first)
                p = weights(own.first, True)
                for start, stop, masked in common.phases(own, masks.rows_start_masked):
                    p = lax.fori_loop(start, stop, functools.partial(body, masked=masked), p)
                add_rows(own.last - 1, p, functools.partial(rows_done, own.last - 1, 0))
                lax.fori_loop(own.last, last, skip, None)

            def attend(*accumulators):
                lax.fori_loop(0, group_heads, lambda g, _: add_head(g, accumulators), None)
                return common.read(*accumulators[:2])

            plgpu.barrier_wait(s.keys_ready.at[group])
            dk, dv = pl.run_scoped(attend, *common.accumulators(head_dim, head_dim, BLOCK, BLOCK, BLOCK))
            k[...], v[...] = dk.astype(dtype), dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, dk_ref.at[batch_index, keys, kv_head])
            plgpu.copy_smem_to_gmem(v, dv_ref.at[batch_index, keys, kv_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            turns.end()

        @pl.when(group == GROUPS)
        def _copy():
            plgpu.set_max_registers(common.COPY_REGISTERS, action="decrease")

            def row_tile(step):
                return kv_head * group_heads + lax.div(step, last - first), first + lax.rem(step, last - first)

            refs, num_steps = (q_ref, r_ref, do_ref, stat_ref, k_ref, v_ref), group_heads * (last - first)
            common.load_keys_and_rows(s, refs, batch_index, kv_head, key, num_steps, row_tile, stages)

    tile = functools.partial(common.swizzled, BLOCK, head_dim, dtype=dtype)
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(key.shape, dtype), jax.ShapeDtypeStruct(value.shape, dtype)),
        scratch_types=dict(
            q=tile(stages),
            r=tile(stages),
            do=tile(stages),
            k=tile(GROUPS),
            v=tile(GROUPS),
            stat=plgpu.SMEM((stages, 4, BLOCK), jnp.float32),
            keys_ready=plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            ring=common.ring(stages, copies=4),
            turn=plgpu.Barrier(num_barriers=GROUPS),
        ),
        **common.launch("parallax_backward_columns", batch * kv_heads * num_key_blocks, interpret),
    )(query, probe, key, value, dout, stats, *masks.arrays)
