"""What Hopper's decode does below Pallas, register by register: products, and how warps and programs exchange states.

The four warps of a warpgroup share out the keys of a tile, a quarter each. Keys, and columns of values, are the 16 rows
of a warp's matrix instructions; queries and their probes are neighbours among its 8 columns. A thread then holds both
scores of a query and a key, and both sums of a query and a column of values. A kv head has up to four queries in one
column of instructions, or eight in two; where it has fewer, the others repeat them.

To Pallas, arrays of results are 4 or 8 rows of each warp, and operands of products, `interleaved`, twice as many.

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

ROWS = 8  # of queries, at most
TILE = plgpu.Layout.WGMMA
WARPS = 4  # which share the keys of a tile


def rows_held(rows: int) -> int:
    """Rows of a warp's results."""
    return 4 if rows <= 4 else 8


def stats_scratch(rows: int) -> tuple[int, int, int]:
    """Shape of the shared memory through which warps exchange statistics, of float32."""
    return WARPS, rows_held(rows), 4


def _layout(held: int, lines: int, in_thread: int, lane_dims: tuple[int, int]) -> plgpu.Layout:
    """Layout of 8 columns by `held` rows of each warp, 4 or 8, in blocks of `lines`."""
    whole = [(WARPS * held, 8), (held, 8)] + [(lines, 8)] * (held > lines)
    tiling = fragmented_array.Tiling((*whole, (in_thread,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(1 - 2 * len(whole) - 2,), lane_dims=lane_dims, vector_dim=-1)


def results_layout(num_rows: int) -> plgpu.Layout:
    """Layout of results of `num_rows` rows, those of all warps; `reduce(1)` is that of one number for each row."""
    return _layout(num_rows // WARPS, 4, 1, (-2, -3))


def _operand(num_rows: int) -> plgpu.Layout:
    """Layout of operands of products, which have `num_rows` rows."""
    return _layout(num_rows // WARPS, 8, 2, (-3, -2))


def _array(registers: Sequence[ir.Value], shape: tuple[int, ...], to: plgpu.Layout) -> mgpu.FragmentedArray:
    """Of vectors, in the order of columns and, within them, of blocks of rows."""
    array = np.empty(to.to_mgpu().registers_shape(shape), dtype=object)
    array.flat[:] = registers
    return mgpu.FragmentedArray(_registers=array, _layout=to.to_mgpu(), _is_signed=None)


def _result(numbers: Sequence[ir.Value], *shape: int) -> mgpu.FragmentedArray:
    one = ir.VectorType.get((1,), ir.F32Type.get())
    of = results_layout(shape[0])
    return _array([vector.from_elements(one, [x]) for x in numbers], shape, of if len(shape) == 2 else of.reduce(1))


def _results(*shape: int) -> plgpu.ShapeDtypeStruct:
    of = results_layout(shape[0])
    return plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=of if len(shape) == 2 else of.reduce(1))


def _numbers(x: mgpu.FragmentedArray) -> list[ir.Value]:
    """What a thread holds of results."""
    return [_elements(register)[0] for register in x.registers.flat]


def _distinct(rows: int) -> int:
    """How many of the rows in one column of instructions are not there to repeat the others."""
    return 1 << (min(rows, 4) - 1).bit_length()


def _place(row, rows: int, remainder: Callable, least: Callable):
    """The query of a row of a warp's results."""
    return least(row if rows > 4 else remainder(row, _distinct(rows)), rows - 1)


def row_numbers(rows: int) -> jax.Array:
    """The query of each row of results, (4 * held,) int32, where there are `rows` queries."""
    num_rows = WARPS * rows_held(rows)
    of_rows = results_layout(num_rows).reduce(1)
    if rows == 1:  # of numbers that nobody needs no layout could be inferred
        return plgpu.layout_cast(jnp.zeros(num_rows, jnp.int32), of_rows)
    row = plgpu.broadcasted_iota(jnp.int32, (num_rows,), 0, layout=of_rows)
    return _place(lax.rem(row, rows_held(rows)), rows, lax.rem, jnp.minimum)


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
    """(warp, one of 8, one of 4) of this thread: column and row of results, or row and pair of columns of operands."""
    thread = mgpu.utils.thread_idx()
    lane = arith.remui(thread, _i32(32))
    return arith.remui(arith.divui(thread, _i32(32)), _i32(4)), arith.divui(lane, _i32(4)), arith.remui(lane, _i32(4))


def gather(given: Sequence, rows: int, interpret: bool) -> jax.Array:
    """The rows of queries and of probes as operands of products, the same in all warps.

    Args:
      given: references (T, heads, H) to the queries of one kv head, in global or shared memory, and to its probes.
      rows: T times the heads, at most `ROWS`.
      interpret: whether Pallas' interpreter runs.

    Returns:
      (4 * 2 * held, H) as from `interleaved`.
    """
    _, heads, width = given[0].shape
    dtype, held = given[0].dtype, rows_held(rows)
    if interpret:
        return interleaved([x[...].reshape(rows, width)[row_numbers(rows)] for x in given], dtype, interpret)
    shape = 2 * WARPS * held, width
    of = _operand(shape[0])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * len(given), return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=of)
    )
    def load(_, *refs):
        _, row, pair = _thread()
        is_probe = arith.cmpi(arith.CmpIPredicate.ne, arith.remui(row, _i32(2)), _i32(0))
        kind = ir.MemRefType(refs[0].type)
        (of_token, of_head, _), _ = kind.get_strides_and_offset()
        source = _pointer(refs[0])
        if len(refs) == 2:
            source = arith.select(is_probe, _pointer(refs[1]), source)
        two = ir.VectorType.get((2,), kind.element_type)
        zero = arith.constant(two, ir.DenseElementsAttr.get_splat(two, ir.FloatAttr.get(kind.element_type, 0.0)))

        def pairs(tile):
            own = arith.addi(arith.divui(row, _i32(2)), _i32(4 * tile))
            own = _place(own, rows, lambda x, y: arith.remui(x, _i32(y)), lambda x, y: arith.minui(x, _i32(y)))
            offset = arith.muli(arith.divui(own, _i32(heads)), _i32(of_token))
            offset = arith.addi(offset, arith.muli(arith.remui(own, _i32(heads)), _i32(of_head)))
            offset = arith.addi(offset, arith.muli(pair, _i32(2)))
            first = mgpu.utils.getelementptr(source, [offset], kind.element_type)
            for chunk in range(width // 8):
                loaded = llvm.load(two, mgpu.utils.getelementptr(first, [8 * chunk], kind.element_type), alignment=4)
                yield loaded if len(refs) == 2 else arith.select(is_probe, zero, loaded)

        return _array([x for several in zip(*map(pairs, range(held // 4)), strict=True) for x in several], shape, of)

    return load(*given)


def interleaved(both: Sequence[jax.Array], dtype, interpret: bool) -> jax.Array:
    """Results of queries and of probes as operands of products: the rows of both in turn.

    Args:
      both: (4 * held, columns) float32, one or two; a second that is missing is zero.
      dtype: to round to.
      interpret: whether Pallas' interpreter runs.

    Returns:
      (4 * 2 * held, columns).
    """
    num_rows, columns = both[0].shape
    shape = 2 * num_rows, columns
    if interpret:
        first, second = [*both, jnp.zeros_like(both[0])][:2]
        return jnp.stack([first, second], axis=1).reshape(shape).astype(dtype)
    of = _operand(shape[0])

    @plgpu.inline_mgpu(
        arg_types=([results_layout(num_rows)] * len(both),),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=of),
    )
    def turn(_, both):
        element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
        i32, two = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), element)
        first, second = [*map(_numbers, both), [mgpu.c(0.0, ir.F32Type.get())] * both[0].registers.size][:2]

        def turned(x, y):
            bits = llvm.bitcast(i32, arith.truncf(two, _pair(x, y)))
            bits = mgpu.utils.inline_ptx(
                "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", bits, result_types=i32, convergent=True
            )
            return llvm.bitcast(two, bits)

        return _array(list(map(turned, first, second)), shape, of)

    return turn(list(both))


def first_of_quarter(num_keys: int, num_rows: int) -> jax.Array:
    """First key of the quarter of a tile that the warp of a row has, for results of `num_rows` rows."""
    row = plgpu.broadcasted_iota(jnp.int32, (num_rows,), 0, layout=results_layout(num_rows).reduce(1))
    return lax.div(row, num_rows // WARPS) * (num_keys // WARPS)


def _left(ref: ir.Value, rows: int, columns: int, *, transposed: bool) -> list[list[list[ir.Value]]]:
    """A warp's quarter of a tile in shared memory as the left sides of products: [16 rows][16 columns][register].

    A load brings the registers of one instruction in the instruction's order: they must lie side by side.

    Args:
      ref: the tile, in lines of 64 columns.
      rows: of the tile. A quarter of 8 rows gives these twice, or, transposed, two registers.
      columns: likewise.
      transposed: whether columns of the tile are the rows of products.
    """
    warp, _, _ = _thread()
    lane = arith.remui(mgpu.utils.thread_idx(), _i32(32))
    line, matrix = arith.remui(lane, _i32(8)), arith.divui(lane, _i32(8))  # of which this thread says where it lies
    eights = rows // WARPS // 8
    of_eight = columns // 64 * 1024  # bytes
    down, across = arith.remui(matrix, _i32(2)), arith.divui(matrix, _i32(2))
    if transposed:
        down, across = across, down
    base = arith.addi(_shared_address(ref), arith.muli(warp, _i32(eights * of_eight)))
    base = arith.addi(base, arith.muli(line, _i32(128)))
    if eights > 1:
        base = arith.addi(base, arith.muli(down, _i32(of_eight)))
    across = arith.xori(across, line)
    firsts = [arith.addi(base, arith.muli(arith.xori(across, _i32(i)), _i32(16))) for i in range(0, 8, 2)]
    shared, i8 = llvm.PointerType.get(address_space=3), ir.IntegerType.get_signless(8)
    firsts = [llvm.inttoptr(shared, x) for x in firsts]
    num = 2 if transposed and eights == 1 else 4

    def load(eight: int, pair: int):
        offset = eight * of_eight + pair // 4 * 1024
        at = llvm.getelementptr(shared, firsts[pair % 4], [], [offset], i8, llvm.GEPNoWrapFlags.none)
        shape, kind = ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"), nvvm.LdStMatrixEltType.B16
        layout = nvvm.MMALayout.col if transposed else nvvm.MMALayout.row
        loaded = nvvm.ldmatrix(at, layout=layout, num=num, shape=shape, elt_type=kind)
        return [llvm.extractvalue(ir.IntegerType.get_signless(32), loaded, [i]) for i in range(num)]

    return [[load(eight, pair) for pair in range(columns // 16)] for eight in range(0, eights, 2)]


def _multiply(sums: Sequence[ir.Value], a: Sequence[ir.Value], b: Sequence[ir.Value], dtype) -> list[ir.Value]:
    """sums + a @ b of a warp: 16 rows, 8 columns, 8 or 16 numbers deep."""
    f32 = ir.F32Type.get()
    name, names = {jnp.bfloat16: "bf16", jnp.float16: "f16"}[jnp.dtype(dtype).type], itertools.count()
    sizes = 4, len(a), len(b), 4
    operands = ", ".join("{" + ", ".join(f"${next(names)}" for _ in range(n)) + "}" for n in sizes)
    out = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*a, *b, *sums],
        f"mma.sync.aligned.m16n8k{8 * len(b)}.row.col.f32.{name}.{name}.f32 {operands};",
        ",".join(["=f"] * 4 + ["r"] * (len(a) + len(b)) + ["f"] * 4),
        has_side_effects=False,
    )
    return [llvm.extractvalue(f32, out, [i]) for i in range(4)]


def _bits(operand: mgpu.FragmentedArray, blocks: int) -> list[list[ir.Value]]:
    """Registers of the right side of a product: [block of rows][8 columns]."""
    bits = [mgpu.utils.bitcast(x, ir.IntegerType.get_signless(32)) for x in operand.registers.flat]
    return [bits[i::blocks] for i in range(blocks)]


def _pair(x: ir.Value, y: ir.Value) -> ir.Value:
    return vector.from_elements(ir.VectorType.get((2,), x.type), [x, y])


def scores(rows: jax.Array, keys, num_scores: int, interpret: bool) -> list[jax.Array]:
    """Products of rows with a tile of keys, in float32: of each warp's rows with its quarter of the keys.

    Args:
      rows: (4 * 2 * held, H) queries and probes as from `gather`.
      keys: reference (keys, H) to shared memory, in lines of 64 columns.
      num_scores: 2, or 1 for the queries' alone.
      interpret: whether Pallas' interpreter runs.

    Returns:
      (4 * held, keys / 4) of the queries and of the probes.
    """
    num_keys, width = keys.shape
    num_rows, columns = rows.shape[0] // 2, num_keys // WARPS
    if interpret:
        quarters = keys[...].reshape(WARPS, columns, width)
        rows = rows.reshape(WARPS, -1, width)
        product = jnp.einsum("wrh,wkh->wrk", rows, quarters, preferred_element_type=jnp.float32)
        return [product.reshape(num_rows, 2, columns)[:, i] for i in range(num_scores)]
    dtype, blocks = keys.dtype, num_rows // WARPS // 4

    @plgpu.inline_mgpu(
        arg_types=(_operand(rows.shape[0]), plgpu.RefType(common.SWIZZLE)),
        return_type=[_results(num_rows, columns)] * num_scores,
    )
    def product(_, rows, keys):
        zero = mgpu.c(0.0, ir.F32Type.get())
        chains = max(1, 64 // (columns * blocks))  # products that do not wait for one another
        both = [[], []]
        for line in _left(keys, num_keys, width, transposed=False):
            found = []
            for b in _bits(rows, blocks):
                sums = [[zero] * 4 for _ in range(chains)]
                for j, a in enumerate(line):
                    sums[j % chains] = _multiply(sums[j % chains], a, b[2 * j : 2 * j + 2], dtype)
                found.append(functools.reduce(lambda x, y: list(map(arith.addf, x, y)), sums))
            for half in range(min(2, columns // 8)):
                for to, n in zip(both, (2 * half, 2 * half + 1), strict=True):
                    to += [x[n] for x in found]
        return [_result(x, num_rows, columns) for x in both[:num_scores]]

    return product(rows, keys)


def add_values(sums: Sequence[jax.Array], weights: jax.Array, values, interpret: bool) -> list[jax.Array]:
    """sums + weights @ values: of each warp's rows, the products with its quarter of the keys.

    Args:
      sums: (4 * held, H) float32, one or two.
      weights: (4 * 2 * held, keys / 4) of the values' dtype, `interleaved`.
      values: reference (keys, H) to shared memory, in lines of 64 columns.
      interpret: whether Pallas' interpreter runs.
    """
    num_keys, width = values.shape
    num_rows = sums[0].shape[0]
    if interpret:
        quarters = values[...].reshape(WARPS, num_keys // WARPS, width)
        weights = weights.reshape(WARPS, -1, num_keys // WARPS)
        product = jnp.einsum("wrk,wkh->wrh", weights, quarters, preferred_element_type=jnp.float32)
        return [o + product.reshape(num_rows, 2, width)[:, i] for i, o in enumerate(sums)]
    dtype, blocks = values.dtype, num_rows // WARPS // 4

    @plgpu.inline_mgpu(
        arg_types=([results_layout(num_rows)] * len(sums), _operand(weights.shape[0]), plgpu.RefType(common.SWIZZLE)),
        return_type=[_results(num_rows, width)] * len(sums),
    )
    def product(_, sums, weights, values):
        tile = _left(values, num_keys, width, transposed=True)
        zeros = [mgpu.c(0.0, ir.F32Type.get())] * (width // 8 * blocks)
        both = [*map(_numbers, sums), zeros][:2]
        for i in range(0, width // 8, 2):
            for block, b in enumerate(_bits(weights, blocks)):
                places = [j * blocks + block for j in (i, i + 1)]
                total = [x[place] for place in places for x in both]
                for j, line in enumerate(tile):
                    total = _multiply(total, line[i // 2], b[2 * j : 2 * j + 2], dtype)
                for n, place in enumerate(places):
                    for x, number in zip(both, total[2 * n : 2 * n + 2], strict=True):
                        x[place] = number
        return [_result(x, num_rows, width) for x in both[: len(sums)]]

    return product(list(sums), weights, values)


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


def prefetch(ref, row: jax.Array) -> None:
    """Begins to read a row of `ref`, (rows, n) int32 in global memory, into the first-level cache: up to 4096 numbers.

    Args:
      ref: numbers, such as pages.
      row: which.
    """
    _, size = ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def begin(_, ref, row):
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(128))
        first = arith.muli(thread, _i32(32))  # a line of the cache each
        i32 = ir.IntegerType.get_signless(32)
        number = arith.addi(arith.muli(_scalar(row), _i32(size)), arith.minui(first, _i32(size - 1)))
        address = llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.getelementptr(_pointer(ref), [number], i32))
        exists = arith.cmpi(arith.CmpIPredicate.ult, first, _i32(size + 31))  # a row may end within a line more
        mgpu.utils.inline_ptx("prefetch.global.L1 [$0];", address, predicate=exists, has_side_effects=True)
        return ()

    begin(ref, row)


def of_all_warps(stats: Sequence[jax.Array], ref, interpret: bool) -> list[list[jax.Array]]:
    """Statistics of rows by all warps' keys: for each warp, what its rows have, in all warps.

    Args:
      stats: (4 * held,) each, up to four.
      ref: float32 in shared memory, of shape `stats_scratch`, of which nobody reads what came before.
      interpret: whether Pallas' interpreter runs.
    """
    num_rows = stats[0].size
    if interpret:
        return [[jnp.tile(x.reshape(WARPS, -1)[warp], WARPS) for x in stats] for warp in range(WARPS)]

    @plgpu.inline_mgpu(
        arg_types=([results_layout(num_rows).reduce(1)] * len(stats), plgpu.RefType()),
        return_type=[_results(num_rows)] * (len(stats) * WARPS),
    )
    def exchanged(_, stats, ref):
        warp, column, row = _thread()
        f32 = ir.F32Type.get()
        four = ir.VectorType.get((4,), f32)
        of_warp = mgpu.utils.getelementptr(_pointer(ref), [arith.muli(row, _i32(4))], f32)
        held = num_rows // WARPS
        blocks = range(held // 4)
        own = mgpu.utils.getelementptr(of_warp, [arith.muli(warp, _i32(4 * held))], f32)
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, column, _i32(0))):
            for block, numbers in zip(blocks, _four(stats), strict=True):
                at = mgpu.utils.getelementptr(own, [16 * block], f32)
                llvm.store(vector.from_elements(four, numbers), at, alignment=16)
        mgpu.utils.warpgroup_barrier()

        def load(warp, block):
            at = mgpu.utils.getelementptr(of_warp, [4 * (held * warp + 4 * block)], f32)
            return _elements(llvm.load(four, at, alignment=16))[: len(stats)]

        by_warp = [[load(warp, block) for block in blocks] for warp in range(WARPS)]
        return [_result(x, num_rows) for found in by_warp for x in zip(*found, strict=True)]

    flat = exchanged(list(stats), ref)
    return [flat[i : i + len(stats)] for i in range(0, len(flat), len(stats))]


def _four(stats: Sequence[mgpu.FragmentedArray]) -> list[list[ir.Value]]:
    """Statistics of a thread's rows as four numbers each."""
    return [[*x, *x[:1] * (4 - len(x))] for x in map(list, zip(*map(_numbers, stats), strict=True))]


def sums_scratch(rows: int, num_sums: int, width: int) -> tuple[int, int, int]:
    """Shape of the shared memory through which a warpgroup's warps exchange sums of rows, of float32."""
    return WARPS, min(rows, 4), num_sums * width


def _shares(rows: int, width: int) -> tuple[int, int]:
    """(number among copies of a row, columns of each) when columns are shared out among warps and copies of rows."""
    copies = min(4 // _distinct(rows), width // (8 * WARPS))
    return copies, width // (WARPS * copies)


def share_out(sums: Sequence[jax.Array], ref, rows: int, interpret: bool) -> list[list[jax.Array]]:
    """Sums of rows by all warps' keys: for each warp, some columns of what its rows have, other ones in each warp.

    Where rows repeat each other, each has other columns, too.

    Args:
      sums: (4 * held, columns), one or two.
      ref: float32 in shared memory, of shape `sums_scratch`, of which nobody reads what came before.
      rows: queries that there are.
      interpret: whether Pallas' interpreter runs.

    Returns:
      For each warp, (4 * held, columns / 4 / copies) each.
    """
    num_rows, width = sums[0].shape
    held, (copies, share) = num_rows // WARPS, _shares(rows, width)
    if interpret:
        warp, row = jnp.divmod(jnp.arange(num_rows), held)
        first = (warp * copies + row // _distinct(rows) % copies) * share
        columns = first[:, None] + jnp.arange(share)
        return [[x.reshape(WARPS, held, width)[i, row[:, None], columns] for x in sums] for i in range(WARPS)]

    @plgpu.inline_mgpu(
        arg_types=([results_layout(num_rows)] * len(sums), plgpu.RefType()),
        return_type=[_results(num_rows, share)] * (len(sums) * WARPS),
    )
    def exchanged(_, sums, ref):
        warp, column, row = _thread()
        i8, size = ir.IntegerType.get_signless(8), 4 * len(sums)
        kind = ir.VectorType.get((len(sums),), ir.F32Type.get())
        eight = 8 * size
        of_row, of_warp = width * size, min(rows, 4) * width * size
        numbers, blocks = list(map(_numbers, sums)), held // 4
        first, copy = _first_column(warp, row, rows, width), _copy(row, rows, width)
        at = lambda base, offset: mgpu.utils.getelementptr(base, [offset], i8)
        found = [[[] for _ in sums] for _ in range(WARPS)]
        for block in range(blocks):
            rows_here = min(rows - 4 * block, 4)
            own = arith.minui(arith.remui(row, _i32(_distinct(rows))), _i32(rows_here - 1))
            swizzle = arith.muli(own, _i32(32))  # bytes: rows lie in different banks
            base = at(_pointer(ref), arith.muli(own, _i32(of_row)))
            if block:
                mgpu.utils.warpgroup_barrier()
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, row, _i32(copies * rows_here))):
                to = at(base, arith.muli(warp, _i32(of_warp)))
                in_eights = arith.muli(arith.addi(arith.muli(copy, _i32(8)), column), _i32(size))
                low = range(0, 128, copies * eight)
                low = {x: at(to, arith.xori(arith.addi(in_eights, _i32(x)), swizzle)) for x in low}
                for i in range(0, width // 8, copies):
                    here = at(low[i * eight % 128], i * eight // 128 * 128)
                    values = [_chosen([x[(i + j) * blocks + block] for j in range(copies)], copy) for x in numbers]
                    llvm.store(vector.from_elements(kind, values), here, alignment=size)
            mgpu.utils.warpgroup_barrier()
            for i in range(share // 8):
                offset = arith.muli(arith.addi(arith.addi(first, column), _i32(8 * i)), _i32(size))
                here = at(base, arith.xori(offset, swizzle))
                for source, of_source in enumerate(found):
                    loaded = _elements(llvm.load(kind, at(here, source * of_warp), alignment=size))
                    for x, number in zip(of_source, loaded, strict=True):
                        x.append(number)
        order = [block * (share // 8) + i for i in range(share // 8) for block in range(blocks)]
        return [_result([x[i] for i in order], num_rows, share) for of_source in found for x in of_source]

    flat = exchanged(list(sums), ref)
    return [flat[i : i + len(sums)] for i in range(0, len(flat), len(sums))]


def _chosen(values: Sequence[ir.Value], number: ir.Value) -> ir.Value:
    """One of 1, 2 or 4 values."""
    while len(values) > 1:
        is_odd = arith.trunci(ir.IntegerType.get_signless(1), number)
        values = [arith.select(is_odd, y, x) for x, y in zip(values[::2], values[1::2], strict=True)]
        number = arith.shrui(number, _i32(1))
    return values[0]


def _copy(row: ir.Value, rows: int, width: int) -> ir.Value:
    """Number of a row among its copies."""
    return arith.remui(arith.divui(row, _i32(_distinct(rows))), _i32(_shares(rows, width)[0]))


def _first_column(warp: ir.Value, row: ir.Value, rows: int, width: int) -> ir.Value:
    """First of a row's columns as `share_out` shares them out."""
    copies, share = _shares(rows, width)
    return arith.muli(arith.addi(arith.muli(warp, _i32(copies)), _copy(row, rows, width)), _i32(share))


def _store_rows(stats, sums, rows: int, width: int, store_stats: Callable, store_sums: Callable) -> None:
    """Stores the rows' statistics and sums over values.

    Args:
      stats: (4 * held,) each, the same in all warps, or none.
      sums: (4 * held, columns / 4 / copies) each, as `share_out` shares them out.
      rows: queries that there are.
      width: columns of all.
      store_stats: (row, 0, values, exists) stores a row's four numbers.
      store_sums: (row, column, values, exists) stores a column of a row's sums.
    """
    warp, column, row = _thread()
    num_rows, distinct, (copies, share) = sums[0].shape[0], _distinct(rows), _shares(rows, width)
    below = lambda x, limit: arith.cmpi(arith.CmpIPredicate.ult, x, limit)
    is_first = below(arith.addi(warp, column), _i32(1))
    first = arith.addi(_first_column(warp, row, rows, width), column)
    numbers, blocks = list(map(_numbers, sums)), num_rows // WARPS // 4
    for block, four in itertools.zip_longest(range(blocks), _four(stats)):
        own, rows_here = arith.remui(row, _i32(distinct)), _i32(rows - 4 * block)
        query = arith.addi(own, _i32(4 * block))
        if stats:
            store_stats(query, _i32(0), four, arith.andi(is_first, below(row, arith.minui(rows_here, _i32(distinct)))))
        exists = arith.andi(below(own, rows_here), below(row, _i32(copies * distinct)))
        for i in range(share // 8):
            values = [x[i * blocks + block] for x in numbers]
            store_sums(query, arith.addi(first, _i32(8 * i)), values, exists)


def store_rows(x: jax.Array, ref, rows: int) -> None:
    """Writes rows, as `share_out` shares them out, to those of the queries that there are.

    Args:
      x: (4 * held, columns / 4 / copies) float32.
      ref: (T, heads, columns) in global memory, T times heads `rows`.
      rows: queries that there are.
    """
    num_rows, _ = x.shape
    _, heads, width = ref.shape

    @plgpu.inline_mgpu(arg_types=(results_layout(num_rows), plgpu.RefType()))
    def write(_, x, ref):
        kind = ir.MemRefType(ref.type)
        (of_token, of_head, _), _ = kind.get_strides_and_offset()

        def store(row, column, values, exists):
            offset = arith.muli(arith.divui(row, _i32(heads)), _i32(of_token))
            offset = arith.addi(offset, arith.muli(arith.remui(row, _i32(heads)), _i32(of_head)))
            at = mgpu.utils.getelementptr(_pointer(ref), [arith.addi(offset, column)], kind.element_type)
            bits = llvm.bitcast(ir.IntegerType.get_signless(16), arith.truncf(kind.element_type, *values))
            mgpu.utils.inline_ptx("st.global.b16 [$0], $1;", at, bits, predicate=exists, has_side_effects=True)

        _store_rows([], [x], rows, width, None, store)
        return ()

    write(x, ref)


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
    state: tiles.State, part: jax.Array, inbox_ref, stats_ref, sums_ref, *, rows: int, num_splits: int
) -> None:
    """Sends every row's state to the program of the cluster that merges it, and waits for what comes from the others.

    Row i goes to program i % num_splits, into slot i // num_splits. Every store to another program tells the receiver's
    barrier, so that no fence holds up the sender.

    Args:
      state: of this warpgroup: (4 * held,), the same in all warps, and sums as `share_out` shares them out.
      part: number of this warpgroup among those that share the keys.
      inbox_ref: as in `expect`, which must have been called; None where a program is alone.
      stats_ref: (slots, parts, 4) float32 in shared memory: m, d1 and t_mean.
      sums_ref: (slots, parts, columns, 1 or 2) float32: o1 and o2.
      rows: queries that there are.
      num_splits: programs of the cluster.
    """
    stats, sums = _present(state)
    _, num_parts, width, _ = sums_ref.shape
    inboxes = [] if inbox_ref is None else [inbox_ref]
    part_layout, refs = plgpu.Layout.WG_SPLAT(()), [plgpu.RefType()] * (2 + len(inboxes))

    @plgpu.inline_mgpu(arg_types=(*_types(stats, sums), part_layout, refs))
    def send(_, stats, sums, part, refs):
        stats_ref, sums_ref, *inboxes = refs
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
            number = arith.muli(number, _i32(len(values)))
            offset = arith.muli(arith.addi(arith.muli(place, _i32(of_part)), number), _i32(4))
            addresses = [arith.addi(_shared_address(ref), offset), *map(_shared_address, inboxes)]
            if inboxes:
                there = "mapa.shared::cluster.u32 $0, $1, $2;"
                addresses = [mgpu.utils.inline_ptx(there, x, target, result_types=x.type) for x in addresses]
            inbox = last.replace("@", str(len(values) + 1))
            to, *told = addresses
            ptx(f"st.{kind}{_several('f32', len(values))}{inbox};", to, *values, *told, predicate=exists)

        stores = (functools.partial(store, *x) for x in ((stats_ref, 4), (sums_ref, len(sums) * width)))
        _store_rows(stats, sums, rows, width, *stores)
        wait = "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$0], 0;"
        if inboxes:
            ptx(f"{{ .reg .pred done; again: {wait} @!done bra again; }}", _shared_address(inboxes[0]))
        else:
            ptx("bar.sync 0;", convergent=True)
        return ()

    send(stats, sums, part, [stats_ref, sums_ref, *inboxes])


def _present(state: tiles.State) -> tuple[list[jax.Array], list[jax.Array]]:
    """(statistics, sums over values) that a state has."""
    stats, sums = (state.m, state.d1, state.t_mean), (state.o1, state.o2)
    return [x for x in stats if x is not None], [x for x in sums if x is not None]


def _types(stats: Sequence[jax.Array], sums: Sequence[jax.Array]) -> tuple[list[plgpu.Layout], list[plgpu.Layout]]:
    of = results_layout(stats[0].size)
    return [of.reduce(1)] * len(stats), [of] * len(sums)


def _several(kind: str, size: int) -> str:
    """The end of a store of several numbers, $1 and those after it, to $0."""
    names = ", ".join(f"${i + 1}" for i in range(size))
    return f".{kind} [$0], {names}" if size == 1 else f".v{size}.{kind} [$0], {{{names}}}"


def received(stats_ref, sums_ref) -> tiles.State:
    """The state that one of `exchange`'s parts has sent for a row: numbers, and sums laid out as `in_columns` has rows.

    Args:
      stats_ref: (4,) float32 in shared memory.
      sums_ref: (columns, 1 or 2) float32.
    """
    width, num_sums = sums_ref.shape
    of = in_columns(width).reduce(0)
    number = plgpu.ShapeDtypeStruct((), jnp.float32, layout=plgpu.Layout.WG_SPLAT(()))
    row = plgpu.ShapeDtypeStruct((width,), jnp.float32, layout=of)

    @plgpu.inline_mgpu(arg_types=[plgpu.RefType()] * 2, return_type=[number] * (1 + num_sums) + [row] * num_sums)
    def load(_, stats_ref, sums_ref):
        f32 = ir.F32Type.get()
        kind = lambda size: ir.VectorType.get((size,), f32)
        stats = _elements(llvm.load(kind(4), _pointer(stats_ref), alignment=16))[: 1 + num_sums]
        ((column,),) = of.to_mgpu().thread_idxs((width,))
        column = arith.muli(arith.index_cast(ir.IntegerType.get_signless(32), column), _i32(num_sums))
        at = mgpu.utils.getelementptr(_pointer(sums_ref), [column], f32)
        sums = _elements(llvm.load(kind(num_sums), at, alignment=4 * num_sums))
        numbers = [mgpu.FragmentedArray.splat(x, ()) for x in stats]
        return [*numbers, *(_array([vector.from_elements(kind(1), [x])], (width,), of) for x in sums)]

    found = load(stats_ref, sums_ref)
    return tiles.State(*found) if num_sums == 2 else tiles.State(*found[:2], None, found[2], None)


def in_columns(size: int) -> plgpu.Layout:
    """Layout of rows of 64 or 128 columns, one a thread; of 64 columns two threads have the same."""
    tiling = fragmented_array.Tiling(((1, size), (size // 4,), (1,)))
    copies = fragmented_array.Replicated(128 // size)
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(copies, -2), vector_dim=-1)


def store_state(state: tiles.State, stats_ref, sums_ref, rows: int, interpret: bool) -> None:
    """Writes every row's state to global memory.

    Args:
      state: as in `exchange`.
      stats_ref: (rows, 4) float32: m, d1 and t_mean.
      sums_ref: (rows, 1 or 2, columns) float32: o1 and o2.
      rows: queries that there are.
      interpret: whether Pallas' interpreter runs.
    """
    stats, sums = _present(state)
    width = sums_ref.shape[2]
    if interpret:
        for i, x in enumerate(stats):
            stats_ref[:, i] = whole_rows(x, rows, width)
        for i, x in enumerate(sums):
            sums_ref[:, i] = whole_rows(x, rows, width)
        return

    @plgpu.inline_mgpu(arg_types=(*_types(stats, sums), *[plgpu.RefType()] * 2))
    def write(_, stats, sums, stats_ref, sums_ref):
        i64 = ir.IntegerType.get_signless(64)

        def store(ref, of_row: int, row, number, values, exists):
            offset = arith.addi(arith.muli(row, _i32(of_row)), number)
            at = arith.addi(_global_address(ref), arith.extui(i64, arith.muli(offset, _i32(4))))
            ptx = f"st.global{_several('f32', len(values))};"
            mgpu.utils.inline_ptx(ptx, at, *values, predicate=exists, has_side_effects=True)

        def store_sums(row, column, values, exists):
            for i, x in enumerate(values):
                store(sums_ref, len(sums) * width, row, arith.addi(column, _i32(i * width)), [x], exists)

        _store_rows(stats, sums, rows, width, functools.partial(store, stats_ref, 4), store_sums)
        return ()

    write(stats, sums, stats_ref, sums_ref)


def whole_rows(x: jax.Array, rows: int, width: int) -> jax.Array:
    """Numbers or sums of `rows` rows from those of a state's, for Pallas' interpreter."""
    held, row = rows_held(rows), jnp.arange(rows)
    if x.ndim == 1:
        return x[:rows]
    copies, share = _shares(rows, width)
    part, column = jnp.divmod(jnp.arange(width), share)
    warp, copy = jnp.divmod(part, copies)
    return x[warp * held + copy * _distinct(rows) + row[:, None], column]


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
    """Stores x, (n,) or (1, n), to a row in shared or global memory, without a barrier.

    One has to come before anything loads it, even where the same thread does: else the compiler keeps an older value.
    """
    if interpret:
        ref[...] = x.reshape(ref.shape)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(_, ref, x):
        base = _pointer(ref)
        for (*_, index), register in zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True):
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
