"""What Hopper's decode does below Pallas, register by register: halves of a tile, and how programs exchange states.

A tile of matrix instructions has 64 rows, 16 to a warp. Here rows 0 to 7 of 16 are query rows of one kv head, rows 8 to
15 their probes, the same in all four warps. A thread holds rows i and i + 8 in registers of their own, so that taking a
tile apart moves nothing.

Every function has a plain version for Pallas' interpreter, but for those in which programs meet.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import tiles
from pallas_kernels.mosaic_gpu import common
from pallas_kernels.mosaic_gpu.common import BLOCK

ROWS = 8  # of queries, and of probes
TILE = plgpu.Layout.WGMMA
HALF = plgpu.Layout.TILED(  # the queries' rows of a tile, or the probes'
    fragmented_array.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
HALF_ROWS = HALF.reduce(1)  # one number for each of these rows
_HALVES = 4  # axis of a tile's registers that tells the halves apart


def _typed(columns: int, dtype, layout) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((BLOCK if layout is TILE else BLOCK // 2, columns), dtype, layout=layout)


def _array(registers: np.ndarray, layout) -> mgpu.FragmentedArray:
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)


def _i32(x: int) -> ir.Value:
    return mgpu.c(x, ir.IntegerType.get_signless(32))


def _elements(register: ir.Value) -> list[ir.Value]:
    """Elements of a register that holds several."""
    size = ir.VectorType(register.type).shape[0]
    return [vector.extract(register, dynamic_position=[], static_position=[i]) for i in range(size)]


def _scalar(splat: mgpu.FragmentedArray) -> ir.Value:
    register = splat.registers.item()
    return _elements(register)[0] if isinstance(register.type, ir.VectorType) else register


def _pointer(ref: ir.Value) -> ir.Value:
    """Address of a reference in its own address space: that of shared memory where the type says so, else global."""
    if mgpu.utils.is_smem_ref(ref):
        return mgpu.utils.memref_ptr(ref)
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.memref_ptr(ref))


def _shared_address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))


def _global_address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), _pointer(ref))


def _thread() -> tuple[ir.Value, ir.Value, ir.Value]:
    """(warp, row of a half, pair of columns) of this thread."""
    thread = mgpu.utils.thread_idx()
    lane = arith.remui(thread, _i32(32))
    return arith.remui(arith.divui(thread, _i32(32)), _i32(4)), arith.divui(lane, _i32(4)), arith.remui(lane, _i32(4))


def gather(query, probe, rows: int, interpret: bool) -> jax.Array:
    """The tile of queries and probes.

    Args:
      query: reference (T, heads, H) to the queries of one kv head, in global or shared memory.
      probe: likewise the probes.
      rows: T times the heads, at most `ROWS`; the rows after these repeat the last.
      interpret: whether Pallas' interpreter runs.
    """
    _, heads, width = query.shape
    if interpret:
        row = jnp.minimum(lax.rem(jnp.arange(BLOCK // 2), ROWS), rows - 1)
        return join(*(jnp.take(x[...].reshape(rows, width), row, axis=0) for x in (query, probe)), interpret)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2, return_type=_typed(width, query.dtype, TILE))
    def load(_, *refs):
        _, row, pair = _thread()
        row = arith.minui(row, _i32(rows - 1))
        kind = ir.MemRefType(refs[0].type)
        (of_token, of_head, _), _ = kind.get_strides_and_offset()
        offset = arith.muli(arith.divui(row, _i32(heads)), _i32(of_token))
        offset = arith.addi(offset, arith.muli(arith.remui(row, _i32(heads)), _i32(of_head)))
        offset = arith.addi(offset, arith.muli(pair, _i32(2)))
        registers = np.empty(TILE.to_mgpu().registers_shape((BLOCK, width)), dtype=object)
        for half, ref in enumerate(refs):
            base = _pointer(ref)
            for chunk in range(width // 8):
                at = mgpu.utils.getelementptr(base, [arith.addi(offset, _i32(8 * chunk))], kind.element_type)
                pair_of_columns = llvm.load(ir.VectorType.get((2,), kind.element_type), at, alignment=4)
                registers[(0, chunk, 0, 0, half, 0, 0, 0, 0)] = pair_of_columns
        return _array(registers, TILE)

    return load(query, probe)


def split(x: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """The queries' rows of a tile, and the probes': (32, columns) each."""
    if interpret:
        halves = x.reshape(-1, 2, ROWS, x.shape[1])
        return tuple(halves[:, i].reshape(-1, x.shape[1]) for i in range(2))

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=(_typed(x.shape[1], x.dtype, HALF),) * 2)
    def halves(_, x):
        shape = HALF.to_mgpu().registers_shape((BLOCK // 2, x.shape[1]))
        return tuple(_array(x.registers.take(i, _HALVES).reshape(shape), HALF) for i in range(2))

    return halves(x)


def join(x: jax.Array, y: jax.Array, interpret: bool) -> jax.Array:
    """The tile of which `split` gives x and y."""
    if interpret:
        return jnp.stack([z.reshape(-1, ROWS, x.shape[1]) for z in (x, y)], axis=1).reshape(BLOCK, x.shape[1])

    @plgpu.inline_mgpu(arg_types=(HALF, HALF), return_type=_typed(x.shape[1], x.dtype, TILE))
    def joined(_, x, y):
        shape = TILE.to_mgpu().registers_shape((BLOCK, x.shape[1]))
        halves = [z.registers.reshape(shape[:_HALVES] + shape[_HALVES + 1 :]) for z in (x, y)]
        return _array(np.stack(halves, axis=_HALVES), TILE)

    return joined(x, y)


def line_width(rows: int) -> int:
    """Columns of a tile of values that lie in a row in shared memory; matrix instructions take as many of its rows."""
    return min(rows, 64)


def hide(values, limit: jax.Array, interpret: bool) -> None:
    """Zeroes rows from `limit` on of a tile of values, whatever lies there: 0 * NaN would reach the product."""
    num_rows, width = values.shape
    if interpret:
        row = lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values[...] = jnp.where(row < limit, values[...], jnp.zeros((), values.dtype))
        return
    columns = line_width(num_rows)
    threads, lines = columns // 8, width // columns  # of 16 bytes for a line, of a row

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(common.swizzle(columns)), plgpu.Layout.WG_SPLAT(())))
    def zero(_, ref, limit):
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(128))
        of_line, first = arith.remui(thread, _i32(threads)), arith.divui(thread, _i32(threads))
        base = arith.addi(_shared_address(ref), arith.muli(of_line, _i32(16)))
        for i in range(0, num_rows * lines, 128 // threads):
            line = arith.addi(first, _i32(i))  # they lie 8 rows of a column of lines after one another; swizzles stay
            row = arith.addi(arith.muli(arith.divui(line, _i32(8 * lines)), _i32(8)), arith.remui(line, _i32(8)))
            mgpu.utils.inline_ptx(
                "st.shared.v4.b32 [$0], {$1, $1, $1, $1};",
                arith.addi(base, arith.muli(line, _i32(2 * columns))),
                _i32(0),
                predicate=arith.cmpi(arith.CmpIPredicate.sge, row, _scalar(limit)),
                has_side_effects=True,
            )
        return ()

    zero(values, limit)
    plgpu.commit_smem()


def _store_rows(stats, sums, to_stats: ir.Value, to_sums: ir.Value, exists: ir.Value, store) -> None:
    """Stores a thread's part of its row's state.

    Args:
      stats: m, d1 and t_mean; without a probe the first two.
      sums: o1 and o2, or o1.
      to_stats: where the row's four numbers go.
      to_sums: where its sums go, (1 or 2, columns), from the thread's pair of columns on.
      exists: whether there is such a row.
      store: (address, bytes from there, values) stores two or four floats.
    """
    warp, _, pair = _thread()
    is_equal = functools.partial(arith.cmpi, arith.CmpIPredicate.eq)
    width = sums[0].shape[1]
    for quarter in range(4):  # all warps hold the same: each stores a part
        with mgpu.utils.when(arith.andi(exists, is_equal(warp, _i32(quarter)))):
            for i, x in enumerate(sums):
                for chunk in range(quarter * width // 32, (quarter + 1) * width // 32):
                    store(to_sums, 4 * (i * width + 8 * chunk), _elements(x.registers.flat[chunk]))
    numbers = [_elements(x.registers.item())[0] for x in stats]
    numbers += numbers[:1] * (4 - len(numbers))
    with mgpu.utils.when(arith.andi(exists, is_equal(arith.addi(warp, pair), _i32(0)))):
        store(to_stats, 0, numbers)


def expect(inbox_ref, num_bytes: jax.Array) -> None:
    """Readies a cluster's program for what the others send it by `exchange`; all its warpgroups call this.

    Args:
      inbox_ref: (2,) int32 in shared memory, a barrier.
      num_bytes: that will come.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def ready(_, inbox, num_bytes):
        is_first = arith.cmpi(arith.CmpIPredicate.eq, mgpu.utils.thread_idx(), _i32(0))
        ptx = functools.partial(mgpu.utils.inline_ptx, has_side_effects=True)
        ptx("mbarrier.init.shared::cta.b64 [$0], 1;", _shared_address(inbox), predicate=is_first)
        ptx("fence.mbarrier_init.release.cluster;", predicate=is_first)
        to_come = _shared_address(inbox), _scalar(num_bytes)
        ptx("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", *to_come, predicate=is_first)
        ptx("barrier.cluster.arrive.relaxed.aligned;", convergent=True)
        return ()

    ready(inbox_ref, num_bytes)


def exchange(
    state: tiles.State, part: jax.Array, inbox_ref, stats_ref, sums_ref, *, rows: int, num_splits: int, again: bool
) -> None:
    """Sends every row's state to the program of the cluster that merges it, and waits for what comes from the others.

    Row i goes to program i % num_splits, into slot i // num_splits. Every store to another program tells the receiver's
    barrier, so that no fence holds up the sender.

    Args:
      state: of this warpgroup, (32,) and (32, columns), the same in all warps.
      part: number of this warpgroup among those that share the keys.
      inbox_ref: as in `expect`, which must have been called; None where a program is alone.
      stats_ref: (slots, parts, 4) float32 in shared memory: m, d1 and t_mean.
      sums_ref: (slots, parts, 1 or 2, columns) float32: o1 and o2.
      rows: rows that there are.
      num_splits: programs of the cluster.
      again: what came before may still be read.
    """
    stats = [x for x in (state.m, state.d1, state.t_mean) if x is not None]
    sums = [x for x in (state.o1, state.o2) if x is not None]
    _, num_parts, _, width = sums_ref.shape
    inboxes = [] if inbox_ref is None else [inbox_ref]

    @plgpu.inline_mgpu(
        arg_types=(
            [HALF_ROWS] * len(stats),
            [HALF] * len(sums),
            plgpu.Layout.WG_SPLAT(()),
            [plgpu.RefType()] * len(inboxes),
            plgpu.RefType(),
            plgpu.RefType(),
        )
    )
    def send(_, stats, sums, part, inboxes, stats_ref, sums_ref):
        _, row, pair = _thread()
        target, slot = arith.remui(row, _i32(num_splits)), arith.divui(row, _i32(num_splits))
        place = arith.addi(arith.muli(slot, _i32(num_parts)), _scalar(part))
        exists = arith.cmpi(arith.CmpIPredicate.ult, row, _i32(rows))
        ptx = functools.partial(mgpu.utils.inline_ptx, has_side_effects=True)
        if inboxes:  # all are ready
            ptx("barrier.cluster.wait.acquire.aligned;", convergent=True)
        elif again:
            ptx("bar.sync 0;", convergent=True)

        def at_target(ref, offset: ir.Value) -> ir.Value:
            """Address of a byte of `ref` in the target's shared memory."""
            local = arith.addi(_shared_address(ref), offset)
            if not inboxes:
                return local
            return mgpu.utils.inline_ptx("mapa.shared::cluster.u32 $0, $1, $2;", local, target, result_types=local.type)

        inboxes_there = [at_target(x, _i32(0)) for x in inboxes]
        kind, last = (
            ("async.shared::cluster.mbarrier::complete_tx::bytes", ", [$@]") if inboxes else ("shared::cta", "")
        )

        def store(to, offset: int, values):
            size = len(values)
            names, inbox = ", ".join(f"${i + 1}" for i in range(size)), last.replace("@", str(size + 1))
            ptx(f"st.{kind}.v{size}.f32 [$0+{offset}], {{{names}}}{inbox};", to, *values, *inboxes_there)

        of_pair = arith.addi(arith.muli(place, _i32(4 * len(sums) * width)), arith.muli(pair, _i32(8)))
        to_sums, to_stats = at_target(sums_ref, of_pair), at_target(stats_ref, arith.muli(place, _i32(16)))
        _store_rows(stats, sums, to_stats, to_sums, exists, store)
        wait = "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$0], 0;"
        if inboxes:
            ptx(f"{{ .reg .pred done; again: {wait} @!done bra again; }}", _shared_address(inboxes[0]))
        else:
            ptx("bar.sync 0;", convergent=True)
        return ()

    send(stats, sums, part, inboxes, stats_ref, sums_ref)


def store_state(state: tiles.State, stats_ref, sums_ref, rows: int, interpret: bool) -> None:
    """Writes every row's state to global memory.

    Args:
      state: (32,) and (32, columns), the same in all warps.
      stats_ref: (rows, 4) float32: m, d1 and t_mean.
      sums_ref: (rows, 1 or 2, columns) float32: o1 and o2.
      rows: rows that there are.
      interpret: whether Pallas' interpreter runs.
    """
    stats = [x for x in (state.m, state.d1, state.t_mean) if x is not None]
    sums = [x for x in (state.o1, state.o2) if x is not None]
    if interpret:
        for i, x in enumerate(stats):
            stats_ref[:, i] = x[:rows]
        for i, x in enumerate(sums):
            sums_ref[:, i] = x[:rows]
        return
    layouts = [HALF_ROWS] * len(stats), [HALF] * len(sums)

    @plgpu.inline_mgpu(arg_types=(*layouts, plgpu.RefType(), plgpu.RefType()))
    def write(_, stats, sums, stats_ref, sums_ref):
        _, row, pair = _thread()
        at = lambda ref, offset: arith.addi(_global_address(ref), arith.extui(ir.IntegerType.get_signless(64), offset))

        def store(to, offset: int, values):
            names = ", ".join(f"${i + 1}" for i in range(len(values)))
            ptx = f"st.global.v{len(values)}.f32 [$0+{offset}], {{{names}}};"
            mgpu.utils.inline_ptx(ptx, to, *values, has_side_effects=True)

        exists = arith.cmpi(arith.CmpIPredicate.ult, row, _i32(rows))
        of_pair = arith.addi(arith.muli(row, _i32(4 * len(sums) * sums[0].shape[1])), arith.muli(pair, _i32(8)))
        to_stats, to_sums = at(stats_ref, arith.muli(row, _i32(16))), at(sums_ref, of_pair)
        _store_rows(stats, sums, to_stats, to_sums, exists, store)
        return ()

    write(stats, sums, stats_ref, sums_ref)


def write_row(ref, x: jax.Array, layout, interpret: bool, *, row=0, first=0) -> None:
    """Writes a part of x to a row of a tile for matrix instructions; `plgpu.commit_smem` has to follow.

    Args:
      ref: (rows, columns) in shared memory, in lines of 64 columns.
      x: (n,), of which [first, first + columns) is written as far as it lies in x.
      layout: of x, plgpu.Layout.WG_STRIDED or TILED.
      interpret: whether Pallas' interpreter runs.
      row: of the tile.
      first: may be negative.
    """
    columns = ref.shape[1]
    if interpret:
        index = first + jnp.arange(columns)
        inside = (index >= 0) & (index < x.size)
        ref[row] = jnp.where(inside, jnp.take(x, jnp.clip(index, 0, x.size - 1)), ref[row])
        return
    traced = {name: x for name, x in (("row", row), ("first", first)) if not isinstance(x, int)}
    splats = dict.fromkeys(traced, plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(common.swizzle(64)), layout, splats))
    def write(_, ref, x, traced):
        i32 = ir.IntegerType.get_signless(32)
        row_, first_ = (
            _scalar(traced[name]) if name in traced else _i32(x) for name, x in (("row", row), ("first", first))
        )
        of_eight = arith.remui(row_, _i32(8))  # rows, which lie 128 bytes after one another
        base = arith.addi(_shared_address(ref), arith.muli(of_eight, _i32(128)))
        eight = arith.muli(arith.divui(row_, _i32(8)), _i32(columns // 64 * 1024))
        base, swizzle = arith.addi(base, eight), arith.muli(of_eight, _i32(16))
        for (index,), register in zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True):
            column = arith.subi(arith.index_cast(i32, index), first_)
            line, of_line = arith.divui(column, _i32(64)), arith.remui(column, _i32(64))
            of_line = arith.xori(arith.muli(of_line, _i32(2)), swizzle)
            at = arith.addi(arith.muli(line, _i32(8 * 128)), of_line)
            size = ir.VectorType(register.type).shape[0]
            word = ir.IntegerType.get_signless(16 * size)
            bits = llvm.bitcast(word, register)
            mgpu.utils.inline_ptx(
                f"st.shared.b{16 * size} [$0], $1;",
                arith.addi(base, at),
                bits,
                predicate=arith.cmpi(arith.CmpIPredicate.ult, column, _i32(columns)),
                has_side_effects=True,
            )
        return ()

    write(ref, x, traced)


def put(ref, x: jax.Array, layout, interpret: bool) -> None:
    """Stores x, (n,), to a row in shared or global memory, without a barrier.

    One has to come before anything loads it, even where the same thread does: else the compiler keeps an older value.
    """
    if interpret:
        ref[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(_, ref, x):
        base = _pointer(ref)
        for (index,), register in zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True):
            index = arith.index_cast(ir.IntegerType.get_signless(32), index)
            at = mgpu.utils.getelementptr(base, [index], ir.MemRefType(ref.type).element_type)
            llvm.store(register, at)
        return ()

    store(ref, x)


def store_column(ref, x: jax.Array, interpret: bool) -> None:
    """Writes column 0 of x, (64, 8) float32 as matrix instructions leave it, to `ref`, (64,) in global memory."""
    if interpret:
        ref[...] = x[:, 0]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def store(_, ref, x):
        warp, row, pair = _thread()
        i64 = ir.IntegerType.get_signless(64)
        first = arith.addi(arith.muli(warp, _i32(16)), row)
        at = arith.addi(_global_address(ref), arith.extui(i64, arith.muli(first, _i32(4))))
        for half in range(2):
            mgpu.utils.inline_ptx(
                f"st.global.f32 [$0+{32 * half}], $1;",
                at,
                _elements(x.registers[(0, 0, 0, 0, half, 0, 0, 0, 0)])[0],
                predicate=arith.cmpi(arith.CmpIPredicate.eq, pair, _i32(0)),
                has_side_effects=True,
            )
        return ()

    store(ref, x)


def meet(counter_ref, count: jax.Array) -> None:
    """Waits until a counter has grown to `count`; whoever adds to it here sees what the others wrote before they did.

    All programs must run at once. Called by one warpgroup of each.

    Args:
      counter_ref: int32 scalar in global memory, which grows by 1 for each call.
      count: after the calls of all.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def wait(_, counter, count):
        mgpu.utils.warpgroup_barrier()
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(128))
        is_zero = lambda x: arith.cmpi(arith.CmpIPredicate.eq, x, _i32(0))
        at = _global_address(counter)
        ptx = functools.partial(mgpu.utils.inline_ptx, has_side_effects=True)
        ptx("red.release.gpu.global.add.u32 [$0], 1;", at, predicate=is_zero(thread))
        again = """{
            .reg .pred more;
            .reg .b32 now;
            again:
            ld.acquire.gpu.global.u32 now, [$0];
            sub.s32 now, now, $1;
            setp.lt.s32 more, now, 0;
            @more bra again;
        }"""
        with mgpu.utils.when(is_zero(arith.remui(thread, _i32(32)))):  # every warp asks for itself: so they ask often
            ptx(again, at, _scalar(count))
        mgpu.utils.warp_barrier()
        return ()

    wait(counter_ref, count)


def hidden(x: jax.Array) -> jax.Array:
    """An int32 scalar, of which the compiler does not see that it is the same each time: nothing moves out of loops."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT(()),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    def same(_, x):
        i32 = ir.IntegerType.get_signless(32)
        out = mgpu.utils.inline_ptx("mov.b32 $0, $1;", _scalar(x), result_types=i32, has_side_effects=True)
        return mgpu.FragmentedArray.splat(out, (), is_signed=True)

    return same(x)
