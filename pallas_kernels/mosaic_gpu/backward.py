"""Backward pass of Parallax attention for Hopper in one kernel: 8 products, where passes over rows and keys take 11.

Why it is deterministic, why it cannot hang, and why others may read its sums: docs/results/mosaic_gpu.md.
"""

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

KEYS = GROUPS * BLOCK  # keys of a program
SUMS_IN_FLIGHT = 64 << 20  # bytes: the second-level cache of an H100 or H200 holds 50 MB
LEAST_HEADS = 8  # in flight at once: more programs of one head would only queue up for their turns


def backward(query, probe, key, value, mask, out, v_mean, lse, t_mean, dout, *, scale, stages, interpret):
    """Returns (dquery, dprobe, dkey, dvalue); widths of heads and values are both 64 or both 128."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    masks = common.Masks(mask, num_queries, num_keys)
    query, probe, key, value, dout = common.pad_rows(query, probe, *masks.hide_padding(key, value), dout)
    out, v_mean = common.pad_rows(out, v_mean)
    pad = ((0, 0), (0, 0), (0, -num_queries % BLOCK))
    lse, t_mean = jnp.pad(lse, pad, constant_values=jnp.inf), jnp.pad(t_mean, pad)  # rows past T get p = 0
    stats = _row_stats(dout, out, v_mean, lse, t_mean, interpret)
    dq, dr, dk, dv = _gradients(
        query, probe, key, value, dout, stats, masks, scale=scale, stages=stages, interpret=interpret
    )
    return dq[:, :num_queries], dr[:, :num_queries], dk[:, :num_keys], dv[:, :num_keys]


def order(num_heads: int, num_blocks: int, group_heads: int, num_rows: int, head_dim: int, masks) -> common.Order:
    """The order of programs: of those measured on an H100 and an H200, one that is good on both."""
    chunks_of = functools.partial(common.Order, num_heads, num_blocks)
    wave = common.MULTIPROCESSORS // num_blocks
    if masks.mask.window is not None:
        return chunks_of(1)
    if masks.is_plain and masks.mask.is_causal and group_heads > 1:
        if group_heads >= 4 and wave * num_blocks >= 0.94 * common.MULTIPROCESSORS:
            return chunks_of(wave, alternate=True)
        if wave >= 4:
            return chunks_of(wave // 2, last=wave)
    return chunks_of(max(LEAST_HEADS, SUMS_IN_FLIGHT // (2 * 4 * num_rows * head_dim * group_heads)))


def _row_stats(dout, out, v_mean, lse, t_mean, interpret):
    """What the kernel below needs of each row, in the form that it needs: (B, N, 4, T'), T' is T in whole blocks.

    They are lse, -1 - t_mean, -beta and beta - tau, with tau = rowsum(dO * out) and beta = rowsum(dO * v_mean).
    """
    batch, num_rows, heads, head_dim = dout.shape
    num_blocks = pl.cdiv(num_rows, BLOCK)
    programs = common.Order(batch * heads, num_blocks, chunk=batch * heads)

    def kernel(do_ref, out_ref, v_mean_ref, lse_ref, t_mean_ref, stat_ref, *, operands, stat, ready):
        head, block, _ = programs.at(lax.axis_index("item"))
        batch_index, head = lax.div(head, heads), lax.rem(head, heads)
        rows = pl.ds(block * BLOCK, BLOCK)
        for i, ref in enumerate((do_ref, out_ref, v_mean_ref)):
            plgpu.copy_gmem_to_smem(ref.at[batch_index, rows, head], operands.at[i], ready)
        for i, ref in enumerate((lse_ref, t_mean_ref)):
            plgpu.copy_gmem_to_smem(ref.at[batch_index, head, rows], stat.at[i], ready)
        plgpu.barrier_wait(ready)

        def add(i, sums):
            do, *others = (
                plgpu.load(operands.at[n, :, pl.ds(i * 64, 64)], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                for n in range(3)
            )
            return tuple(x + common.sums_in_threads(do * y) for x, y in zip(sums, others, strict=True))

        sums = lax.fori_loop(0, head_dim // 64, add, (common.zeros(8),) * 2)
        tau, beta = (jnp.sum(x, axis=-1) for x in sums)
        stat[1] = -1.0 - plgpu.load(stat.at[1], layout=common.row_layout(0), optimized=False)
        stat[2], stat[3] = -beta, beta - tau
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stat, stat_ref.at[batch_index, head, :, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads, 4, num_blocks * BLOCK), jnp.float32),
        scratch_types=dict(
            operands=common.swizzled(BLOCK, head_dim, 3, dtype=dout.dtype),
            stat=plgpu.SMEM((4, BLOCK), jnp.float32),
            ready=plgpu.Barrier(num_arrivals=5),
        ),
        **(common.launch("parallax_backward_stats", batch * heads * num_blocks, interpret) | dict(num_threads=1)),
    )(dout, out, v_mean, lse, t_mean)


def _gradients(query, probe, key, value, dout, stats, masks, *, scale, stages, interpret):
    """Returns (dquery, dprobe, dkey, dvalue). Tiles are transposed: (keys, rows).

    A program takes 128 keys and walks over their rows, from the last to the first. It keeps dkey and dvalue, and adds
    its share of dquery and dprobe to float32 sums in memory, row block by row block, each in the order of the keys. The
    last to add to a row block rounds its sums.
    """
    batch, num_rows, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    group_heads = heads // kv_heads
    dtype = query.dtype
    c = scale * tiles.LOG2_E
    num_key_blocks, num_row_blocks = pl.cdiv(num_keys, KEYS), pl.cdiv(num_rows, BLOCK)
    programs = order(batch * kv_heads, num_key_blocks, group_heads, num_rows, head_dim, masks)
    halves = head_dim // 64
    visits = masks.visits()

    def kernel(q_ref, r_ref, k_ref, v_ref, do_ref, stat_ref, *refs, **scratch):
        s = types.SimpleNamespace(**scratch)
        ds, staged_late = s.ds_or_staged if halves > 1 else (s.ds_or_staged, None)
        visit_refs, mask_refs = refs[: len(visits)], refs[len(visits) : -6]
        sum_refs, row_gradient_refs, (dk_ref, dv_ref) = refs[-6:-4], refs[-4:-2], refs[-2:]
        if not interpret:  # how many programs have added to a row block
            turns_taken = pl.get_global(plgpu.SemaphoreType.REGULAR((2, batch, heads, num_row_blocks)))
        group = lax.axis_index("group")
        head, block, ascending = programs.at(lax.axis_index("item"))
        batch_index, kv_head = lax.div(head, kv_heads), lax.rem(head, kv_heads)
        key = block * KEYS
        visit = masks.visit(visit_refs, mask_refs, batch_index, block)

        def num_steps():
            return group_heads * (visit.last - visit.first)

        def row_tile(step):
            """(query head, row block) of a step: every head that shares the keys, then the next row block."""
            passed = lax.div(step, group_heads)
            row_block = jnp.where(ascending, visit.first + passed, visit.last - 1 - passed)
            return kv_head * group_heads + lax.rem(step, group_heads), row_block

        def staged(kind):
            """The 64 columns each of a tile of sums, for dquery (0) or dprobe (1), on their way to memory."""
            return [s.staged.at[kind], *([staged_late.at[kind]] if halves > 1 else [])]

        def round_sums(kind):
            """Of the row blocks to which no later key block adds."""
            tile = s.q.at[kind]  # no product reads it any more

            def round_rows(i, _):
                head, row_block = kv_head * group_heads + lax.rem(i, group_heads), visit.first + lax.div(i, group_heads)
                rows = pl.ds(row_block * BLOCK, BLOCK)
                sums = plgpu.load(
                    sum_refs[kind].at[batch_index, rows, head], layout=plgpu.Layout.WGMMA, optimized=False
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                tile[...] = sums.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile, row_gradient_refs[kind].at[batch_index, rows, head])

            plgpu.barrier_wait(s.summed.at[kind])
            lax.fori_loop(0, group_heads * (visit.done - visit.first), round_rows, None)

        @pl.when(group < GROUPS)
        def _compute():
            plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")
            keys = pl.ds(key + group * BLOCK, BLOCK)

            def attend(dk, dv, s1, s2, a, dx):
                def slot(step):
                    return common.ring_slot(step, stages)

                def row_stat(step, i):
                    return plgpu.load(s.stat.at[slot(step), i], layout=common.row_layout(1), optimized=False)

                def centre(accumulator, i, step):
                    """Sets the starting value, before any product starts: none runs on while registers are written."""
                    common.assign(accumulator, tiles.spread(row_stat(step, i), accumulator, -2), interpret)

                def start_scores(step, j):
                    plgpu.barrier_wait(s.ring["ready"].at[slot(step)])
                    k, q, r = s.k.at[group + common.hidden_zero(j)], s.q.at[slot(step)], s.r.at[slot(step)]
                    centre(s2, 1, step)
                    common.start_product(s1, k, q, interpret)
                    plgpu.wgmma(s2, k, r.transpose((1, 0)))

                def weights(step, j):
                    t1 = common.read(s1, pending=1)
                    p = tiles.backward_weights(t1, c, None, row_stat(step, 0), key_axis=0)

                    def hide(p):
                        visible = masks.visible(mask_refs, batch_index, j * BLOCK, keys.start, key_axis=0)
                        return jnp.where(visible, p, 0.0)

                    is_full = (j >= visit.full_first) & (j < visit.full_last)
                    return lax.cond(is_full, lambda p: p, hide, p)

                def add_rows(step, j, p, next_j=None):
                    q, r, do = (x.at[slot(step)] for x in (s.q, s.r, s.do))
                    s2_centred = common.read(s2)
                    w = -p * s2_centred
                    p, w = lax.optimization_barrier((p.astype(jnp.float16), w.astype(dtype)))
                    centre(a, 2, step)
                    plgpu.wgmma(a, s.v.at[group + common.hidden_zero(j)], do.transpose((1, 0)))
                    common.add_product(dv, w, do, interpret)
                    p, d = p.astype(jnp.float32), common.read(a, pending=1)
                    ds2 = -p * d
                    ds1 = ds2 * s2_centred + p * tiles.spread(row_stat(step, 3), p, -2)
                    ds1, ds2 = lax.optimization_barrier(((ds1 * scale).astype(dtype), ds2.astype(dtype)))
                    common.add_product(dk, ds1, q, interpret)
                    common.add_product(dk, ds2, r, interpret)
                    pl.when(step > 0)(lambda: plgpu.barrier_wait(s.written))
                    ds[0, group + common.hidden_zero(j)], ds[1, group + common.hidden_zero(j)] = ds1, ds2
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(s.ds_ready)
                    # One warpgroup sums dquery over all the program's keys, the other dprobe.
                    plgpu.barrier_wait(s.ds_ready)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(s.ring["free"].at[slot(step)])
                    common.assign(dx, common.zeros(head_dim), interpret)
                    for i in range(GROUPS):
                        plgpu.wgmma(
                            dx,
                            ds.at[group + common.hidden_zero(j), i].transpose((1, 0)),
                            s.k.at[i + common.hidden_zero(j)],
                        )
                    x = common.read(dx)
                    for i, half in enumerate(staged(group)):
                        half[...] = lax.slice(x, (0, i * 64), (BLOCK, (i + 1) * 64))
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(s.to_write.at[group])
                    if next_j is not None:
                        start_scores(step + 1, next_j)

                def body(step, carry):
                    j, p = carry
                    # row_tile's: a division would spill
                    next_j = jnp.where(lax.rem(step, group_heads) == 0, j + jnp.where(ascending, 1, -1), j)
                    add_rows(step - 1, j, p, next_j)
                    return next_j, weights(step, next_j)

                _, j = row_tile(0)
                start_scores(0, j)
                j, p = lax.fori_loop(1, num_steps(), body, (j, weights(0, j)))
                add_rows(num_steps() - 1, j, p)
                return common.read(dk, dv)

            for i in range(GROUPS):
                plgpu.barrier_wait(s.keys_ready.at[i])
            widths = head_dim, head_dim, BLOCK, BLOCK, BLOCK, head_dim
            dk, dv = pl.run_scoped(attend, *common.accumulators(*widths))
            plgpu.barrier_wait(s.written)  # the other warpgroup, too, has read the keys for the last time
            k, v = s.k.at[group], s.v.at[group]
            k[...], v[...] = dk.astype(dtype), dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, dk_ref.at[batch_index, keys, kv_head])
            plgpu.copy_smem_to_gmem(v, dv_ref.at[batch_index, keys, kv_head])
            for kind in range(2):
                pl.when(group == kind)(functools.partial(round_sums, kind))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def load():
            """Copies the keys and values, then each step's tiles of rows as slots of the ring become free."""

            def load_rows(step, _):
                slot = common.ring_slot(step, stages)
                head, row_block = row_tile(step)
                rows = pl.ds(row_block * BLOCK, BLOCK)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(s.ring["free"].at[slot]))
                ready = s.ring["ready"].at[slot]
                for src, dst in zip((q_ref, r_ref, do_ref), (s.q, s.r, s.do), strict=True):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, rows, head], dst.at[slot], ready)
                plgpu.copy_gmem_to_smem(stat_ref.at[batch_index, head, :, rows], s.stat.at[slot], ready)

            for i in range(GROUPS):
                keys = pl.ds(key + i * BLOCK, BLOCK)
                for src, dst in ((k_ref, s.k), (v_ref, s.v)):
                    plgpu.copy_gmem_to_smem(src.at[batch_index, keys, kv_head], dst.at[i], s.keys_ready.at[i])
            steps = num_steps()
            lax.fori_loop(0, steps, load_rows, None)
            common.drain(s.ring["free"], steps, stages)

        def write(kind):
            """Adds to dquery or dprobe in memory, always in the order of the key blocks: nothing is left to chance.

            Earlier key blocks start earlier or together with this one, and all of them go from the last rows to the
            first. So each finds that its predecessor has been there, and waits for long only if that one was delayed.
            It waits only for programs with smaller indices, which have started before it: there is no deadlock.
            """

            def write_rows(step, _):
                head, row_block = row_tile(step)
                turn = block - masks.first_visitor(visit_refs, batch_index, row_block)
                if not interpret:  # Pallas' interpreter runs one program after the other
                    semaphore = turns_taken.at[kind, batch_index, head, row_block]
                    plgpu.semaphore_wait(semaphore, turn, decrement=False, memory_scope="gpu")
                plgpu.barrier_wait(s.to_write.at[kind])
                for i, half in enumerate(staged(kind)):
                    columns = pl.ds(i * 64, 64)
                    destination = sum_refs[kind].at[batch_index, pl.ds(row_block * BLOCK, BLOCK), head, columns]
                    common.add_to(destination, half, turn == 0, interpret)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(s.written)
                plgpu.wait_smem_to_gmem(0)
                if not interpret:
                    plgpu.semaphore_signal(semaphore, 1, memory_scope="gpu")

            lax.fori_loop(0, num_steps(), write_rows, None)
            plgpu.barrier_arrive(s.summed.at[kind])

        @pl.when(group == GROUPS)
        def _copy():
            plgpu.set_max_registers(common.COPY_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _(warp):
                pl.when(warp == 0)(load)
                for kind in range(2):
                    pl.when(warp == 1 + kind)(functools.partial(write, kind))

    tile = functools.partial(common.swizzled, BLOCK, head_dim, dtype=dtype)
    staged_type = plgpu.SMEM(
        (2, BLOCK, 64), jnp.float32, transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    )
    ds_type = plgpu.SMEM(
        (2, GROUPS, BLOCK, BLOCK), dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    )
    sums = jax.ShapeDtypeStruct((batch, num_row_blocks * BLOCK, heads, head_dim), jnp.float32)
    _, _, *results = plgpu.kernel(
        kernel,
        out_type=(sums, sums, *(jax.ShapeDtypeStruct(x.shape, dtype) for x in (query, probe, key, value))),
        scratch_types=dict(
            q=tile(stages),
            r=tile(stages),
            do=tile(stages),
            k=tile(GROUPS),
            v=tile(GROUPS),
            stat=plgpu.SMEM((stages, 4, BLOCK), jnp.float32),
            staged=staged_type,
            ds_or_staged=plgpu.RefUnion(ds_type, staged_type) if halves > 1 else ds_type,
            keys_ready=plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            ring=common.ring(stages, copies=4),
            ds_ready=plgpu.Barrier(num_arrivals=GROUPS),
            to_write=plgpu.Barrier(num_barriers=2),
            written=plgpu.Barrier(num_arrivals=2),
            summed=plgpu.Barrier(num_barriers=2),
        ),
        **common.launch("parallax_backward", batch * kv_heads * num_key_blocks, interpret),
    )(query, probe, key, value, dout, stats, *visits, *masks.arrays)
    return tuple(results)
