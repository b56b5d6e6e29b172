"""Decode for Hopper in one kernel: the programs that share a head's keys are a cluster, which merges their states.

Each program reads every S-th tile of 64 keys. At its end it writes its states into the shared memory of the cluster's
programs, a row of queries to each, which meet at one barrier and write the rows' outputs. So there is no second kernel
and no trip through global memory; short caches are read in little more than a kernel's shortest time.

The matrix instructions take 64 rows. Rows 0 to 7 of every 16 are the queries of one kv head, rows 8 to 15 their probes,
so both products of a tile are one; the four warps hold the same rows four times.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import blocks, device, tiles
from pallas_kernels.block_sizes import MosaicGpuDecodeBlockSizes
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.common import BLOCK

ROWS = 8  # query rows of a kv head, at most
WIDTHS = 64, 128
TILE = plgpu.Layout.WGMMA
HALF = plgpu.Layout.TILED(  # of a tile's queries, or of its probes: 8 rows a warp
    fragmented_array.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
HALVES = 4  # axis of a tile's registers that tells rows 0 to 7 of 16 from rows 8 to 15


def unsupported(query, probe, key, value, mask, page_table, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query: needs bfloat16 or float16, got {query.dtype}"
    if page_table is not None:
        return "page_table: needs None"
    for name, x in (("key_cache", key), ("value_cache", value)):
        if x.shape[3] not in WIDTHS:
            return f"{name}: needs heads of {WIDTHS}, got {x.shape[3]}"
    if key.shape[3] != value.shape[3]:
        return "value_cache: needs the key's width"
    rows = query.shape[1] * query.shape[2] // key.shape[2]
    if rows > ROWS:
        return f"query: needs at most {ROWS} rows for a kv head, got {rows}"
    if key.shape[1] % BLOCK:
        return f"key_cache: needs a multiple of {BLOCK} keys, got {key.shape[1]}"
    if block_sizes is not None and not isinstance(block_sizes, MosaicGpuDecodeBlockSizes):
        return f"block_sizes: needs MosaicGpuDecodeBlockSizes, got {type(block_sizes).__name__}"
    platform, kind = device.target()
    if platform != "cpu" and not any(name in kind for name in device.HOPPER):
        return f"implementation: needs a Hopper GPU (clusters), got {kind}"
    return None


def _typed(columns: int, dtype, layout) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((BLOCK if layout is TILE else BLOCK // 2, columns), dtype, layout=layout)


def _array(registers, layout=TILE):
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)


def _i32(x: int):
    return mgpu.c(x, ir.IntegerType.get_signless(32))


def _thread():
    """(warp, row in a half, pair of columns) of this thread in a tile."""
    thread = mgpu.utils.thread_idx()
    lane = arith.remui(thread, _i32(32))
    return arith.remui(arith.divui(thread, _i32(32)), _i32(4)), arith.divui(lane, _i32(4)), arith.remui(lane, _i32(4))


def gather(query, probe, rows: int, interpret: bool):
    """The tile of queries and probes, from references (T, heads of the group, H); rows past `rows` repeat the last."""
    num_tokens, group, width = query.shape
    if interpret:
        row = jnp.minimum(jnp.arange(BLOCK // 2) % ROWS, rows - 1)
        return join(*(jnp.take(x[...].reshape(rows, width), row, axis=0) for x in (query, probe)), interpret)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2, return_type=_typed(width, query.dtype, TILE))
    def load(_, *refs):
        _, row, pair = _thread()
        row = arith.minui(row, _i32(rows - 1))
        registers = np.empty(TILE.to_mgpu().registers_shape((BLOCK, width)), dtype=object)
        kind = ir.MemRefType(refs[0].type)
        strides, _ = kind.get_strides_and_offset()
        offset = arith.addi(
            arith.addi(
                arith.muli(arith.divui(row, _i32(group)), _i32(strides[0])),
                arith.muli(arith.remui(row, _i32(group)), _i32(strides[1])),
            ),
            arith.muli(pair, _i32(2)),
        )
        pairs = ir.VectorType.get((2,), kind.element_type)
        for half, ref in enumerate(refs):
            base = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.memref_ptr(ref))
            for chunk in range(width // 8):
                at = mgpu.utils.getelementptr(base, [arith.addi(offset, _i32(8 * chunk))], kind.element_type)
                registers[0, chunk, 0, 0, half, 0, 0, 0, 0] = llvm.load(pairs, at, alignment=4)
        return _array(registers)

    return load(query, probe)


def split(x: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """The queries' rows of a tile, and the probes': (32, columns) each."""
    if interpret:
        halves = x.reshape(-1, 2, ROWS, x.shape[1])
        return tuple(halves[:, i].reshape(-1, x.shape[1]) for i in range(2))

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=(_typed(x.shape[1], x.dtype, HALF),) * 2)
    def halves(_, x):
        shape = HALF.to_mgpu().registers_shape((BLOCK // 2, x.shape[1]))
        return tuple(_array(x.registers.take(i, HALVES).reshape(shape), HALF) for i in range(2))

    return halves(x)


def join(x: jax.Array, y: jax.Array, interpret: bool) -> jax.Array:
    """The tile of which `split` gives x and y."""
    if interpret:
        return jnp.stack([z.reshape(-1, ROWS, x.shape[1]) for z in (x, y)], axis=1).reshape(BLOCK, x.shape[1])

    @plgpu.inline_mgpu(arg_types=(HALF, HALF), return_type=_typed(x.shape[1], x.dtype, TILE))
    def joined(_, x, y):
        registers = [z.registers.reshape(1, x.shape[1] // 8, 1, 1, 1, 1, 1, 1) for z in (x, y)]
        return _array(np.stack(registers, axis=HALVES))

    return joined(x, y)


def _hide(v, limit: jax.Array, interpret: bool) -> None:
    """Zeroes rows [limit, ...) of a tile of values, whatever lies there: 0 * NaN is NaN."""
    if interpret:
        v[...] = jnp.where(jnp.arange(v.shape[0])[:, None] < limit, v[...], jnp.zeros((), v.dtype))
        return
    num_rows, width = v.shape
    line_width = min(num_rows, 64)
    transforms = plgpu.TilingTransform((8, line_width)), plgpu.SwizzleTransform(2 * line_width)
    lanes, num_lines = line_width // 8, width // line_width  # of 16 bytes in a line, lines in a row

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.Layout.WG_SPLAT(())))
    def zero(_, ref, limit):
        # A row of a tile is so many lines of 64 or 128 bytes, within which the swizzle moves elements.
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(128))
        base = llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))
        limit = _scalar(limit)
        chunk, first = arith.remui(thread, _i32(lanes)), arith.divui(thread, _i32(lanes))
        for i in range(0, num_rows * num_lines, 128 // lanes):
            line = arith.addi(first, _i32(i))  # in the order (8 rows, column block, row)
            row = arith.addi(arith.muli(arith.divui(line, _i32(8 * num_lines)), _i32(8)), arith.remui(line, _i32(8)))
            address = arith.addi(base, arith.addi(arith.muli(line, _i32(16 * lanes)), arith.muli(chunk, _i32(16))))
            mgpu.utils.inline_ptx(
                "st.shared.v4.b32 [$0], {$1, $1, $1, $1};",
                address,
                _i32(0),
                predicate=arith.cmpi(arith.CmpIPredicate.sge, row, limit),
                has_side_effects=True,
            )
        return ()

    zero(v, limit)
    plgpu.commit_smem()


def _exchange(state: tiles.State, group, sums_ref, stats_ref, rows: int, num_splits: int) -> None:
    """Writes each row's state to the program of the cluster that merges it, and waits for all the others'."""
    num_parts, _, width = sums_ref.shape[1:]

    @plgpu.inline_mgpu(
        arg_types=(HALF, HALF, *(HALF.reduce(1),) * 3, plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(()))
    )
    def push(_, o1, o2, m, d1, t_mean, sums, stats, part):
        warp, row, pair = _thread()
        part = _scalar(part)
        target, slot = arith.remui(row, _i32(num_splits)), arith.divui(row, _i32(num_splits))
        place = arith.addi(arith.muli(slot, _i32(num_parts)), part)
        is_row = arith.cmpi(arith.CmpIPredicate.ult, row, _i32(rows))

        def remote(ref, offset):
            base = llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))
            return mgpu.utils.inline_ptx(
                "mapa.shared::cluster.u32 $0, $1, $2;",
                arith.addi(base, arith.muli(offset, _i32(4))),
                target,
                result_types=ir.IntegerType.get_signless(32),
            )

        at = remote(sums, arith.addi(arith.muli(place, _i32(2 * width)), arith.muli(pair, _i32(2))))
        for chunk in range(width // 8):
            is_warp = arith.cmpi(arith.CmpIPredicate.eq, warp, _i32(chunk % 4))
            predicate = arith.andi(is_row, is_warp)
            for i, x in enumerate((o1, o2)):
                mgpu.utils.inline_ptx(
                    f"st.shared::cluster.v2.f32 [$0+{4 * (i * width + 8 * chunk)}], {{$1, $2}};",
                    at,
                    *_parts(x.registers.flat[chunk]),
                    predicate=predicate,
                    has_side_effects=True,
                )
        first = arith.cmpi(arith.CmpIPredicate.eq, arith.addi(warp, pair), _i32(0))
        parts = [_parts(x.registers.flat[0])[0] for x in (m, d1, t_mean)]
        mgpu.utils.inline_ptx(
            "st.shared::cluster.v4.f32 [$0], {$1, $2, $3, $1};",
            remote(stats, arith.muli(place, _i32(4))),
            *parts,
            predicate=arith.andi(is_row, first),
            has_side_effects=True,
        )
        for what in ("arrive.release", "wait.acquire"):
            mgpu.utils.inline_ptx(f"barrier.cluster.{what}.aligned;", has_side_effects=True, convergent=True)
        return ()

    push(state.o1, state.o2, state.m, state.d1, state.t_mean, sums_ref, stats_ref, group)


def _scalar(x):
    """The value of a splat."""
    x = x.registers.item()
    return _parts(x)[0] if isinstance(x.type, ir.VectorType) else x


def _parts(register):
    """The elements of a vector register."""
    size = ir.VectorType(register.type).shape[0]
    return [vector.extract(register, dynamic_position=[], static_position=[i]) for i in range(size)]


def decode(query, probe, key, value, mask: blocks.Mask, page_table, *, scale, block_sizes):
    """Returns the output (B, T, N, Hv); `mask.lengths` is (B,), `mask.offset` (B,) or None for lengths - T."""
    config = block_sizes or MosaicGpuDecodeBlockSizes.heuristic(query, key, value, mask)
    interpret = device.target()[0] == "cpu"
    return _decode(query, probe, key, value, mask, scale=scale, config=config, interpret=interpret)


def _decode(query, probe, key, value, mask, *, scale, config, interpret):
    batch, num_queries, heads, width = query.shape
    num_keys, kv_heads, _ = key.shape[1:]
    heads_of_key = heads // kv_heads
    rows = num_queries * heads_of_key
    dtype = query.dtype
    c = scale * tiles.LOG2_E
    num_splits, groups, stages, block = config.num_splits, config.num_groups, config.num_stages, config.block_k
    num_parts = num_splits * groups
    one_tile = num_keys <= num_parts * block  # for each part
    slots = pl.cdiv(rows, num_splits)
    integers = [mask.lengths] if mask.offset is None else [mask.lengths, mask.offset]
    columns = plgpu.Layout.TILED(
        fragmented_array.Tiling(((width,), (width // 4,), (1,))),
        warp_dims=(-3,),
        lane_dims=(-2,) if width == 128 else (fragmented_array.Replicated(128 // width), -2),
        vector_dim=-1,
    )

    def kernel(q_ref, r_ref, k_ref, v_ref, *refs, **scratch):
        s = types.SimpleNamespace(**scratch)
        lengths_ref, *offset_ref = refs[: len(integers)]
        out_refs = refs[len(integers) :]
        program, group = lax.axis_index("program"), lax.axis_index("group")
        if interpret:
            program, own = lax.div(program, num_splits), lax.rem(program, num_splits)
        else:
            own = lax.axis_index("split") if num_splits > 1 else 0
        part = own * groups + group
        b, kv = lax.div(program, kv_heads), lax.rem(program, kv_heads)

        def copy(tile, slot, names="kv"):
            slot += group * stages
            for name in names:
                ref, to, ready = (k_ref, s.k, s.k_ready) if name == "k" else (v_ref, s.v, s.v_ready)
                plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(tile * block, block), kv], to.at[slot], ready.at[slot])

        def refill(i, name):
            """Tile i has been used: what is to lie in its slot next."""
            tile, slot = first + (i + stages) * num_parts, common.ring_slot(i, stages)
            pl.when(i + stages < count)(lambda: copy(tile, slot, name))

        if mask.window is None:  # the first tile's place does not wait for the length
            copy(part, 0)
        tokens = pl.ds(0, num_queries), pl.ds(kv * heads_of_key, heads_of_key)
        both = gather(q_ref.at[b, *tokens], r_ref.at[b, *tokens], rows, interpret)
        length = jnp.minimum(lengths_ref[b], num_keys)
        offset = offset_ref[0][b] if offset_ref else length - num_queries
        end = blocks.visible_end(offset, num_queries, length, True)
        first = part
        if mask.window is not None:
            first += jnp.minimum(
                lax.div(jnp.maximum(offset - mask.window + 1, 0), block), num_keys // block - num_parts
            )
            copy(first, 0)
        count = jnp.maximum(1, lax.div(pl.cdiv(end, block) - first + num_parts - 1, num_parts))
        for i in range(1, 1 if one_tile else stages):
            pl.when(i < count)(functools.partial(copy, first + i * num_parts, i))
        row = plgpu.broadcasted_iota(jnp.int32, (BLOCK // 2,), 0, layout=HALF.reduce(1))
        token = lax.div(jnp.minimum(lax.rem(row, ROWS), rows - 1), heads_of_key)
        position = token + offset
        last_seen = jnp.minimum(position, length - 1)

        def attend(o, s12):
            def start_scores(i):
                slot = common.ring_slot(i, stages) + group * stages
                plgpu.barrier_wait(s.k_ready.at[slot])
                common.assign(s12, common.zeros(block), interpret)
                common.add_product(s12, both, s.k.at[slot].transpose((1, 0)), interpret)

            def weights(i, m, pending):
                s1, t = split(common.read(s12, pending=pending), interpret)
                if not one_tile:
                    refill(i, "k")
                key = (first + i * num_parts) * block
                across = plgpu.broadcasted_iota(jnp.int32, s1.shape, 1, layout=HALF)
                visible = across <= tiles.spread(last_seen - key, s1)
                if mask.window is not None:
                    visible &= across > tiles.spread(position - mask.window - key, s1)
                m, a, p = tiles.softmax_weights(m, s1, c, visible)
                return m, a, p, jnp.where(visible, t, 0.0)

            def add_values(i, weights):
                slot = common.ring_slot(i, stages) + group * stages
                end_here = end - (first + i * num_parts) * block
                plgpu.barrier_wait(s.v_ready.at[slot])
                pl.when(end_here < block)(lambda: _hide(s.v.at[slot], end_here, interpret))
                common.add_product(o, weights, s.v.at[slot], interpret)

            def body(i, carry):
                m, d1, d2, p = carry
                start_scores(i)
                add_values(i - 1, p)
                m, a, p, t = weights(i, m, pending=1)
                p2 = p * (t - tiles.spread(centre, t))
                d1, d2 = a * d1 + jnp.sum(p, axis=-1), a * d2 + jnp.sum(p2, axis=-1)
                p = join(p, p2, interpret).astype(dtype)
                halves = split(common.read(o), interpret)
                refill(i - 1, "v")
                common.assign(o, join(*(x * tiles.spread(a, x) for x in halves), interpret), interpret)
                return m, d1, d2, p

            start_scores(0)
            m = plgpu.layout_cast(jnp.full((BLOCK // 2,), -jnp.inf, jnp.float32), HALF.reduce(1))
            m, _, p, t = weights(0, m, pending=0)
            d1, d2 = jnp.sum(p, axis=-1), jnp.sum(p * t, axis=-1)
            # The first tile's mean of t: near t_mean where one key, or a part of all keys, dominates t.
            centre = d2 / jnp.where(d1 == 0.0, 1.0, d1)
            p = join(p, p * (t - tiles.spread(centre, t)), interpret).astype(dtype)
            if one_tile:
                add_values(0, p)
                return tiles.State(m, d1, centre, *split(common.read(o), interpret))
            m, d1, d2, p = lax.fori_loop(1, count, body, (m, d1, jnp.zeros_like(d1), p))
            add_values(count - 1, p)
            return tiles.from_fixed_centre(m, d1, d2, *split(common.read(o), interpret), centre)

        state = pl.run_scoped(attend, *common.accumulators(width, block))
        if interpret:
            for ref, x in zip(out_refs, state, strict=True):
                ref[program, part] = x[:rows]
            return
        _exchange(state, part, s.sums, s.stats, rows, num_splits)
        for first_slot in range(0, slots, groups):
            slot = first_slot + group
            row = own + slot * num_splits

            @pl.when(row < rows)
            def _merge():
                parts = [
                    tiles.State(
                        *(s.stats[slot, i, j] for j in range(3)),
                        *(plgpu.load(s.sums.at[slot, i, j], layout=columns, optimized=False) for j in range(2)),
                    )
                    for i in range(num_parts)
                ]
                out = tiles.merged_list(parts)
                head = kv * heads_of_key + lax.rem(row, heads_of_key)
                out_refs[0][b, lax.div(row, heads_of_key), head] = out.astype(dtype)

    programs = batch * kv_heads
    stat = jax.ShapeDtypeStruct((programs, num_parts, rows), jnp.float32)
    sums = jax.ShapeDtypeStruct((*stat.shape, width), jnp.float32)
    out = jax.ShapeDtypeStruct(query.shape, dtype)
    columns_of_v = min(block, 64)  # of a swizzled part of V: wgmma takes as many keys at once
    k_tiles, v_tiles = (
        plgpu.SMEM(
            (stages * groups, block, width),
            dtype,
            transforms=(plgpu.TilingTransform((8, n)), plgpu.SwizzleTransform(2 * n)),
        )
        for n in (64, columns_of_v)
    )
    ready = plgpu.Barrier(num_barriers=stages * groups)
    scratch = dict(k=k_tiles, v=v_tiles, k_ready=ready, v_ready=ready)
    launch = dict(grid=(programs,))
    if interpret:
        launch = dict(grid=(programs * num_splits,), interpret=plgpu.InterpretGPUParams())
    else:
        launch |= dict(cluster=(num_splits,), cluster_names=("split",)) if num_splits > 1 else {}
        scratch |= dict(
            sums=plgpu.SMEM((slots, num_parts, 2, width), jnp.float32),
            stats=plgpu.SMEM((slots, num_parts, 4), jnp.float32),
        )
    results = plgpu.kernel(
        kernel,
        out_type=tiles.State(stat, stat, stat, sums, sums) if interpret else out,
        scratch_types=scratch,
        grid_names=("program",),
        num_threads=groups,
        thread_name="group",
        kernel_name="parallax_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **launch,
    )(query, probe, key, value, *integers)
    if not interpret:
        return results
    states = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), results)
    out = tiles.merged_output(states).reshape(batch, kv_heads, num_queries, heads_of_key, width)
    return jnp.moveaxis(out, 1, 2).reshape(query.shape).astype(dtype)
