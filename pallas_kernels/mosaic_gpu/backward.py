# NOTE FROM THE LEAD (delete this line once read): device time left is 530 s and reserved. Make NO further device runs; finish correctness, features, tests, docs and the ahead-of-time checks without a GPU. tiles.State changed: use tiles.from_fixed_centre at the end.
"""Backward pass of Parallax attention for Hopper: one kernel over query rows, one over keys, no atomics."""

import functools

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
    query, probe, key, value, mask, out, v_mean, lse, t_mean, dout, *, scale, block_k=64, row_stages=2, column_stages=2, interpret=False
):
    num_queries, num_keys = query.shape[1], key.shape[1]
    stats = _row_stats(out, v_mean, lse, t_mean, dout)
    key, value = common.Masks(mask, num_queries, num_keys, block_k).hide_padding(key, value)
    args = *common.pad_rows(query, probe, key, value, dout), stats
    static = dict(num_queries=num_queries, num_keys=num_keys, scale=scale)
    dq, dr = _rows(*args, mask, **static, block_k=block_k, stages=row_stages, interpret=interpret)
    dk, dv = _columns(*args, mask, **static, block_q=64, stages=column_stages, interpret=interpret)
    return dq[:, :num_queries], dr[:, :num_queries], dk[:, :num_keys], dv[:, :num_keys]


def _row_stats(out, v_mean, lse, t_mean, dout):
    """(B, N, 4, T'): lse, t_mean, tau = rowsum(dO out), beta = rowsum(dO v_mean); T' is T in whole blocks."""
    tau, beta = [jnp.einsum("btnh,btnh->bnt", dout, x, preferred_element_type=jnp.float32) for x in (out, v_mean)]
    pad = -lse.shape[-1] % (ROWS * GROUPS)
    # Rows past T get lse = +inf, hence p = 0.
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, pad)), constant_values=jnp.inf)
    return jnp.stack([lse, *[jnp.pad(x, ((0, 0), (0, 0), (0, pad))) for x in (t_mean, tau, beta)]], axis=2)


def _rows(query, probe, key, value, dout, stats, mask, *, num_queries, num_keys, scale, block_k, stages, pack=True, interpret=False):
    batch, _, heads, head_dim = query.shape
    kv_heads, value_dim = value.shape[2:]
    dtype = query.dtype
    c = scale * tiles.LOG2_E
    num_row_blocks = pl.cdiv(num_queries, ROWS * GROUPS)
    masks = common.Masks(mask, num_queries, num_keys, block_k)

    def kernel(
        q_ref,
        r_ref,
        k_ref,
        v_ref,
        do_ref,
        stat_ref,
        *refs,
        q_smem,
        r_smem,
        do_smem,
        k_smem,
        v_smem,
        stat_smem,
        q_ready,
        k_ready,
        k_free,
        v_ready,
        v_free,
        turn,
    ):
        mask_refs, (dq_ref, dr_ref) = refs[:-2], refs[-2:]
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
            q, r, do = q_smem.at[group], r_smem.at[group], do_smem.at[group]

            @pl.when(group == 0)
            def _():
                plgpu.barrier_arrive(turn.at[0])

            def skip(j, _):
                for ready, free in ((k_ready, k_free), (v_ready, v_free)):
                    plgpu.barrier_wait(ready.at[slot(j)])
                    plgpu.barrier_arrive(free.at[slot(j)])
                plgpu.barrier_wait(turn.at[group])
                plgpu.barrier_arrive(turn.at[1 - group])

            lax.fori_loop(first, own.first, skip, None)
            plgpu.barrier_wait(q_ready.at[group])
            lse, t_mean, tau, beta = [
                plgpu.load(stat_smem.at[group, i], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                for i in range(4)
            ]

            def attend(dq, dr, s1, s2, a):
                def scores(j, between):
                    plgpu.barrier_wait(k_ready.at[slot(j)])
                    k = k_smem.at[slot(j)].transpose((1, 0))
                    common.assign(s1, common.full_tile((ROWS, block_k)), interpret)
                    plgpu.wgmma(s1, q, k)
                    between()
                    common.assign(s2, common.full_tile((ROWS, block_k)), interpret)
                    plgpu.wgmma(s2, r, k)

                def weights(j, masked):
                    visible = (
                        masks.visible(mask_refs, batch_index, rows.start, j * block_k, (ROWS, block_k))
                        if masked
                        else None
                    )
                    t1 = plgpu.wgmma_accumulator_load(s1, wait_n=1)
                    return tiles.backward_weights(lax.optimization_barrier(t1), c, visible, lse)

                def add_keys(j, p, between):
                    t2 = plgpu.wgmma_accumulator_load(s2, wait_n=0)
                    w = tiles.combined_weights(p, lax.optimization_barrier(t2), t_mean)
                    if pack:
                        p, w = lax.optimization_barrier((p.astype(jnp.float16), w))
                    plgpu.barrier_wait(v_ready.at[slot(j)])
                    common.assign(a, common.full_tile((ROWS, block_k)), interpret)
                    plgpu.wgmma(a, do, v_smem.at[slot(j)].transpose((1, 0)))
                    x = lax.optimization_barrier(plgpu.wgmma_accumulator_load(a, wait_n=0))
                    plgpu.barrier_arrive(v_free.at[slot(j)])
                    ds1, ds2 = tiles.score_gradients(p.astype(jnp.float32), w, x, tau, beta)
                    ds1, ds2 = lax.optimization_barrier((ds1.astype(dtype), ds2.astype(dtype)))
                    plgpu.barrier_wait(turn.at[group])
                    common.add_product(dq, ds1, k_smem.at[slot(j)], interpret)
                    common.add_product(dr, ds2, k_smem.at[slot(j)], interpret)
                    between()
                    plgpu.barrier_arrive(turn.at[1 - group])

                def body(j, p, masked):
                    def keys_done():
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(k_free.at[slot(j - 1)])

                    add_keys(j - 1, p, lambda: scores(j, keys_done))
                    return weights(j, masked)

                scores(own.first, lambda: None)
                p = weights(own.first, True)
                for start, stop, masked in common.phases(own, masks.can_start_masked):
                    p = lax.fori_loop(start, stop, functools.partial(body, masked=masked), p)
                add_keys(own.last - 1, p, lambda: None)
                dq, dr = [plgpu.wgmma_accumulator_load(x, wait_n=0) for x in (dq, dr)]
                plgpu.barrier_arrive(k_free.at[slot(own.last - 1)])
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
            pl.when(group == 0)(lambda: plgpu.barrier_wait(turn.at[0]))

        @pl.when(group == GROUPS)
        def _memory():
            plgpu.set_max_registers(24, action="decrease")
            kv_head = head // (heads // kv_heads)

            def load_rows(i):
                rows = pl.ds(row + i * ROWS, ROWS)
                for src, dst in ((q_ref, q_smem), (r_ref, r_smem), (do_ref, do_smem)):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, rows, head], dst.at[i], q_ready.at[i])
                plgpu.copy_gmem_to_smem(stat_ref.at[batch_index, head, :, rows], stat_smem.at[i], q_ready.at[i])

            def load_keys(j, wait=True):
                keys = pl.ds(j * block_k, block_k)
                for src, dst, ready, free in ((k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)):
                    if wait:
                        pl.when(j - first >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot(j)]))
                    plgpu.copy_gmem_to_smem(src.at[batch_index, keys, kv_head], dst.at[slot(j)], ready.at[slot(j)])

            load_rows(0)
            load_keys(first, wait=False)
            load_rows(1)
            lax.fori_loop(first + 1, last, lambda j, _: load_keys(j), None)
            for free in (k_free, v_free):  # leave no barrier behind with an arrival that nobody has seen
                common.drain(free, last - first, stages)

    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(query.shape, dtype),) * 2,
        scratch_types=dict(
            q_smem=common.swizzled(GROUPS, ROWS, head_dim, dtype=dtype),
            r_smem=common.swizzled(GROUPS, ROWS, head_dim, dtype=dtype),
            do_smem=common.swizzled(GROUPS, ROWS, value_dim, dtype=dtype),
            k_smem=common.swizzled(stages, block_k, head_dim, dtype=dtype),
            v_smem=common.swizzled(stages, block_k, value_dim, dtype=dtype),
            stat_smem=plgpu.SMEM((GROUPS, 4, ROWS), jnp.float32),
            q_ready=plgpu.Barrier(num_arrivals=4, num_barriers=GROUPS),
            k_ready=plgpu.Barrier(num_barriers=stages),
            k_free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            v_ready=plgpu.Barrier(num_barriers=stages),
            v_free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            turn=plgpu.Barrier(num_barriers=GROUPS),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(batch * heads * num_row_blocks,),
        grid_names=("item",),
        num_threads=GROUPS + 1,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        thread_name="group",
        kernel_name="parallax_backward_rows",
    )(query, probe, key, value, dout, stats, *masks.arrays)


def _columns(query, probe, key, value, dout, stats, mask, *, num_queries, num_keys, scale, block_q, stages, interpret=False):
    batch, _, heads, head_dim = query.shape
    kv_heads, value_dim = value.shape[2:]
    group_heads = heads // kv_heads
    dtype = query.dtype
    c = scale * tiles.LOG2_E
    num_key_blocks = pl.cdiv(num_keys, ROWS * GROUPS)
    masks = common.Masks(mask, num_queries, num_keys, block_q)

    def kernel(
        q_ref,
        r_ref,
        k_ref,
        v_ref,
        do_ref,
        stat_ref,
        *refs,
        q_smem,
        r_smem,
        do_smem,
        k_smem,
        v_smem,
        stat_smem,
        kv_ready,
        ready,
        free,
        turn,
    ):
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
            k, v = k_smem.at[group], v_smem.at[group]

            @pl.when(group == 0)
            def _():
                plgpu.barrier_arrive(turn.at[0])

            plgpu.barrier_wait(kv_ready.at[group])

            def attend(dk, dv, s1, s2, a):
                def head_rows(g, _):
                    def slot(j):
                        return lax.rem(g * (last - first) + j - first, stages)

                    def skip(j, _):
                        plgpu.barrier_wait(ready.at[slot(j)])
                        plgpu.barrier_arrive(free.at[slot(j)])
                        plgpu.barrier_wait(turn.at[group])
                        plgpu.barrier_arrive(turn.at[1 - group])

                    def stat(j, i):
                        return plgpu.load(
                            stat_smem.at[slot(j), i], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
                        )

                    def scores(j, between):
                        plgpu.barrier_wait(ready.at[slot(j)])
                        common.assign(s1, common.full_tile((ROWS, block_q)), interpret)
                        plgpu.wgmma(s1, k, q_smem.at[slot(j)].transpose((1, 0)))
                        between()
                        common.assign(s2, common.full_tile((ROWS, block_q)), interpret)
                        plgpu.wgmma(s2, k, r_smem.at[slot(j)].transpose((1, 0)))

                    def weights(j, masked):
                        visible = (
                            masks.visible(mask_refs, batch_index, j * block_q, keys.start, (ROWS, block_q), key_axis=0)
                            if masked
                            else None
                        )
                        t1 = plgpu.wgmma_accumulator_load(s1, wait_n=1)
                        return tiles.backward_weights(lax.optimization_barrier(t1), c, visible, stat(j, 0), key_axis=0)

                    def add_rows(j, p, between):
                        t2 = plgpu.wgmma_accumulator_load(s2, wait_n=0)
                        w = tiles.combined_weights(p, lax.optimization_barrier(t2), stat(j, 1), key_axis=0)
                        p, w = lax.optimization_barrier((p.astype(jnp.float16), w.astype(dtype)))
                        common.assign(a, common.full_tile((ROWS, block_q)), interpret)
                        plgpu.wgmma(a, v, do_smem.at[slot(j)].transpose((1, 0)))
                        x = lax.optimization_barrier(plgpu.wgmma_accumulator_load(a, wait_n=0))
                        ds1, ds2 = tiles.score_gradients(
                            p.astype(jnp.float32), w.astype(jnp.float32), x, stat(j, 2), stat(j, 3), key_axis=0
                        )
                        ds1, ds2 = lax.optimization_barrier(((ds1 * scale).astype(dtype), ds2.astype(dtype)))
                        plgpu.barrier_wait(turn.at[group])
                        common.add_product(dv, w, do_smem.at[slot(j)], interpret)
                        common.add_product(dk, ds1, q_smem.at[slot(j)], interpret)
                        common.add_product(dk, ds2, r_smem.at[slot(j)], interpret)
                        between()
                        plgpu.barrier_arrive(turn.at[1 - group])

                    def body(j, p, masked):
                        def rows_done():
                            plgpu.wgmma_wait(1)
                            plgpu.barrier_arrive(free.at[slot(j - 1)])

                        add_rows(j - 1, p, lambda: scores(j, rows_done))
                        return weights(j, masked)

                    def final():
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[slot(own.last - 1)])

                    lax.fori_loop(first, own.first, skip, None)
                    scores(own.first, lambda: None)
                    p = weights(own.first, True)
                    for start, stop, masked in common.phases(own, masks.rows_can_start_masked):
                        p = lax.fori_loop(start, stop, functools.partial(body, masked=masked), p)
                    add_rows(own.last - 1, p, final)
                    lax.fori_loop(own.last, last, skip, None)

                lax.fori_loop(0, group_heads, head_rows, None)
                return [plgpu.wgmma_accumulator_load(x, wait_n=0) for x in (dk, dv)]

            dk, dv = pl.run_scoped(
                attend, *[plgpu.ACC((ROWS, n), jnp.float32) for n in (head_dim, value_dim, block_q, block_q, block_q)]
            )
            k[...], v[...] = dk.astype(dtype), dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, dk_ref.at[batch_index, keys, kv_head])
            plgpu.copy_smem_to_gmem(v, dv_ref.at[batch_index, keys, kv_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(group == 0)(lambda: plgpu.barrier_wait(turn.at[0]))

        @pl.when(group == GROUPS)
        def _memory():
            plgpu.set_max_registers(24, action="decrease")

            def load_rows(step, _):
                slot = lax.rem(step, stages)
                head = kv_head * group_heads + step // (last - first)
                rows = pl.ds((first + lax.rem(step, last - first)) * block_q, block_q)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                for src, dst in ((q_ref, q_smem), (r_ref, r_smem), (do_ref, do_smem)):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, rows, head], dst.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(stat_ref.at[batch_index, head, :, rows], stat_smem.at[slot], ready.at[slot])

            for i in range(GROUPS):
                keys = pl.ds(key + i * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(k_ref.at[batch_index, keys, kv_head], k_smem.at[i], kv_ready.at[i])
                plgpu.copy_gmem_to_smem(v_ref.at[batch_index, keys, kv_head], v_smem.at[i], kv_ready.at[i])
            lax.fori_loop(0, group_heads * (last - first), load_rows, None)
            common.drain(free, group_heads * (last - first), stages)

    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(key.shape, dtype), jax.ShapeDtypeStruct(value.shape, dtype)),
        scratch_types=dict(
            q_smem=common.swizzled(stages, block_q, head_dim, dtype=dtype),
            r_smem=common.swizzled(stages, block_q, head_dim, dtype=dtype),
            do_smem=common.swizzled(stages, block_q, value_dim, dtype=dtype),
            k_smem=common.swizzled(GROUPS, ROWS, head_dim, dtype=dtype),
            v_smem=common.swizzled(GROUPS, ROWS, value_dim, dtype=dtype),
            stat_smem=plgpu.SMEM((stages, 4, block_q), jnp.float32),
            kv_ready=plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            ready=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            turn=plgpu.Barrier(num_barriers=GROUPS),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(batch * kv_heads * num_key_blocks,),
        grid_names=("item",),
        num_threads=GROUPS + 1,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        thread_name="group",
        kernel_name="parallax_backward_columns",
    )(query, probe, key, value, dout, stats, *masks.arrays)
