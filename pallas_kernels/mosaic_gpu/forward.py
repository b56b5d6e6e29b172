# NOTE FROM THE LEAD (delete this line once read): device time left is 530 s and reserved. Make NO further device runs; finish correctness, features, tests, docs and the ahead-of-time checks without a GPU. tiles.State changed: use tiles.from_fixed_centre at the end.
"""Forward pass of Parallax attention for Hopper."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks, tiles
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.common import ROWS

GROUPS = 2


def forward(query, probe, key, value, mask, *, scale, block_k=64, stages=2, lane=False, init=True, late='s2', early_scale=True, interpret=False):
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads, value_dim = value.shape[1:]
    dtype = query.dtype
    c = scale * tiles.LOG2_E
    num_row_blocks = pl.cdiv(num_queries, ROWS * GROUPS)
    masks = common.Masks(mask, num_queries, num_keys, block_k)

    def kernel(
        q_ref,
        r_ref,
        k_ref,
        v_ref,
        *refs,
        q_smem,
        r_smem,
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
        mask_refs, (out_ref, v_mean_ref, lse_ref, t_mean_ref) = refs[:-4], refs[-4:]
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
            q, r = q_smem.at[group], r_smem.at[group]

            @pl.when(group == 0)
            def _():
                plgpu.barrier_arrive(turn.at[0])

            def skip(j, _):
                for ready, free in ((k_ready, k_free), (v_ready, v_free)):
                    plgpu.barrier_wait(ready.at[slot(j)])
                    plgpu.barrier_arrive(free.at[slot(j)])
                if late != "none":
                    plgpu.barrier_wait(turn.at[group])
                    plgpu.barrier_arrive(turn.at[1 - group])

            def attend(o1, o2, s1, s2):
                def scores(j, centre, between):
                    plgpu.barrier_wait(k_ready.at[slot(j)])
                    k = k_smem.at[slot(j)].transpose((1, 0))
                    common.assign(s1, common.full_tile((ROWS, block_k)), interpret)
                    plgpu.wgmma(s1, q, k)
                    between()
                    zero = common.full_tile((ROWS, block_k))
                    if centre is not None and init:
                        zero = tiles.spread(-centre, zero)
                    common.assign(s2, zero, interpret)
                    plgpu.wgmma(s2, r, k)

                def weights(j, m, d1, masked):
                    visible = masks.visible(mask_refs, batch_index, rows.start, j * block_k, (ROWS, block_k)) if masked else None
                    t1 = plgpu.wgmma_accumulator_load(s1, wait_n=1)
                    if late == "s1":
                        plgpu.barrier_arrive(turn.at[1 - group])
                    m, a, p = tiles.softmax_weights(m, lax.optimization_barrier(t1), c, visible)
                    return m, a, tiles.spread(a, d1) * d1 + common.column_sums(p), p

                def rescale(a):
                    for o in (o1, o2):
                        x = plgpu.wgmma_accumulator_load(o, wait_n=None)
                        common.assign(o, x * tiles.spread(a, x), interpret)

                def add_values(j, carry, between):
                    a, d2, p, centre = carry
                    t2 = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s2, wait_n=0))
                    if not init:
                        t2 = t2 - tiles.spread(centre, t2)
                    plgpu.barrier_arrive(k_free.at[slot(j)])
                    p2 = p * t2
                    d2 = tiles.spread(a, d2) * d2 + common.column_sums(p2)
                    if not early_scale:
                        rescale(a)
                    p, p2, d2 = lax.optimization_barrier((p.astype(dtype), p2.astype(dtype), d2))
                    plgpu.barrier_wait(v_ready.at[slot(j)])
                    if late != "none":
                        plgpu.barrier_wait(turn.at[group])
                    common.add_product(o1, p, v_smem.at[slot(j)], interpret)
                    common.add_product(o2, p2, v_smem.at[slot(j)], interpret)
                    between()
                    return d2

                def body(j, carry, masked):
                    def values_done():
                        if late == "issue":
                            plgpu.barrier_arrive(turn.at[1 - group])
                        plgpu.wgmma_wait(1)
                        if late == "pv":
                            plgpu.barrier_arrive(turn.at[1 - group])
                        plgpu.barrier_arrive(v_free.at[slot(j - 1)])

                    m, a, d1, d2, p, centre = carry
                    d2 = add_values(j - 1, (a, d2, p, centre), lambda: scores(j, centre, values_done))
                    if late == "s2":
                        plgpu.barrier_arrive(turn.at[1 - group])
                    m, a, d1, p = weights(j, m, d1, masked)
                    if early_scale:
                        rescale(a)
                    return m, a, d1, d2, p, centre

                sums = common.full_tile((ROWS, 8))
                if late != "none":
                    plgpu.barrier_wait(turn.at[group])
                scores(own.first, None, lambda: None)
                if late not in ("s1", "none"):
                    plgpu.barrier_arrive(turn.at[1 - group])
                m, a, d1, p = weights(own.first, common.full_rows(-jnp.inf), sums, True)
                t2 = lax.optimization_barrier(plgpu.wgmma_accumulator_load(s2, wait_n=0))
                seen = jnp.sum(p, axis=-1)
                centre = jnp.sum(p * t2, axis=-1) / jnp.where(seen == 0.0, 1.0, seen)
                if init:
                    common.assign(s2, t2 - tiles.spread(centre, t2), interpret)
                carry = m, a, d1, sums, p, centre
                for start, stop, masked in common.phases(own, masks.can_start_masked):
                    carry = lax.fori_loop(start, stop, functools.partial(body, masked=masked), carry)
                m, a, d1, d2, p, centre = carry
                d2 = add_values(own.last - 1, (a, d2, p, centre), lambda: None)
                if late != "none":
                    plgpu.barrier_arrive(turn.at[1 - group])
                o1, o2 = [plgpu.wgmma_accumulator_load(o, wait_n=0) for o in (o1, o2)]
                plgpu.barrier_arrive(v_free.at[slot(own.last - 1)])
                return tiles.from_fixed_centre(m, jnp.sum(d1, axis=-1), jnp.sum(d2, axis=-1), o1, o2, centre)

            lax.fori_loop(first, own.first, skip, None)
            plgpu.barrier_wait(q_ready.at[group])
            state = pl.run_scoped(
                attend, *[plgpu.ACC((ROWS, n), jnp.float32) for n in (value_dim, value_dim, block_k, block_k)]
            )
            lax.fori_loop(own.last, last, skip, None)
            out, v_mean, lse, t_mean = tiles.finish(state)
            q[...], r[...] = out.astype(dtype), v_mean.astype(dtype)
            stat_smem[group, 0], stat_smem[group, 1] = lse, t_mean
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, out_ref.at[batch_index, rows, head])
            plgpu.copy_smem_to_gmem(r, v_mean_ref.at[batch_index, rows, head])
            plgpu.copy_smem_to_gmem(stat_smem.at[group, 0], lse_ref.at[batch_index, head, rows])
            plgpu.copy_smem_to_gmem(stat_smem.at[group, 1], t_mean_ref.at[batch_index, head, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            late != 'none' and pl.when(group == 0)(lambda: plgpu.barrier_wait(turn.at[0]))

        @pl.when(group == GROUPS)
        def _memory():
            plgpu.set_max_registers(24, action="decrease")
            kv_head = head // (heads // kv_heads)

            def load_rows(i):
                rows = pl.ds(row + i * ROWS, ROWS)
                for src, dst in ((q_ref, q_smem), (r_ref, r_smem)):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, rows, head], dst.at[i], q_ready.at[i])

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

    query, probe, key, value = common.pad_rows(query, probe, *masks.hide_padding(key, value))
    values_type = jax.ShapeDtypeStruct(query.shape, dtype)
    stat_type = jax.ShapeDtypeStruct((batch, heads, num_row_blocks * ROWS * GROUPS), jnp.float32)
    out, v_mean, lse, t_mean = plgpu.kernel(
        kernel,
        out_type=(values_type, values_type, stat_type, stat_type),
        scratch_types=dict(
            q_smem=common.swizzled(GROUPS, ROWS, head_dim, dtype=dtype),
            r_smem=common.swizzled(GROUPS, ROWS, head_dim, dtype=dtype),
            k_smem=common.swizzled(stages, block_k, head_dim, dtype=dtype),
            v_smem=common.swizzled(stages, block_k, value_dim, dtype=dtype),
            stat_smem=plgpu.SMEM((GROUPS, 2, ROWS), jnp.float32),
            q_ready=plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            k_ready=plgpu.Barrier(num_barriers=stages),
            k_free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            v_ready=plgpu.Barrier(num_barriers=stages),
            v_free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
            turn=plgpu.Barrier(num_barriers=GROUPS),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane if lane else plgpu.LoweringSemantics.Warpgroup,
        ),
        grid=(batch * heads * num_row_blocks,),
        grid_names=("item",),
        num_threads=GROUPS + 1,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        thread_name="group",
        kernel_name="parallax_forward",
    )(query, probe, key, value, *masks.arrays)
    return out[:, :num_queries], v_mean[:, :num_queries], lse[..., :num_queries], t_mean[..., :num_queries]
