"""The model's blocks for one new token of one sequence, in one kernel for Hopper.

Time is the reading of weights, keys and values. One warpgroup of a program does nothing but copy the tiles that it
reads into a ring of slots, as far ahead as there is room, whatever the other one waits for. That one computes block
after block, each in five stages; in between, programs meet at a counter in global memory, so all must run at once.
Where processes share a GPU's cores (MPS) that is not given: a model with `implementation="triton"` does without.

Registers are what is scarce: after a meeting, what has been spilled comes from the second-level cache. So what every
stage has to know is worked out anew in each, and what outlives a stage lies in shared memory.

A product is cut into tiles of 128 rows and 64 columns. A program takes some columns of a share of the rows, and whoever
needs the product adds up the shares.
"""

import functools
import types
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device, tiles
from pallas_kernels.mosaic_gpu import common, decode, registers

PROGRAMS = 128  # a power of two, and as many cores
TILE = 128, 64  # rows and columns of weights
SLOTS = 12  # of the ring
MAX_WIDTH, MAX_SHARE = 2048, 1536  # what registers hold of the stream, shared memory of a product's inputs
# Tiles of a program on their way, before and after the first so many: with more, a meeting waits for the memory, too.
AT_FIRST, UNDER_WAY = 6, 2


class Product(NamedTuple):
    """How a product of a row with matrices side by side is shared out among programs.

    Attributes:
      depth: rows of the matrices.
      widths: columns of each.
      shares: of the rows; program p has share p % shares.
      programs: in all.
    """

    depth: int
    widths: tuple[int, ...]
    shares: int
    programs: int

    @classmethod
    def of(cls, weights: Sequence[jax.Array], programs: int, shares: int | None = None) -> "Product":
        """The one with the fewest tiles for a program."""
        depth, widths = weights[0].shape[-2], tuple(w.shape[-1] for w in weights)
        numbers = [shares] if shares else [1 << i for i in range(programs.bit_length())]
        plans = [cls(depth, widths, n, programs) for n in numbers if depth % (n * TILE[0]) == 0]
        return min(plans, key=lambda plan: (plan.share > MAX_SHARE, plan.num_tiles, plan.shares))

    @property
    def share(self) -> int:
        """Rows of a share."""
        return self.depth // self.shares

    @property
    def firsts(self) -> list[int]:
        """First block of 64 columns of each matrix, and the number of blocks."""
        return [sum(self.widths[:i]) // TILE[1] for i in range(len(self.widths) + 1)]

    @property
    def rounds(self) -> int:
        """Blocks of columns of a program."""
        return pl.cdiv(self.firsts[-1] * self.shares, self.programs)

    @property
    def num_tiles(self) -> int:
        """Of a program."""
        return self.rounds * (self.share // TILE[0])

    def place(self, program, index):
        """(row, block of columns) of a program's tile."""
        depth = self.share // TILE[0]
        return self.first(program) + lax.rem(index, depth) * TILE[0], self.block(program, lax.div(index, depth))

    def first(self, program):
        """First row of a program's share."""
        return lax.rem(program, self.shares) * self.share

    def block(self, program, index):
        """Block of columns of a program's round; where none is left the last, which another program has, too."""
        block = lax.div(program, self.shares) + index * (self.programs // self.shares)
        return jnp.minimum(block, self.firsts[-1] - 1)


def _plans(weights: dict[str, Sequence[jax.Array]], programs: int, kv_heads: int) -> dict[str, Product]:
    """Of each product; a share of the output projection is what follows one kv head."""
    return {name: Product.of(w, programs, kv_heads if name == "out" else None) for name, w in weights.items()}


class Norms(NamedTuple):
    """Gains of the blocks' RMS norms: (L, D) of the stream, (L, H) of query, probe and key or None."""

    attention: jax.Array
    mlp: jax.Array
    query: jax.Array | None
    probe: jax.Array | None
    key: jax.Array | None


def _across(size: int) -> plgpu.Layout:
    """Layout of rows whose columns lie across all threads; `reduce(0)` is that of one row."""
    width = next(n for n in (4, 2, 1) if size % (128 * n) == 0)
    tiling = fragmented_array.Tiling(((1, 128 * width), (32 * width,), (width,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _in_each_warp(size: int) -> plgpu.Layout:
    """Layout of rows of up to 128 columns, the same in all warps."""
    tiling = fragmented_array.Tiling(((1, size), (size // 32,)))
    copies = fragmented_array.Replicated(4)
    return plgpu.Layout.TILED(tiling, warp_dims=(copies,), lane_dims=(-2,), vector_dim=-1)


def unsupported(x, weights, key, programs: int = PROGRAMS) -> str | None:
    """Why `layers` cannot run blocks, or None; the arguments are those of `layers`, arrays or their shapes."""
    _, batch, capacity, kv_heads, head_dim = key.shape
    group = weights["out"][0].shape[-2] // head_dim // kv_heads
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x: needs bfloat16 or float16, got {x.dtype}"
    if x.shape[0] != 1 or batch != 1:
        return f"x: needs one sequence, got {x.shape[0]}"
    if head_dim not in common.WIDTHS or group > registers.ROWS or programs % kv_heads:
        return f"key: needs heads {common.WIDTHS} wide, got {head_dim}, at most {registers.ROWS} queries for each"
    if capacity % 8:
        return f"key: needs room for a multiple of 8 keys, got {capacity}"
    matrices = [w for several in weights.values() for w in several]
    if any(w.dtype != x.dtype or w.shape[-2] % TILE[0] or w.shape[-1] % TILE[1] for w in matrices):
        return f"weights: need {x.dtype} and multiples of {TILE} rows and columns"
    if x.shape[1] > MAX_WIDTH:
        return f"x: needs a width of at most {MAX_WIDTH}, got {x.shape[1]}"
    if group * head_dim % TILE[0]:
        return f"weights: need {TILE[0]} rows of the output projection for a kv head, got {group * head_dim}"
    longest = max(plan.share for plan in _plans(weights, programs, kv_heads).values())
    if longest > MAX_SHARE:
        return f"weights: need shares of at most {MAX_SHARE} rows, got {longest}"
    return common.unsupported_device() or device.too_few_cores()


def layers(
    x: jax.Array,
    parts: jax.Array | None,
    weights: dict[str, Sequence[jax.Array]],
    norms: Norms,
    key: jax.Array,
    value: jax.Array,
    counters: jax.Array,
    lengths: jax.Array,
    rotation: jax.Array,
    *,
    epsilon: float,
    head_epsilon: float,
    rotated: Sequence[str] = ("query", "probe", "key"),
    ring: bool = False,
    programs: int = PROGRAMS,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Runs L blocks, one after the other, on one new token of one sequence.

    Args:
      x: (1, D) the residual stream.
      parts: (S, D) float32, whose sum is to be added to it; None where nothing is.
      weights: "in": (L, D, N H) of query and, where there is one, probe, then (L, D, K H) of key and value; "out":
        (L, N H, D); "gate": (L, D, F) of gate and up projection; "down": (L, F, D).
      norms: gains.
      key: (L, 1, S, K, H) cached keys.
      value: (L, 1, S, K, H) cached values.
      counters: int32 (1 + K, 32), each number in column 0 a multiple of `programs`, such as 0.
      lengths: int32 (2,), of the sequence without and with the new token; where they are the same there is none.
      rotation: float32 (2, H), the factors of a dimension and of its partner.
      epsilon: of the stream's norms.
      head_epsilon: of the heads' norms.
      rotated: what is rotated of query, probe and key.
      ring: token s has row s % S, so the new one takes the place of one that it does not see; else it is left out where
        it has no place.
      programs: a power of two, of which K is a divisor. All must run at once.

    Returns:
      x and parts for the block after these, key, value and counters.
    """
    options = dict(epsilon=epsilon, head_epsilon=head_epsilon, rotated=rotated, ring=ring, programs=programs)
    run = jax.custom_batching.sequential_vmap(functools.partial(_layers, **options))  # not more programs than cores
    return run(x, parts, weights, norms, key, value, counters, lengths, rotation)


def _layers(
    x, parts, weights, norms, key, value, counters, lengths, rotation, *, epsilon, head_epsilon, rotated, ring, programs
):
    interpret = common.is_interpreted()
    dtype, width = x.dtype, x.shape[1]
    num_layers, _, capacity, kv_heads, head_dim = key.shape
    group = weights["out"][0].shape[-2] // head_dim // kv_heads
    mlp_width = weights["down"][0].shape[-2]
    names = ["query", "probe", "key", "value"] if len(weights["in"]) == 4 else ["query", "key", "value"]
    has_probe = "probe" in names
    plans = _plans(weights, programs, kv_heads)
    splits = programs // kv_heads  # programs that share the keys of a head
    block = TILE[0] * TILE[1] // head_dim  # keys of a tile
    c = head_dim**-0.5 * tiles.LOG2_E
    starts = dict(zip(names, [TILE[1] * first for first in plans["in"].firsts], strict=False))

    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    results = {name: {name: float32(plan.shares, sum(plan.widths))} for name, plan in plans.items()}
    results["gate"]["x"] = jax.ShapeDtypeStruct((1, width), dtype)
    results["attention"] = {
        "stats": float32(kv_heads, splits, group, 4),
        "sums": float32(kv_heads, splits, group, 1 + has_probe, head_dim),
    }
    given = {
        "x": x,
        "parts": parts,
        "weights": weights,
        "gains": {name: gain for name, gain in norms._asdict().items() if gain is not None},
        "rotation": rotation,
        "lengths": lengths,
    }

    def kernel(stages, blocks, tree, outputs, key_ref, value_ref, counters_ref, *refs, **scratch):
        inputs, before = jax.tree.unflatten(tree, refs[: tree.num_leaves])
        buffers = before | dict(zip(outputs, refs[tree.num_leaves :], strict=True))
        g, s, now = types.SimpleNamespace(**inputs), types.SimpleNamespace(**scratch), types.SimpleNamespace()
        weight_tiles, head_tiles = (s.weights, s.heads) if interpret else s.ring
        input_row, warp_sums = (s.row, None) if interpret else s.row
        thread = lax.axis_index("thread")

        def facts(program, length, end):
            """What a program of a sequence of `length` tokens, with the new one `end`, has to know."""
            kv, own = lax.rem(program, kv_heads), lax.div(program, kv_heads)
            place = lax.rem(length, capacity) if ring else length
            is_new = (end > length) & (place < capacity)
            num_keys = jnp.minimum(length + is_new.astype(jnp.int32), capacity)
            count = jnp.maximum(1, lax.div(pl.cdiv(num_keys, block) - own - 1, splits) + 1)
            of_new = lax.div(place, block)  # the tile that it goes to
            own_new = jnp.where(is_new & (lax.rem(of_new, splits) == own), lax.div(of_new, splits), -1)
            firsts, of_block = {}, 0  # the first step of each stage, and steps of a block
            for stage in stages:
                firsts[stage] = of_block
                of_block += 2 * count if stage == "attention" else plans[stage].num_tiles
            return dict(
                program=program,
                kv=kv,
                own=own,
                place=place,
                is_new=is_new,
                num_keys=num_keys,
                count=count,
                own_new=own_new,
                firsts=firsts,
                of_block=of_block,
            )

        start = lax.axis_index("program"), g.lengths[0], g.lengths[1]
        f = types.SimpleNamespace(**facts(*start))
        total = len(blocks) * f.of_block

        def slot(step):
            return common.ring_slot(step, SLOTS)

        def key_of(own, i):
            """First key of a program's i-th tile of keys."""
            return (own + i * splits) * block

        def copy(step):
            """Starts to copy the tile of a step into its slot."""

            def when(condition, source, to):
                start = functools.partial(plgpu.copy_gmem_to_smem, source, to.at[slot(step)], s.ready.at[slot(step)])
                pl.when(condition)(start)

            number = lax.div(step, f.of_block)
            of_model = blocks.start + number
            for stage in stages:
                index = step - number * f.of_block - f.firsts[stage]
                if stage == "attention":
                    first = key_of(f.own, lax.div(index, 2))
                    here = pl.ds(jnp.where(first < capacity, first, 0), block)
                    inside = (index >= 0) & (index < 2 * f.count)
                    for i, ref in enumerate((key_ref, value_ref)):
                        when(inside & (lax.rem(index, 2) == i), ref.at[of_model, here, f.kv], head_tiles)
                    continue
                plan = plans[stage]
                row, column = plan.place(f.program, index)
                inside = (index >= 0) & (index < plan.num_tiles)
                for first, last, ref in zip(plan.firsts, plan.firsts[1:], g.weights[stage], strict=False):
                    tile = ref.at[of_model, pl.ds(row, TILE[0]), pl.ds((column - first) * TILE[1], TILE[1])]
                    when(inside & (first <= column) & (column < last), tile, weight_tiles)

        @pl.when(thread == 1)
        def _copy():
            def see(landed, due):
                """Waits for the tiles of steps [landed, due)."""
                lax.fori_loop(landed, due, lambda i, _: plgpu.barrier_wait(s.ready.at[slot(i)]), None)
                return jnp.maximum(landed, due)

            def one(step, landed):
                landed = see(landed, jnp.where(step < AT_FIRST, 0, step - UNDER_WAY + 1))
                pl.when(step >= SLOTS)(lambda: plgpu.barrier_wait(s.free.at[slot(step)]))
                copy(step)
                return landed

            see(lax.fori_loop(0, total, one, jnp.int32(0)), total)
            common.drain(s.free, total, SLOTS)

        def meetings(kv):
            """Row of the counter, and programs, of those that meet."""
            return {"all": (0, programs), "head": (1 + kv, splits)}

        def meet(who, number):
            """The number-th meeting in a block, of all or of those that share a head."""
            if interpret:
                return
            row, size = meetings(now.kv)[who]
            of_block = 4 if who == "all" else 1
            count = s.kept[0 if who == "all" else 1] + (now.number * of_block + number) * size
            registers.meet(counters_ref.at[row, 0], count)

        def load(ref, layout):
            x = ref[...] if interpret else plgpu.load(ref, layout=layout, optimized=False)
            return x.astype(jnp.float32)

        def rounded(x):
            return x.astype(dtype).astype(jnp.float32)

        def store(ref, x, layout):
            registers.put(ref, x.astype(dtype), layout.reduce(0), interpret)

        def added_up(ref, columns, layout):
            """The sum over all shares of a product."""
            return jnp.sum(load(ref.at[:, columns], layout), axis=0)

        def set_stream(x):
            store(s.stream, x, _across(width))
            plgpu.commit_smem()

        def add_to_stream(ref):
            """Adds to the residual stream what a product adds to it."""
            layout = _across(width)
            set_stream(load(s.stream, layout.reduce(0)) + rounded(added_up(ref, pl.ds(0, width), layout)))

        def held(plan):
            """Tiles whose slots a product holds until programs have met, so that no copies hold up the meeting."""
            return 0 if interpret else min(plan.num_tiles, SLOTS // 2)

        def some_heads(shares):
            """The heads of the program's group, as many at once as registers have room for."""
            at_once = max(1, 8 // shares)
            return [range(i, min(i + at_once, group)) for i in range(0, group, at_once)]

        def multiply(name, vectors):
            """The program's share of a product with `vectors`: (values, index of the first of the share's, layout)."""
            for x, first, layout in vectors:
                registers.write_row(input_row, x.astype(dtype), layout, interpret, first=first)
            plgpu.commit_smem()
            plan = plans[name]
            depth, share = plan.share // TILE[0], lax.rem(now.program, plan.shares)

            def one(i, _):
                column, first = plan.block(now.program, i), now.first + now.firsts[name] + i * depth

                def product(sums):
                    for k in range(depth):
                        at = slot(first + k)
                        plgpu.barrier_wait(s.ready.at[at])
                        inputs = input_row.at[:, pl.ds(k * TILE[0], TILE[0])]
                        plgpu.wgmma(sums, weight_tiles.at[at].transpose((1, 0)), inputs.transpose((1, 0)))
                    to = buffers[name].at[share, pl.ds(column * TILE[1], TILE[1])]
                    registers.store_column(to, common.read(sums), interpret)

                pl.run_scoped(product, plgpu.ACC((TILE[1], registers.ROWS), jnp.float32))
                if held(plan) < plan.num_tiles:
                    for k in range(depth):
                        free = functools.partial(plgpu.barrier_arrive, s.free.at[slot(first + k)])
                        pl.when(i * depth + k < plan.num_tiles - held(plan))(free)

            lax.fori_loop(0, plan.rounds, one, None)

        def release(name, block):
            """Gives up the slots that a product of the block whose first step is `block` has held."""
            for k in range(plans[name].num_tiles - held(plans[name]), plans[name].num_tiles):
                plgpu.barrier_arrive(s.free.at[slot(block + now.firsts[name] + k)])

        def multiply_normed(name, gain):
            x = load(s.stream, _across(width).reduce(0))
            x = x * lax.rsqrt(jnp.sum(x * x) / width + epsilon) * gain
            multiply(name, [(x, plans[name].first(now.program), _across(width).reduce(0))])

        def gain_of(name):
            return load(g.gains[name].at[now.block], _across(width).reduce(0))

        def inputs():
            gain = gain_of("attention")

            def after_another():
                meet("all", -1)
                release("down", now.first - now.of_block)
                add_to_stream(buffers["down"])

            if len(blocks) > 1:
                pl.when(now.number > 0)(after_another)
            multiply_normed("in", gain)

        def attention():
            stats, sums = (buffers[name].at[now.kv] for name in ("stats", "sums"))
            half, layout, of_columns = head_dim // 2, _in_each_warp(head_dim // 2), registers.in_columns(head_dim)
            halves = [pl.ds(i * half, half) for i in range(2)]

            gains = {
                name: [load(g.gains[name].at[now.block, i], layout.reduce(0)) for i in halves]
                for name in g.gains
                if name in starts
            }
            meet("all", 0)
            release("in", now.first)

            # All that comes from memory before anything waits for it.
            def shares(name, index):
                first = starts[name] + index * head_dim
                return [load(buffers["in"].at[:, pl.ds(first + i * half, half)], layout) for i in range(2)]

            queries, (first, *others) = names[: 1 + has_probe], some_heads(plans["in"].shares)
            rows_of = lambda heads: [[shares(name, now.kv * group + i) for name in queries] for i in heads]
            rows = rows_of(first)
            of_key = shares("key", now.kv)
            of_value = load(buffers["in"].at[:, pl.ds(starts["value"] + now.kv * head_dim, head_dim)], of_columns)
            factors = [[load(g.rotation.at[j, i], layout.reduce(0)) for j in range(2)] for i in halves]

            def turned(name, both):
                """A row of the first product in halves, normed, rotated and rounded."""
                both = [rounded(jnp.sum(x, axis=0)) for x in both]
                if name in gains:
                    inverse = lax.rsqrt(sum(jnp.sum(x * x) for x in both) / head_dim + head_epsilon)
                    both = [x * inverse * gain for x, gain in zip(both, gains[name], strict=True)]
                if name in rotated:
                    turns = zip(both, both[::-1], factors, strict=True)
                    both = [x * own + y * other for x, y, (own, other) in turns]
                return [x.astype(dtype) for x in both]

            for columns, x in zip(halves, turned("key", of_key), strict=True):
                store(s.new.at[0, columns], x, layout)
            store(s.new.at[1], jnp.sum(of_value, axis=0), of_columns)
            for heads in (first, *others):
                for i, row in zip(heads, rows if heads == first else rows_of(heads), strict=True):
                    for j, name in enumerate(queries):
                        for columns, x in zip(halves, turned(name, row[j]), strict=True):
                            store(s.rows.at[j, 0, i, columns], x, layout)
            parts_of = {"k": [(x, layout) for x in halves], "v": [(pl.ds(0, head_dim), of_columns)]}

            def new(name, columns, layout):
                """A part of the new key or value."""
                x = s.new.at["kv".index(name), columns]
                return x[...] if interpret else plgpu.load(x, layout=layout.reduce(0), optimized=False)

            plgpu.commit_smem()
            rows_here = registers.gather([s.rows.at[i] for i in range(1 + has_probe)], group, interpret)

            @pl.when((now.own == 0) & now.is_new)
            def _to_cache():
                for name, ref in (("k", key_ref), ("v", value_ref)):
                    for columns, layout in parts_of[name]:
                        store(ref.at[now.block, now.place, now.kv, columns], new(name, columns, layout), layout)

            at = lambda name, i: slot(now.first + now.firsts["attention"] + 2 * i + int(name == "v"))

            def wait_for(name, i):
                plgpu.barrier_wait(s.ready.at[at(name, i)])
                tile = head_tiles.at[at(name, i)]

                @pl.when(i == now.own_new)
                def _insert():
                    row = now.place - key_of(now.own, i)
                    for columns, layout in parts_of[name]:
                        x = new(name, columns, layout)
                        registers.write_row(tile, x, layout.reduce(0), interpret, row=row, first=-columns.start)
                    plgpu.commit_smem()

                return tile

            def done(name, i):
                plgpu.barrier_arrive(s.free.at[at(name, i)])

            def visible(i, like):
                of_results = registers.results_layout(like.shape[0])
                across = plgpu.broadcasted_iota(jnp.int32, like.shape, 1, layout=of_results)
                left = now.num_keys - key_of(now.own, i) - registers.first_of_quarter(block, like.shape[0])
                return across < tiles.spread(left, like)

            walk = decode.Walk(now.count, wait_for, done, visible, lambda i: now.num_keys - key_of(now.own, i))
            exchanged = s.warp_stats, warp_sums
            state = decode.attend(
                rows_here, group, 1 + has_probe, walk, *exchanged, c=c, block=block, interpret=interpret
            )
            registers.store_state(state, stats.at[now.own], sums.at[now.own], group, interpret)

        def out():
            meet("head", 0)  # who needs a head's states has made one of them
            layout = registers.in_columns(head_dim)
            stats, sums = (buffers[name].at[now.kv] for name in ("stats", "sums"))

            def merged(i):
                m, d1, *t_mean = (load(stats.at[:, i, n], layout.reduce(1)) for n in range(2 + has_probe))
                o1, *o2 = (load(sums.at[:, i, n], layout) for n in range(1 + has_probe))
                return tiles.merged_output(tiles.State(m, d1, *(t_mean or [None]), o1, *(o2 or [None])))

            outputs = (
                (i, x) for heads in some_heads(4) for i, x in zip(heads, [merged(i) for i in heads], strict=True)
            )
            multiply("out", ((x, -i * head_dim, layout.reduce(0)) for i, x in outputs))

        def gate():
            gain = gain_of("mlp")
            meet("all", 1)
            release("out", now.first)
            add_to_stream(buffers["out"])
            multiply_normed("gate", gain)

            @pl.when((now.program == 0) & (now.number == len(blocks) - 1))
            def _store():
                store(buffers["x"].at[0], load(s.stream, _across(width).reduce(0)), _across(width))

        def down():
            meet("all", 2)
            release("gate", now.first)
            share, first = plans["down"].share, plans["down"].first(now.program)
            layout = _across(share)
            both = (pl.ds(first + i * mlp_width, share) for i in range(2))
            gate, up = (rounded(added_up(buffers["gate"], columns, layout)) for columns in both)
            multiply("down", [(gate / (1 + jnp.exp(-gate)) * up, 0, layout.reduce(0))])

        @pl.when(thread == 0)
        def _compute():
            run = {"in": inputs, "attention": attention, "out": out, "gate": gate, "down": down}
            if not interpret:
                # As this program has added nothing yet, these round up to what they will be after one meeting.
                counts = [(counters_ref[row, 0] | (size - 1)) + 1 for row, size in meetings(f.kv).values()]
                for i, x in enumerate((*counts, *start[1:])):
                    s.kept[i] = x
            set_stream(load(g.x.at[0], _across(width).reduce(0)))
            if g.parts is not None:
                add_to_stream(g.parts)

            def one(number, _):
                for stage in stages:
                    again = start if interpret else (registers.hidden(start[0]), s.kept[2], s.kept[3])
                    now.__dict__.update(facts(*again))
                    now.number, now.block, now.first = number, blocks.start + number, number * now.of_block
                    run[stage]()

            lax.fori_loop(0, len(blocks), one, None)
            now.__dict__.update(vars(f))
            release("down", total - f.of_block)

    slots = {"weights": TILE, "heads": (block, head_dim)}
    slots = {name: common.swizzled(*shape, SLOTS, dtype=dtype) for name, shape in slots.items()}
    longest = max(plan.share for plan in plans.values())
    scratch = dict(
        stream=plgpu.SMEM((width,), dtype),
        new=plgpu.SMEM((2, head_dim), dtype),
        kept=plgpu.SMEM((4,), jnp.int32),
        rows=plgpu.SMEM((2, 1, group, head_dim), dtype),
        warp_stats=plgpu.SMEM(registers.stats_scratch(group), jnp.float32),
        ready=plgpu.Barrier(num_barriers=SLOTS),
        free=plgpu.Barrier(num_barriers=SLOTS),
    )
    row = plgpu.SMEM((registers.ROWS, longest), dtype, transforms=common.SWIZZLE)
    sums = registers.sums_scratch(group, 1 + has_probe, head_dim)  # while there is no product
    if interpret:
        scratch |= dict(slots, row=row)
    else:
        sums = plgpu.SMEM(sums, jnp.float32)
        scratch |= dict(ring=plgpu.RefUnion(*slots.values()), row=plgpu.RefUnion(row, sums))
    refs = [jax.new_ref(x) for x in (key[:, 0], value[:, 0], counters)]

    def run(stages, blocks, given, before):
        inputs, tree = jax.tree.flatten((given, before))
        outputs = {name: shape for stage in stages for name, shape in results[stage].items()}
        made = plgpu.kernel(
            functools.partial(kernel, stages, blocks, tree, list(outputs)),
            out_type=tuple(outputs.values()),
            scratch_types=scratch,
            grid=(programs,),
            grid_names=("program",),
            num_threads=2,
            thread_name="thread",
            kernel_name="blocks",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=plgpu.InterpretGPUParams() if interpret else False,
        )(*refs, *inputs)
        return before | dict(zip(outputs, made, strict=True))

    stages = ("in", "attention", "out", "gate", "down")
    if interpret:  # which has no barrier: a kernel a stage
        for i in range(num_layers):
            made = {}
            for stage in stages:
                made = run((stage,), range(i, i + 1), given, made)
            given |= {"x": made["x"], "parts": made["down"]}
    else:
        made = run(stages, range(num_layers), given, {})
    key, value, counters = (ref[...] for ref in refs)
    return made["x"], made["down"], key[:, None], value[:, None], counters
