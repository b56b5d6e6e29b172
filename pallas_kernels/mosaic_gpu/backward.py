# NOTE FROM THE LEAD (delete this line once read): device time left is 530 s and reserved. Make NO further device runs; finish correctness, features, tests, docs and the ahead-of-time checks without a GPU. tiles.State changed: use tiles.from_fixed_centre at the end.
"""Backward pass of Parallax attention for Hopper: one kernel over query rows, one over keys, no atomics."""

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.common import ROWS

GROUPS = 2


def backward(
    query, probe, key, value, mask, out, v_mean, lse, t_mean, dout, *, scale, block_k=64, row_stages=2, column_stages=2, interpret=False, row_policy='s2', column_policy='s2'
):
    num_queries, num_keys = query.shape[1], key.shape[1]
    key, value = common.Masks(mask, num_queries, num_keys, block_k).hide_padding(key, value)
    query, probe, key, value, dout = common.pad_rows(query, probe, key, value, dout)
    out, v_mean = common.pad_rows(out, v_mean, multiple=ROWS * GROUPS)
    pad = ((0, 0), (0, 0), (0, -num_queries % (ROWS * GROUPS)))
    lse = jnp.pad(lse, pad, constant_values=jnp.inf)  # rows past T get p = 0
    t_mean = jnp.pad(t_mean, pad)
    static = dict(num_queries=num_queries, num_keys=num_keys, scale=scale, interpret=interpret)
    dq, dr, stats = _rows(
        query, probe, key, value, dout, out, v_mean, lse, t_mean, mask, **static, block_k=block_k, stages=row_stages, policy=row_policy
    )
    dk, dv = _columns(query, probe, key, value, dout, stats, mask, **static, block_q=64, stages=column_stages, policy=column_policy)
    return dq[:, :num_queries], dr[:, :num_queries], dk[:, :num_keys], dv[:, :num_keys]


def _rows(query, probe, key, value, dout, out, v_mean, lse, t_mean, mask, *, num_queries, num_keys, scale, block_k, stages, interpret, policy='s2'):
    """Returns (dquery, dprobe) and the rows' statistics for the other pass: (B, N, 4, T'), T' is T in whole blocks."""
    batch, _, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    dtype = query.dtype
    c = scale * tiles.LOG2_E
    num_row_blocks = pl.cdiv(num_queries, ROWS * GROUPS)
    masks = common.Masks(mask, num_queries, num_keys, block_k)

    def kernel(q_ref, r_ref, k_ref, v_ref, do_ref, out_ref, v_mean_ref, lse_ref, t_mean_ref, *refs, **scratch):
        s = types.SimpleNamespace(**scratch)
        mask_refs, (dq_ref, dr_ref, stat_ref) = refs[:-3], refs[-3:]
        group = lax.axis_index("group")
        batch_index, head, block = common.work_item(batch, heads)
        row = (num_row_blocks - 1 - block) * (ROWS * GROUPS)  # the longest rows start first
        bounds = [masks.key_bounds(mask_refs, batch_index, row + i * ROWS) for i in range(GROUPS)]
        first = functools.reduce(jnp.minimum, [b.first for b in bounds])
        last = functools.reduce(jnp.maximum, [b.last for b in bounds])

        def slot(j):
            return lax.rem(j - first, stages)

        @pl.when(group < GROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            own = jax.tree.map(functools.partial(jnp.where, group == 0), *bounds)
            rows = pl.ds(row + group * ROWS, ROWS)
            q, r, do, stat = s.q.at[group], s.r.at[group], s.do.at[group], s.stat.at[group]
            results = [
                plgpu.load(x.at[batch_index, rows, head], layout=plgpu.Layout.WGMMA, optimized=False)
                for x in (out_ref, v_mean_ref)
            ]

            @pl.when(group == 0)
            def _():
                plgpu.barrier_arrive(s.turn.at[0])

            def skip(j, _):
                for ready, free in ((s.k_ready, s.k_free), (s.v_ready, s.v_free)):
                    plgpu.barrier_wait(ready.at[slot(j)])
                    plgpu.barrier_arrive(free.at[slot(j)])
                if policy != "none":
                    plgpu.barrier_wait(s.turn.at[group])
                    plgpu.barrier_arrive(s.turn.at[1 - group])

            lax.fori_loop(first, own.first, skip, None)
            plgpu.barrier_wait(s.rows_ready.at[group])
            dout = plgpu.load(do, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            tau, beta = [jnp.sum(dout * x.astype(jnp.float32), axis=-1) for x in results]
            stat[2], stat[3] = tau, beta
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stat, stat_ref.at[batch_index, head, :, rows])
            lse, t_mean = [
                plgpu.load(stat.at[i], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False) for i in range(2)
            ]

            def attend(dq, dr, s1, s2, a):
                def scores(j, between):
                    plgpu.barrier_wait(s.k_ready.at[slot(j)])
                    k = s.k.at[slot(j)].transpose((1, 0))
                    common.assign(s1, common.full_tile((ROWS, block_k)), interpret)
                    plgpu.wgmma(s1, q, k)
                    between()
                    common.assign(s2, common.full_tile((ROWS, block_k)), interpret)
                    plgpu.wgmma(s2, r, k)
                    plgpu.barrier_wait(s.v_ready.at[slot(j)])

                def weights(j, masked):
                    tile = rows.start, j * block_k, (ROWS, block_k)
                    visible = masks.visible(mask_refs, batch_index, *tile) if masked else None
                    t1 = plgpu.wgmma_accumulator_load(s1, wait_n=1)
                    p = tiles.backward_weights(lax.optimization_barrier(t1), c, visible, lse)
                    p = lax.optimization_barrier(p.astype(jnp.float16))
                    common.assign(a, common.full_tile((ROWS, block_k)), interpret)
                    plgpu.wgmma(a, do, s.v.at[slot(j)].transpose((1, 0)))
                    return p

                def add_keys(j, p, between):
                    t2, x = [plgpu.wgmma_accumulator_load(acc, wait_n=0) for acc in (s2, a)]
                    t2, x = lax.optimization_barrier((t2, x))
                    plgpu.barrier_arrive(s.v_free.at[slot(j)])
                    p = p.astype(jnp.float32)
                    w = tiles.combined_weights(p, t2, t_mean)
                    ds1, ds2 = tiles.score_gradients(p, w, x, tau, beta)
                    ds1, ds2 = lax.optimization_barrier((ds1.astype(dtype), ds2.astype(dtype)))
                    if policy != "none":
                        plgpu.barrier_wait(s.turn.at[group])
                    common.add_product(dq, ds1, s.k.at[slot(j)], interpret)
                    common.add_product(dr, ds2, s.k.at[slot(j)], interpret)
                    between()
                    if policy == "s2":
                        plgpu.barrier_arrive(s.turn.at[1 - group])

                def body(j, carry, masked):
                    def keys_done():
                        plgpu.wgmma_wait(1)
                        if policy == "pv":
                            plgpu.barrier_arrive(s.turn.at[1 - group])
                        plgpu.barrier_arrive(s.k_free.at[slot(j - 1)])

                    add_keys(j - 1, carry, lambda: scores(j, keys_done))
                    return weights(j, masked)

                scores(own.first, lambda: None)
                carry = weights(own.first, True)
                for start, stop, masked in common.phases(own, masks.can_start_masked):
                    carry = lax.fori_loop(start, stop, functools.partial(body, masked=masked), carry)
                add_keys(own.last - 1, carry, lambda: policy == "pv" and plgpu.barrier_arrive(s.turn.at[1 - group]))
                dq, dr = [plgpu.wgmma_accumulator_load(x, wait_n=0) for x in (dq, dr)]
                plgpu.barrier_arrive(s.k_free.at[slot(own.last - 1)])
                return dq, dr

            dq, dr = pl.run_scoped(
                attend, *[plgpu.ACC((ROWS, n), jnp.float32) for n in (head_dim, head_dim, block_k, block_k, block_k)]
            )
            lax.fori_loop(own.last, last, skip, None)
            q[...], r[...] = (dq * scale).astype(dtype), dr.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq_ref.at[batch_index, rows, head])
            plgpu.copy_smem_to_gmem(r, dr_ref.at[batch_index, rows, head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            policy != 'none' and pl.when(group == 0)(lambda: plgpu.barrier_wait(s.turn.at[0]))

        @pl.when(group == GROUPS)
        def _memory():
            plgpu.set_max_registers(24, action="decrease")
            kv_head = lax.div(head, heads // kv_heads)

            def load_rows(i):
                rows = pl.ds(row + i * ROWS, ROWS)
                for src, dst in ((q_ref, s.q), (r_ref, s.r), (do_ref, s.do)):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, rows, head], dst.at[i], s.rows_ready.at[i])
                for n, src in enumerate((lse_ref, t_mean_ref)):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, head, rows], s.stat.at[i, n], s.rows_ready.at[i])

            def load_keys(j, wait=True):
                keys = pl.ds(j * block_k, block_k)
                for src, dst, ready, free in ((k_ref, s.k, s.k_ready, s.k_free), (v_ref, s.v, s.v_ready, s.v_free)):
                    if wait:
                        pl.when(j - first >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot(j)]))
                    plgpu.copy_gmem_to_smem(src.at[batch_index, keys, kv_head], dst.at[slot(j)], ready.at[slot(j)])

            load_rows(0)
            load_keys(first, wait=False)
            load_rows(1)
            lax.fori_loop(first + 1, last, lambda j, _: load_keys(j), None)
            for free in (s.k_free, s.v_free):  # leave no barrier behind with an arrival that nobody has seen
                common.drain(free, last - first, stages)

    tile = functools.partial(common.swizzled, dtype=dtype)
    stat_type = jax.ShapeDtypeStruct((batch, heads, 4, num_row_blocks * ROWS * GROUPS), jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(query.shape, dtype),) * 2 + (stat_type,),
        scratch_types=dict(
            q=tile(GROUPS, ROWS, head_dim),
            r=tile(GROUPS, ROWS, head_dim),
            do=tile(GROUPS, ROWS, head_dim),
            k=tile(stages, block_k, head_dim),
            v=tile(stages, block_k, head_dim),
            stat=plgpu.SMEM((GROUPS, 4, ROWS), jnp.float32),
            rows_ready=plgpu.Barrier(num_arrivals=5, num_barriers=GROUPS),
            k_ready=plgpu.Barrier(num_barriers=stages),
            k_free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            v_ready=plgpu.Barrier(num_barriers=stages),
            v_free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            turn=plgpu.Barrier(num_barriers=GROUPS),
        ),
        grid=(batch * heads * num_row_blocks,),
        **common.launch("parallax_backward_rows", GROUPS + 1, interpret),
    )(query, probe, key, value, dout, out, v_mean, lse, t_mean, *masks.arrays)


def _columns(query, probe, key, value, dout, stats, mask, *, num_queries, num_keys, scale, block_q, stages, interpret, policy='s2'):
    """Returns (dkey, dvalue), summed over the query heads that share a key."""
    batch, _, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group_heads = heads // kv_heads
    dtype = query.dtype
    c = scale * tiles.LOG2_E
    num_key_blocks = pl.cdiv(num_keys, ROWS * GROUPS)
    masks = common.Masks(mask, num_queries, num_keys, block_q)

    def kernel(q_ref, r_ref, k_ref, v_ref, do_ref, stat_ref, *refs, **scratch):
        s = types.SimpleNamespace(**scratch)
        mask_refs, (dk_ref, dv_ref) = refs[:-2], refs[-2:]
        group = lax.axis_index("group")
        batch_index, kv_head, block = common.work_item(batch, kv_heads)
        key = block * (ROWS * GROUPS)  # under a causal mask the first keys have the most rows
        bounds = [masks.row_bounds(mask_refs, batch_index, key + i * ROWS) for i in range(GROUPS)]
        first = functools.reduce(jnp.minimum, [b.first for b in bounds])
        last = functools.reduce(jnp.maximum, [b.last for b in bounds])

        @pl.when(group < GROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            own = jax.tree.map(functools.partial(jnp.where, group == 0), *bounds)
            keys = pl.ds(key + group * ROWS, ROWS)
            k, v = s.k.at[group], s.v.at[group]

            @pl.when(group == 0)
            def _():
                plgpu.barrier_arrive(s.turn.at[0])

            plgpu.barrier_wait(s.keys_ready.at[group])

            def attend(dk, dv, s1, s2, a):
                def head_rows(g, _):
                    def slot(j):
                        return lax.rem(g * (last - first) + j - first, stages)

                    def stat(j, i):
                        layout = plgpu.Layout.WGMMA.reduce(0)
                        return plgpu.load(s.stat.at[slot(j), i], layout=layout, optimized=False)

                    def skip(j, _):
                        plgpu.barrier_wait(s.ready.at[slot(j)])
                        plgpu.barrier_arrive(s.free.at[slot(j)])
                        if policy != "none":
                            plgpu.barrier_wait(s.turn.at[group])
                            plgpu.barrier_arrive(s.turn.at[1 - group])

                    def scores(j, between):
                        plgpu.barrier_wait(s.ready.at[slot(j)])
                        common.assign(s1, common.full_tile((ROWS, block_q)), interpret)
                        plgpu.wgmma(s1, k, s.q.at[slot(j)].transpose((1, 0)))
                        between()
                        common.assign(s2, common.full_tile((ROWS, block_q)), interpret)
                        plgpu.wgmma(s2, k, s.r.at[slot(j)].transpose((1, 0)))

                    def weights(j, masked):
                        tile = j * block_q, keys.start, (ROWS, block_q)
                        visible = masks.visible(mask_refs, batch_index, *tile, key_axis=0) if masked else None
                        t1 = plgpu.wgmma_accumulator_load(s1, wait_n=1)
                        return tiles.backward_weights(lax.optimization_barrier(t1), c, visible, stat(j, 0), key_axis=0)

                    def add_rows(j, p, between):
                        t2 = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s2, wait_n=0))
                        w = tiles.combined_weights(p, t2, stat(j, 1), key_axis=0)
                        p, w = lax.optimization_barrier((p.astype(jnp.float16), w.astype(dtype)))
                        common.assign(a, common.full_tile((ROWS, block_q)), interpret)
                        plgpu.wgmma(a, v, s.do.at[slot(j)].transpose((1, 0)))
                        common.add_product(dv, w, s.do.at[slot(j)], interpret)
                        x = lax.optimization_barrier(plgpu.wgmma_accumulator_load(a, wait_n=1))
                        p, w = p.astype(jnp.float32), w.astype(jnp.float32)
                        ds1, ds2 = tiles.score_gradients(p, w, x, stat(j, 2), stat(j, 3), key_axis=0)
                        ds1, ds2 = lax.optimization_barrier(((ds1 * scale).astype(dtype), ds2.astype(dtype)))
                        if policy != "none":
                            plgpu.barrier_wait(s.turn.at[group])
                        common.add_product(dk, ds1, s.q.at[slot(j)], interpret)
                        common.add_product(dk, ds2, s.r.at[slot(j)], interpret)
                        between()
                        if policy == "s2":
                            plgpu.barrier_arrive(s.turn.at[1 - group])

                    def body(j, carry, masked):
                        def rows_done():
                            plgpu.wgmma_wait(1)
                            if policy == "pv":
                                plgpu.barrier_arrive(s.turn.at[1 - group])
                            plgpu.barrier_arrive(s.free.at[slot(j - 1)])

                        add_rows(j - 1, carry, lambda: scores(j, rows_done))
                        return weights(j, masked)

                    def final():
                        plgpu.wgmma_wait(0)
                        if policy == "pv":
                            plgpu.barrier_arrive(s.turn.at[1 - group])
                        plgpu.barrier_arrive(s.free.at[slot(own.last - 1)])

                    lax.fori_loop(first, own.first, skip, None)
                    scores(own.first, lambda: None)
                    carry = weights(own.first, True)
                    for start, stop, masked in common.phases(own, masks.rows_can_start_masked):
                        carry = lax.fori_loop(start, stop, functools.partial(body, masked=masked), carry)
                    add_rows(own.last - 1, carry, final)
                    lax.fori_loop(own.last, last, skip, None)

                lax.fori_loop(0, group_heads, head_rows, None)
                return [plgpu.wgmma_accumulator_load(x, wait_n=0) for x in (dk, dv)]

            dk, dv = pl.run_scoped(
                attend, *[plgpu.ACC((ROWS, n), jnp.float32) for n in (head_dim, head_dim, block_q, block_q, block_q)]
            )
            k[...], v[...] = dk.astype(dtype), dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, dk_ref.at[batch_index, keys, kv_head])
            plgpu.copy_smem_to_gmem(v, dv_ref.at[batch_index, keys, kv_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            policy != 'none' and pl.when(group == 0)(lambda: plgpu.barrier_wait(s.turn.at[0]))

        @pl.when(group == GROUPS)
        def _memory():
            plgpu.set_max_registers(24, action="decrease")
            num_steps = group_heads * (last - first)

            def load_rows(step, _):
                slot = lax.rem(step, stages)
                head = kv_head * group_heads + lax.div(step, last - first)
                rows = pl.ds((first + lax.rem(step, last - first)) * block_q, block_q)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(s.free.at[slot]))
                for src, dst in ((q_ref, s.q), (r_ref, s.r), (do_ref, s.do)):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, rows, head], dst.at[slot], s.ready.at[slot])
                plgpu.copy_gmem_to_smem(stat_ref.at[batch_index, head, :, rows], s.stat.at[slot], s.ready.at[slot])

            for i in range(GROUPS):
                keys = pl.ds(key + i * ROWS, ROWS)
                for src, dst in ((k_ref, s.k), (v_ref, s.v)):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, keys, kv_head], dst.at[i], s.keys_ready.at[i])
            lax.fori_loop(0, num_steps, load_rows, None)
            common.drain(s.free, num_steps, stages)

    tile = functools.partial(common.swizzled, dtype=dtype)
    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(key.shape, dtype), jax.ShapeDtypeStruct(value.shape, dtype)),
        scratch_types=dict(
            q=tile(stages, block_q, head_dim),
            r=tile(stages, block_q, head_dim),
            do=tile(stages, block_q, head_dim),
            k=tile(GROUPS, ROWS, head_dim),
            v=tile(GROUPS, ROWS, head_dim),
            stat=plgpu.SMEM((stages, 4, block_q), jnp.float32),
            keys_ready=plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            ready=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            turn=plgpu.Barrier(num_barriers=GROUPS),
        ),
        grid=(batch * kv_heads * num_key_blocks,),
        **common.launch("parallax_backward_columns", GROUPS + 1, interpret),
    )(query, probe, key, value, dout, stats, *masks.arrays)
