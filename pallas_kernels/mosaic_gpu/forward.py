"""Forward pass of Parallax attention for Hopper."""

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.common import BLOCK, GROUPS


def order(num_heads: int, num_blocks: int, group_heads: int, masks) -> common.Order:
    """Chunks of as many heads as run at once, or twice as many, in whole groups: programs that read the same keys."""
    wave = max(1, common.MULTIPROCESSORS // num_blocks)
    heads = 2 * wave if masks.mask.window is None else wave
    return common.Order(num_heads, num_blocks, chunk=group_heads * pl.cdiv(heads, group_heads))


def forward(query, probe, key, value, mask, *, scale, stages, interpret):
    """Returns (out, v_mean, lse, t_mean); widths of heads and values are both 64 or both 128.

    A warpgroup keeps 64 rows' two accumulators of values in registers. While the probe scores of a block of keys are on
    their way, it turns the query scores into weights and rescales the accumulators; then, in its turn, it starts the
    block's products with the values and both score products of the next block.
    """
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads, _ = key.shape[1:]
    dtype = query.dtype
    c = scale * tiles.LOG2_E
    num_row_blocks = pl.cdiv(num_queries, GROUPS * BLOCK)
    masks = common.Masks(mask, num_queries, num_keys)
    programs = order(batch * heads, num_row_blocks, heads // kv_heads, masks)

    def kernel(q_ref, r_ref, k_ref, v_ref, *refs, **scratch):
        s = types.SimpleNamespace(**scratch)
        mask_refs, (out_ref, v_mean_ref, lse_ref, t_mean_ref) = refs[:-4], refs[-4:]
        group = lax.axis_index("group")
        head, block, _ = programs.at(lax.axis_index("item"))
        batch_index, head = lax.div(head, heads), lax.rem(head, heads)
        row = (num_row_blocks - 1 - block) * (GROUPS * BLOCK)  # the longest rows start first
        first, last, bounds = masks.key_bounds(mask_refs, batch_index, row)

        def slot(j):
            return common.ring_slot(j - first, stages)

        @pl.when(group < GROUPS)
        def _compute():
            plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")
            own = jax.tree.map(functools.partial(jnp.where, group == 0), *bounds)
            rows = pl.ds(row + group * BLOCK, BLOCK)
            stat = s.stat.at[group]
            turns = common.Turns(s.turn, group)

            def skip(j, _):
                for ring in (s.k_ring, s.v_ring):
                    plgpu.barrier_wait(ring["ready"].at[slot(j)])
                    plgpu.barrier_arrive(ring["free"].at[slot(j)])
                turns.take()
                turns.give()

            def attend(o1, o2, s1, s2):
                def start_scores(j, centre=None, before_s2=lambda: None):
                    plgpu.barrier_wait(s.k_ring["ready"].at[slot(j)])
                    k = s.k.at[slot(j)]
                    q, r = (x.at[group + common.hidden_zero(j)] for x in (s.q, s.r))
                    common.start_product(s1, q, k, interpret)
                    before_s2()
                    if centre is None:
                        common.start_product(s2, r, k, interpret)
                    else:
                        common.assign(s2, tiles.spread(-centre, common.zeros(BLOCK)), interpret)
                        plgpu.wgmma(s2, r, k.transpose((1, 0)))

                def weights(j, m, d1):
                    def hide(t1):
                        zero = common.hidden_zero(j)
                        visible = masks.visible(mask_refs, batch_index + zero, rows.start + zero, j * BLOCK)
                        return jnp.where(visible, t1, -jnp.inf)

                    t1, positive_c = tiles.positive_scale(common.read(s1, pending=1), c)
                    is_full = (j >= own.full_first) & (j < own.full_last)
                    t1 = lax.cond(is_full, lambda t1: t1, hide, t1)
                    m, a, p = tiles.softmax_weights(m, t1, positive_c, None)
                    return m, a, tiles.spread(a, d1) * d1 + common.sums_in_threads(p), p

                def rescale(a):
                    for o in (o1, o2):
                        x = plgpu.wgmma_accumulator_load(o, wait_n=None)
                        common.assign(o, x * tiles.spread(a, x), interpret)

                def add_values(j, a, d2, p, then):
                    p2 = p * common.read(s2)
                    plgpu.barrier_arrive(s.k_ring["free"].at[slot(j)])
                    d2 = tiles.spread(a, d2) * d2 + common.sums_in_threads(p2)
                    p, p2, d2 = lax.optimization_barrier((p.astype(dtype), p2.astype(dtype), d2))
                    plgpu.barrier_wait(s.v_ring["ready"].at[slot(j)])
                    turns.take()
                    common.add_product(o1, p, s.v.at[slot(j)], interpret)
                    common.add_product(o2, p2, s.v.at[slot(j)], interpret)
                    then()
                    return d2

                def values_done(j, pending):
                    plgpu.wgmma_wait(pending)
                    turns.give()
                    plgpu.barrier_arrive(s.v_ring["free"].at[slot(j)])

                def body(j, carry):
                    m, a, d1, d2, p, centre = carry
                    done = functools.partial(values_done, j - 1, 1)
                    d2 = add_values(j - 1, a, d2, p, lambda: start_scores(j, centre, done))
                    m, a, d1, p = weights(j, m, d1)
                    rescale(a)
                    return m, a, d1, d2, p, centre

                sums = common.zeros(8)
                m = plgpu.layout_cast(jnp.full((BLOCK,), -jnp.inf, jnp.float32), common.row_layout(0))
                turns.take()
                start_scores(own.first)
                turns.give()
                m, a, d1, p = weights(own.first, m, sums)
                t = common.read(s2)
                seen = jnp.sum(p, axis=-1)
                # The first block's mean of t: near t_mean where one key, or a part of all keys, dominates t.
                centre = jnp.sum(p * t, axis=-1) / jnp.where(seen == 0.0, 1.0, seen)
                common.assign(s2, t - tiles.spread(centre, t), interpret)
                carry = m, a, d1, sums, p, centre
                m, a, d1, d2, p, centre = lax.fori_loop(own.first + 1, own.last, body, carry)
                d2 = add_values(own.last - 1, a, d2, p, functools.partial(values_done, own.last - 1, 0))
                return m, jnp.sum(d1, axis=-1), jnp.sum(d2, axis=-1), *common.read(o1, o2), centre

            lax.fori_loop(first, own.first, skip, None)
            plgpu.barrier_wait(s.rows_ready.at[group])
            sums = pl.run_scoped(attend, *common.accumulators(head_dim, head_dim, BLOCK, BLOCK))
            lax.fori_loop(own.last, last, skip, None)
            out, v_mean, lse, t_mean = tiles.finish(tiles.from_fixed_centre(*sums))
            q, r = s.q.at[group], s.r.at[group]
            q[...], r[...] = out.astype(dtype), v_mean.astype(dtype)
            stat[0], stat[1] = lse, t_mean
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, out_ref.at[batch_index, rows, head])
            plgpu.copy_smem_to_gmem(r, v_mean_ref.at[batch_index, rows, head])
            plgpu.copy_smem_to_gmem(stat.at[0], lse_ref.at[batch_index, head, rows])
            plgpu.copy_smem_to_gmem(stat.at[1], t_mean_ref.at[batch_index, head, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            turns.end()

        @pl.when(group == GROUPS)
        def _copy():
            plgpu.set_max_registers(common.COPY_REGISTERS, action="decrease")
            kv_head = lax.div(head, heads // kv_heads)

            def load_rows(i):
                rows = pl.ds(row + i * BLOCK, BLOCK)
                for src, dst in ((q_ref, s.q), (r_ref, s.r)):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, rows, head], dst.at[i], s.rows_ready.at[i])

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

    query, probe, key, value = common.pad_rows(query, probe, *masks.hide_padding(key, value))
    tile = functools.partial(common.swizzled, BLOCK, head_dim, dtype=dtype)
    values = jax.ShapeDtypeStruct(query.shape, dtype)
    stat = jax.ShapeDtypeStruct((batch, heads, num_row_blocks * GROUPS * BLOCK), jnp.float32)
    out, v_mean, lse, t_mean = plgpu.kernel(
        kernel,
        out_type=(values, values, stat, stat),
        scratch_types=dict(
            q=tile(GROUPS),
            r=tile(GROUPS),
            k=tile(stages),
            v=tile(stages),
            stat=plgpu.SMEM((GROUPS, 2, BLOCK), jnp.float32),
            rows_ready=plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            k_ring=common.ring(stages),
            v_ring=common.ring(stages),
            turn=plgpu.Barrier(num_barriers=GROUPS),
        ),
        **common.launch("parallax_forward", batch * heads * num_row_blocks, interpret),
    )(query, probe, key, value, *masks.arrays, *masks.spans)
    return out[:, :num_queries], v_mean[:, :num_queries], lse[..., :num_queries], t_mean[..., :num_queries]
