"""What Hopper's decode does below Pallas, register by register: products, and how warps and programs exchange states.

The four warps of a warpgroup share out the keys of a tile, a quarter each. A warp's matrix instructions have 16 rows:
the first 8 are query rows of one kv head, the others their probes. A thread holds rows i and i + 8 in registers of
their own, so that both products of a tile are one and taking them apart moves nothing. To Pallas, arrays of 32 rows are
8 rows of each warp.

Every function has a plain version for Pallas' interpreter, but for those in which programs meet.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pallas_kernels import tiles
from pallas_kernels.mosaic_gpu import common

ROWS = 8  # of queries, and of probes
TILE = plgpu.Layout.WGMMA
HALF = plgpu.Layout.TILED(  # the queries' rows, or the probes'
    fragmented_array.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
HALF_ROWS = HALF.reduce(1)  # one number for each of these rows
WARPS = 4  # which share the keys of a tile
STATS_SCRATCH = WARPS, ROWS, 4  # shape of the shared memory through which warps exchange statistics


def _half(columns: int, dtype) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((WARPS * ROWS, columns), dtype, layout=HALF)


def _array(registers: Sequence[ir.Value], columns: int | None = None) -> mgpu.FragmentedArray:
    """Of layout `HALF`, from a register for each 8 columns, or of `HALF_ROWS`, from one."""
    shape, layout = ((WARPS * ROWS,), HALF_ROWS) if columns is None else ((WARPS * ROWS, columns), HALF)
    array = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
    array.flat[:] = registers
    return mgpu.FragmentedArray(_registers=array, _layout=layout.to_mgpu(), _is_signed=None)


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


def gather(given: Sequence, rows: int, interpret: bool) -> list[jax.Array]:
    """The rows of queries and of probes, (32, H) each, the same in all warps.

    Args:
      given: references (T, heads, H) to the queries of one kv head, in global or shared memory, and to its probes.
      rows: T times the heads, at most `ROWS`; the rows after these repeat the last.
      interpret: whether Pallas' interpreter runs.
    """
    _, heads, width = given[0].shape
    dtype = given[0].dtype
    if interpret:
        row = jnp.minimum(lax.rem(jnp.arange(WARPS * ROWS), ROWS), rows - 1)
        return [jnp.take(x[...].reshape(rows, width), row, axis=0) for x in given]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(given), return_type=[_half(width, dtype)] * len(given))
    def load(_, *refs):
        _, row, pair = _thread()
        row = arith.minui(row, _i32(rows - 1))
        kind = ir.MemRefType(refs[0].type)
        (of_token, of_head, _), _ = kind.get_strides_and_offset()
        offset = arith.muli(arith.divui(row, _i32(heads)), _i32(of_token))
        offset = arith.addi(offset, arith.muli(arith.remui(row, _i32(heads)), _i32(of_head)))
        offset = arith.addi(offset, arith.muli(pair, _i32(2)))

        def pairs(ref):
            for chunk in range(width // 8):
                at = mgpu.utils.getelementptr(_pointer(ref), [arith.addi(offset, _i32(8 * chunk))], kind.element_type)
                yield llvm.load(ir.VectorType.get((2,), kind.element_type), at, alignment=4)

        return [_array(list(pairs(ref)), width) for ref in refs]

    return load(*given)


def first_of_quarter(num_keys: int) -> jax.Array:
    """First key of the quarter of a tile that the warp of a row has, (32,)."""
    row = plgpu.broadcasted_iota(jnp.int32, (WARPS * ROWS,), 0, layout=HALF_ROWS)
    return lax.div(row, ROWS) * (num_keys // WARPS)


def _fragments(ref: ir.Value, rows: int, columns: int, layout: nvvm.MMALayout) -> list[list[ir.Value]]:
    """A warp's quarter of a tile in shared memory as matrix instructions take it: [8 rows][8 columns].

    Args:
      ref: the tile, in lines of 64 columns.
      rows: of the tile.
      columns: likewise.
      layout: row, or col for 8 x 8 numbers transposed.
    """
    warp, _, _ = _thread()
    lane = arith.remui(mgpu.utils.thread_idx(), _i32(32))
    line, matrix = arith.remui(lane, _i32(8)), arith.divui(lane, _i32(8))  # of which this thread says where it lies
    of_eight = columns // 64 * 1024  # bytes
    base = arith.addi(_shared_address(ref), arith.muli(warp, _i32(rows // WARPS // 8 * of_eight)))
    base = arith.addi(base, arith.muli(line, _i32(128)))
    firsts = [arith.addi(base, arith.muli(arith.xori(arith.addi(matrix, _i32(i)), line), _i32(16))) for i in (0, 4)]
    shared, i8 = llvm.PointerType.get(address_space=3), ir.IntegerType.get_signless(8)
    firsts = [llvm.inttoptr(shared, x) for x in firsts]

    def load(eight: int, four: int):
        offset = eight * of_eight + four // 2 * 1024
        at = llvm.getelementptr(shared, firsts[four % 2], [], [offset], i8, llvm.GEPNoWrapFlags.none)
        shape, kind = ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"), nvvm.LdStMatrixEltType.B16
        loaded = nvvm.ldmatrix(at, layout=layout, num=4, shape=shape, elt_type=kind)
        return [llvm.extractvalue(ir.IntegerType.get_signless(32), loaded, [i]) for i in range(4)]

    return [[x for four in range(columns // 32) for x in load(eight, four)] for eight in range(rows // WARPS // 8)]


def _multiply(sums: Sequence[ir.Value], a: Sequence[ir.Value], b: Sequence[ir.Value], dtype) -> list[ir.Value]:
    """sums + a @ b of a warp: 16 rows, 8 columns, 8 or 16 numbers deep."""
    f32 = ir.F32Type.get()
    name, names = {jnp.bfloat16: "bf16", jnp.float16: "f16"}[jnp.dtype(dtype).type], itertools.count()
    operands = ", ".join("{" + ", ".join(f"${next(names)}" for _ in range(n)) + "}" for n in (4, len(a), len(b), 4))
    out = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*a, *b, *sums],
        f"mma.sync.aligned.m16n8k{8 * len(b)}.row.col.f32.{name}.{name}.f32 {operands};",
        ",".join(["=f"] * 4 + ["r"] * (len(a) + len(b)) + ["f"] * 4),
        has_side_effects=False,
    )
    return [llvm.extractvalue(f32, out, [i]) for i in range(4)]


def _rows_of_a(halves: Sequence[mgpu.FragmentedArray]) -> list[list[ir.Value]]:
    """Registers of the left side of a product: [8 columns][half]; without a second half there are zeros."""
    i32 = ir.IntegerType.get_signless(32)
    bits = [[mgpu.utils.bitcast(x, i32) for x in half.registers.flat] for half in halves]
    return list(zip(*bits, *[[_i32(0)] * len(bits[0])] * (2 - len(bits)), strict=True))


def _pair(x: ir.Value, y: ir.Value) -> ir.Value:
    return vector.from_elements(ir.VectorType.get((2,), x.type), [x, y])


def scores(rows: Sequence[jax.Array], keys, interpret: bool) -> list[jax.Array]:
    """Products of rows with a tile of keys, in float32: of each warp's rows with its quarter of the keys.

    Args:
      rows: (32, H) queries, and probes where there are some.
      keys: reference (keys, H) to shared memory, in lines of 64 columns.
      interpret: whether Pallas' interpreter runs.

    Returns:
      (32, keys / 4) for each of the rows.
    """
    num_keys, width = keys.shape
    if interpret:
        quarters = keys[...].reshape(WARPS, num_keys // WARPS, width)
        product = functools.partial(jnp.einsum, "wrh,wkh->wrk", preferred_element_type=jnp.float32)
        return [product(x.reshape(WARPS, ROWS, width), quarters).reshape(WARPS * ROWS, -1) for x in rows]
    dtype, columns = keys.dtype, num_keys // WARPS

    @plgpu.inline_mgpu(
        arg_types=([HALF] * len(rows), plgpu.RefType(common.SWIZZLE)),
        return_type=[_half(columns, jnp.float32)] * len(rows),
    )
    def product(_, rows, keys):
        a, zero = _rows_of_a(rows), mgpu.c(0.0, ir.F32Type.get())
        tile = _fragments(keys, num_keys, width, nvvm.MMALayout.row)
        chains = max(1, 4 // len(tile))  # products that do not wait for one another
        halves = [[], []]
        for b in tile:
            sums = [[zero] * 4 for _ in range(chains)]
            for i in range(0, width // 8, 2):
                chain = i // 2 % chains
                sums[chain] = _multiply(sums[chain], [*a[i], *a[i + 1]], b[i : i + 2], dtype)
            total = functools.reduce(lambda x, y: list(map(arith.addf, x, y)), sums)
            for half, x in zip(halves, (total[:2], total[2:]), strict=True):
                half.append(_pair(*x))
        return [_array(half, columns) for half, _ in zip(halves, rows, strict=False)]

    return product(list(rows), keys)


def add_values(sums: Sequence[jax.Array], weights: Sequence[jax.Array], values, interpret: bool) -> list[jax.Array]:
    """sums + weights @ values: of each warp's rows, the products with its quarter of the keys.

    Args:
      sums: (32, H) float32, one or two.
      weights: (32, keys / 4) of the values' dtype for each.
      values: reference (keys, H) to shared memory, in lines of 64 columns.
      interpret: whether Pallas' interpreter runs.
    """
    num_keys, width = values.shape
    if interpret:
        quarters = values[...].reshape(WARPS, num_keys // WARPS, width)
        product = functools.partial(jnp.einsum, "wrk,wkh->wrh", preferred_element_type=jnp.float32)
        weights = [x.reshape(WARPS, ROWS, num_keys // WARPS) for x in weights]
        return [o + product(x, quarters).reshape(o.shape) for o, x in zip(sums, weights, strict=True)]
    dtype = values.dtype

    @plgpu.inline_mgpu(
        arg_types=([HALF] * len(sums), [HALF] * len(sums), plgpu.RefType(common.SWIZZLE)),
        return_type=[_half(width, jnp.float32)] * len(sums),
    )
    def product(_, sums, weights, values):
        a, tile = _rows_of_a(weights), _fragments(values, num_keys, width, nvvm.MMALayout.col)
        zeros = [mgpu.c(0.0, ir.F32Type.get())] * (4 - 2 * len(sums))
        halves = [[], []]
        for i in range(width // 8):
            total = [x for o in sums for x in _elements(o.registers.flat[i])] + zeros
            for j in range(0, len(tile), 2):
                several = range(j, min(j + 2, len(tile)))
                total = _multiply(total, [x for k in several for x in a[k]], [tile[k][i] for k in several], dtype)
            for half, x in zip(halves, (total[:2], total[2:]), strict=True):
                half.append(_pair(*x))
        return [_array(half, width) for half, _ in zip(halves, sums, strict=False)]

    return product(list(sums), list(weights), values)


def hide(values, limit: jax.Array, interpret: bool) -> None:
    """Zeroes rows from `limit` on of a tile of values, whatever lies there: 0 * NaN would reach the product."""
    num_rows, width = values.shape
    if interpret:
        row = lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values[...] = jnp.where(row < limit, values[...], jnp.zeros((), values.dtype))
        return
    threads, lines = common.LINE // 8, width // common.LINE  # of 16 bytes for a line, of a row

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(common.SWIZZLE), plgpu.Layout.WG_SPLAT(())))
    def zero(_, ref, limit):
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(128))
        of_line, first = arith.remui(thread, _i32(threads)), arith.divui(thread, _i32(threads))
        base = arith.addi(_shared_address(ref), arith.muli(of_line, _i32(16)))
        for i in range(0, num_rows * lines, 128 // threads):
            line = arith.addi(first, _i32(i))  # they lie 8 rows of a column of lines after one another; swizzles stay
            row = arith.addi(arith.muli(arith.divui(line, _i32(8 * lines)), _i32(8)), arith.remui(line, _i32(8)))
            mgpu.utils.inline_ptx(
                "st.shared.v4.b32 [$0], {$1, $1, $1, $1};",
                arith.addi(base, arith.muli(line, _i32(2 * common.LINE))),
                _i32(0),
                predicate=arith.cmpi(arith.CmpIPredicate.sge, row, _scalar(limit)),
                has_side_effects=True,
            )
        return ()

    zero(values, limit)
    plgpu.commit_smem()


def of_all_warps(stats: Sequence[jax.Array], ref, interpret: bool) -> list[list[jax.Array]]:
    """Statistics of rows by all warps' keys: for each warp, what its rows have, in all warps.

    Args:
      stats: (32,) each, up to four.
      ref: float32 in shared memory, `STATS_SCRATCH`, of which nobody reads what came before.
      interpret: whether Pallas' interpreter runs.
    """
    if interpret:
        return [[jnp.tile(x.reshape(WARPS, ROWS)[warp], WARPS) for x in stats] for warp in range(WARPS)]
    row = plgpu.ShapeDtypeStruct((WARPS * ROWS,), jnp.float32, layout=HALF_ROWS)

    @plgpu.inline_mgpu(arg_types=([HALF_ROWS] * len(stats), plgpu.RefType()), return_type=[row] * (len(stats) * WARPS))
    def exchanged(_, stats, ref):
        warp, row, pair = _thread()
        f32 = ir.F32Type.get()
        four = ir.VectorType.get((4,), f32)
        at = lambda warp: mgpu.utils.getelementptr(
            _pointer(ref), [arith.addi(arith.muli(warp, _i32(4 * ROWS)), arith.muli(row, _i32(4)))], f32
        )
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, pair, _i32(0))):
            llvm.store(vector.from_elements(four, _four(stats)), at(warp), alignment=16)
        mgpu.utils.warpgroup_barrier()
        array = lambda x: _array([vector.from_elements(ir.VectorType.get((1,), f32), [x])])
        loaded = [_elements(llvm.load(four, at(_i32(warp)), alignment=16)) for warp in range(WARPS)]
        return [array(x) for numbers in loaded for x in numbers[: len(stats)]]

    flat = exchanged(list(stats), ref)
    return [flat[i : i + len(stats)] for i in range(0, len(flat), len(stats))]


def _four(stats: Sequence[mgpu.FragmentedArray]) -> list[ir.Value]:
    """A row's statistics as four numbers."""
    numbers = [_elements(x.registers.item())[0] for x in stats]
    return numbers + numbers[:1] * (4 - len(numbers))


def sums_scratch(rows: int, num_sums: int, width: int, most: int = 17 << 10) -> tuple[int, int, int]:
    """Shape of the shared memory, `most` bytes of it, through which a warpgroup's warps add up sums of rows.

    (warps, rows at once, numbers), of float32.
    """
    numbers = num_sums * width + 8  # so that rows lie in different banks
    return WARPS, max(1, min(rows, most // (4 * WARPS * numbers))), numbers


def _store_rows(stats, sums, ref: ir.Value, rows: int, store_stats: Callable, store_sums: Callable) -> None:
    """Stores the rows' statistics, and their sums over values, added up over a warpgroup's warps.

    Args:
      stats: (32,) each, the same in all warps.
      sums: (32, columns) each, of which each warp has a share.
      ref: in shared memory, of the shape that `sums_scratch` gives.
      rows: that are there of 8.
      store_stats: (row, number, values, exists) stores a row's four numbers, from number 0 on.
      store_sums: likewise two of its sums, of which there are (len(sums), columns).
    """
    warp, row, pair = _thread()
    is_first = arith.cmpi(arith.CmpIPredicate.eq, arith.addi(warp, pair), _i32(0))
    exists = arith.andi(is_first, arith.cmpi(arith.CmpIPredicate.ult, row, _i32(rows)))
    store_stats(row, _i32(0), _four(stats), exists)
    thread = arith.remui(mgpu.utils.thread_idx(), _i32(128))
    width = sums[0].shape[1]
    _, at_once, numbers = ir.MemRefType(ref.type).shape
    f32 = ir.F32Type.get()
    two, base = ir.VectorType.get((2,), f32), _pointer(ref)
    at = lambda warp, row, number: mgpu.utils.getelementptr(
        base, [arith.addi(number, arith.muli(arith.addi(arith.muli(warp, _i32(at_once)), row), _i32(numbers)))], f32
    )
    for first in range(0, rows, at_once):
        here = min(at_once, rows - first)
        if first:
            mgpu.utils.warpgroup_barrier()
        of_these = arith.subi(row, _i32(first))
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, of_these, _i32(here))):
            to = at(warp, of_these, arith.muli(pair, _i32(2)))
            for i, x in enumerate(sums):
                for chunk, register in enumerate(x.registers.flat):
                    llvm.store(register, mgpu.utils.getelementptr(to, [i * width + 8 * chunk], f32), alignment=8)
        mgpu.utils.warpgroup_barrier()
        of_row = len(sums) * width // 2  # pairs
        for start in range(0, here * of_row, 128):
            item = arith.addi(thread, _i32(start))
            exists = arith.cmpi(arith.CmpIPredicate.ult, item, _i32(here * of_row))
            item = arith.minui(item, _i32(here * of_row - 1))
            own, number = arith.divui(item, _i32(of_row)), arith.muli(arith.remui(item, _i32(of_row)), _i32(2))
            loaded = [llvm.load(two, at(_i32(i), own, number), alignment=8) for i in range(WARPS)]
            store_sums(arith.addi(own, _i32(first)), number, _elements(functools.reduce(arith.addf, loaded)), exists)


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
    state: tiles.State,
    part: jax.Array,
    inbox_ref,
    stats_ref,
    sums_ref,
    scratch_ref,
    *,
    rows: int,
    num_splits: int,
) -> None:
    """Sends every row's state to the program of the cluster that merges it, and waits for what comes from the others.

    Row i goes to program i % num_splits, into slot i // num_splits. Every store to another program tells the receiver's
    barrier, so that no fence holds up the sender.

    Args:
      state: of this warpgroup, (32,), the same in all warps, and (32, columns), of which each warp has a share.
      part: number of this warpgroup among those that share the keys.
      inbox_ref: as in `expect`, which must have been called; None where a program is alone.
      stats_ref: (slots, parts, 4) float32 in shared memory: m, d1 and t_mean.
      sums_ref: (slots, parts, 1 or 2, columns) float32: o1 and o2.
      scratch_ref: shared memory of this warpgroup, of the shape that `sums_scratch` gives.
      rows: rows that there are.
      num_splits: programs of the cluster.
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
            plgpu.RefType(),
        )
    )
    def send(_, stats, sums, part, inboxes, stats_ref, sums_ref, scratch_ref):
        ptx = functools.partial(mgpu.utils.inline_ptx, has_side_effects=True)
        if inboxes:  # all are ready
            ptx("barrier.cluster.wait.acquire.aligned;", convergent=True)
        kind, last = (
            ("async.shared::cluster.mbarrier::complete_tx::bytes", ", [$@]") if inboxes else ("shared::cta", "")
        )

        def store(ref, of_part: int, row, number: ir.Value, values, exists):
            """Stores numbers of the state of a row where it is merged."""
            target, slot = arith.remui(row, _i32(num_splits)), arith.divui(row, _i32(num_splits))
            place = arith.addi(arith.muli(slot, _i32(num_parts)), _scalar(part))
            offset = arith.muli(arith.addi(arith.muli(place, _i32(of_part)), number), _i32(4))
            addresses = [arith.addi(_shared_address(ref), offset), *map(_shared_address, inboxes)]
            if inboxes:
                there = "mapa.shared::cluster.u32 $0, $1, $2;"
                addresses = [mgpu.utils.inline_ptx(there, x, target, result_types=x.type) for x in addresses]
            size = len(values)
            names, inbox = ", ".join(f"${i + 1}" for i in range(size)), last.replace("@", str(size + 1))
            to, *told = addresses
            ptx(f"st.{kind}.v{size}.f32 [$0], {{{names}}}{inbox};", to, *values, *told, predicate=exists)

        stores = (functools.partial(store, *x) for x in ((stats_ref, 4), (sums_ref, len(sums) * width)))
        _store_rows(stats, sums, scratch_ref, rows, *stores)
        wait = "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$0], 0;"
        if inboxes:
            ptx(f"{{ .reg .pred done; again: {wait} @!done bra again; }}", _shared_address(inboxes[0]))
        else:
            ptx("bar.sync 0;", convergent=True)
        return ()

    send(stats, sums, part, inboxes, stats_ref, sums_ref, scratch_ref)


def store_state(state: tiles.State, stats_ref, sums_ref, scratch_ref, rows: int, interpret: bool) -> None:
    """Writes every row's state to global memory.

    Args:
      state: (32,), the same in all warps, and (32, columns), of which each warp has a share.
      stats_ref: (rows, 4) float32: m, d1 and t_mean.
      sums_ref: (rows, 1 or 2, columns) float32: o1 and o2.
      scratch_ref: in shared memory, of the shape that `sums_scratch` gives.
      rows: rows that there are.
      interpret: whether Pallas' interpreter runs.
    """
    stats = [x for x in (state.m, state.d1, state.t_mean) if x is not None]
    sums = [x for x in (state.o1, state.o2) if x is not None]
    if interpret:
        for i, x in enumerate(stats):
            stats_ref[:, i] = x[:rows]
        for i, x in enumerate(sums):
            sums_ref[:, i] = added_up(x)[:rows]
        return
    layouts = [HALF_ROWS] * len(stats), [HALF] * len(sums)

    @plgpu.inline_mgpu(arg_types=(*layouts, *[plgpu.RefType()] * 3))
    def write(_, stats, sums, stats_ref, sums_ref, scratch_ref):
        i64 = ir.IntegerType.get_signless(64)

        def store(ref, of_row: int, row, number, values, exists):
            names = ", ".join(f"${i + 1}" for i in range(len(values)))
            offset = arith.addi(arith.muli(row, _i32(of_row)), number)
            at = arith.addi(_global_address(ref), arith.extui(i64, arith.muli(offset, _i32(4))))
            ptx = f"st.global.v{len(values)}.f32 [$0], {{{names}}};"
            mgpu.utils.inline_ptx(ptx, at, *values, predicate=exists, has_side_effects=True)

        of_row = len(sums) * sums[0].shape[1]
        stores = (functools.partial(store, *x) for x in ((stats_ref, 4), (sums_ref, of_row)))
        _store_rows(stats, sums, scratch_ref, rows, *stores)
        return ()

    write(stats, sums, stats_ref, sums_ref, scratch_ref)


def added_up(x: jax.Array) -> jax.Array:
    """The sum of all warps' rows, (8, columns), for Pallas' interpreter."""
    return jnp.sum(x.reshape(WARPS, ROWS, -1), axis=0)


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

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(common.SWIZZLE), layout, splats))
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
