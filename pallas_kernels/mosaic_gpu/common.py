# NOTE FROM THE LEAD (delete this line once read): device time left is 530 s and reserved. Make NO further device runs; finish correctness, features, tests, docs and the ahead-of-time checks without a GPU. tiles.State changed: use tiles.from_fixed_centre at the end.
"""What the Hopper kernels share: warpgroup tiles, masks and the key range of a row block."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks, tiles

ROWS = 64  # rows of one warpgroup's matrix instruction


def swizzled(*shape: int, dtype) -> plgpu.SMEM:
    """Shared memory laid out for matrix instructions; the last two axes are the matrix."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def launch(name: str, num_groups: int, interpret: bool) -> dict:
    """What all the kernels pass to `plgpu.kernel`: a line of work items, each for a few warpgroups."""
    return dict(
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid_names=("item",),
        num_threads=num_groups,
        thread_name="group",
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )


def work_item(batch: int, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(batch, head, block) of this program: every head's first block, then every head's second, in launch order."""
    block, head = lax.div(lax.axis_index("item"), batch * heads), lax.rem(lax.axis_index("item"), batch * heads)
    return lax.div(head, heads), lax.rem(head, heads), block


def assign(acc, value: jax.Array, interpret: bool) -> None:
    """acc[...] = value for an accumulator."""
    if interpret:  # Pallas' interpreter lacks stores to accumulators, but keeps them as plain buffers
        jax.ref.swap(acc, ..., value)
    else:
        acc[...] = value


def add_product(acc, a: jax.Array, b, interpret: bool) -> None:
    """Starts acc += a @ b with a in registers."""
    if interpret:  # Pallas' interpreter takes operands in shared memory only
        product = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        jax.ref.swap(acc, ..., plgpu.wgmma_accumulator_load(acc) + product)
    else:
        plgpu.wgmma(acc, a, b)


def drain(free, steps, stages: int) -> None:
    """Waits for the last use of every slot."""

    def wait(step, _):
        plgpu.barrier_wait(free.at[lax.rem(step, stages)])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)


def full_tile(shape: tuple[int, int], value: float = 0.0) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA)


def full_rows(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def column_sums(x: jax.Array) -> jax.Array:
    """Adds up the keys that each thread holds: (rows, keys) -> (rows, 8). Threads are added once, at the end."""
    parts = [lax.slice(x, (0, i), (x.shape[0], i + 8)) for i in range(0, x.shape[1], 8)]
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def indices(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def pad_rows(*arrays: jax.Array, multiple: int = 8) -> list[jax.Array]:
    """Pads axis 1 with zeros, by default to whole rows of a swizzled tile in memory; often there is nothing to do."""
    return [jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0))) for x in arrays]


def phases(own: blocks.Bounds, can_start_masked: bool) -> list[tuple[jax.Array, jax.Array, bool]]:
    """The loops over the blocks after the first: (start, stop, masked)."""
    full_first = jnp.clip(own.full_first, own.first + 1, own.last)
    full_last = jnp.clip(own.full_last, full_first, own.last)
    loops = [(full_first, full_last, False), (full_last, own.last, True)]
    return [(own.first + 1, full_first, True), *loops] if can_start_masked else loops


def _some_work(bounds: blocks.Bounds, num_blocks: int) -> blocks.Bounds:
    """At least one block, if only to find that nothing in it is visible: the kernels' loops need no empty case."""
    first = jnp.minimum(bounds.first, num_blocks - 1)
    return bounds._replace(first=first, last=jnp.maximum(bounds.last, first + 1))


class Masks:
    """A `blocks.Mask` as arrays for a kernel, and what the kernel asks of them."""

    def __init__(self, mask: blocks.Mask, num_queries: int, num_keys: int, block: int):
        self.mask, self.num_keys, self.block = mask, num_keys, block
        self.static = dict(num_queries=num_queries, is_causal=mask.is_causal, window=mask.window)
        self.can_start_masked = mask.window is not None or mask.segment_ids is not None
        self.rows_can_start_masked = mask.is_causal or self.can_start_masked
        arrays = [jnp.reshape(mask.offset, (1,))]
        if mask.lengths is not None:
            arrays.append(mask.lengths)
        if mask.segment_ids is not None:
            pad = -num_queries % (2 * ROWS)
            arrays.append(jnp.pad(mask.segment_ids, ((0, 0), (0, pad)), mode="edge"))
            arrays.append(blocks.segment_spans(mask.segment_ids, ROWS))
        self.arrays = arrays

    def _split(self, refs, batch_index):
        """The call's numbers: offset, length, and the references of segments and spans."""
        offset_ref, *rest = refs
        length = rest.pop(0)[batch_index] if self.mask.lengths is not None else self.num_keys
        return offset_ref[0], length, *(rest or (None, None))

    def _segment(self, spans, batch_index, start):
        if spans is None:
            return None
        block = jnp.minimum(start // ROWS, spans.shape[1] - 1)
        return tuple(spans[batch_index, block, i] for i in range(4))

    def key_bounds(self, refs, batch_index, row) -> blocks.Bounds:
        """The key blocks of rows [row, row + 64): at least one, so that every tile of rows does some work."""
        offset, length, _, spans = self._split(refs, batch_index)
        bounds = blocks.key_bounds(
            row,
            ROWS,
            self.block,
            offset=offset,
            length=length,
            segment=self._segment(spans, batch_index, row),
            **self.static,
        )
        return _some_work(bounds, pl.cdiv(self.num_keys, self.block))

    def row_bounds(self, refs, batch_index, key) -> blocks.Bounds:
        """The row blocks of keys [key, key + 64): at least one."""
        offset, length, _, spans = self._split(refs, batch_index)
        bounds = blocks.row_bounds(
            key,
            self.block,
            ROWS,
            offset=offset,
            length=length,
            segment=self._segment(spans, batch_index, key),
            **self.static,
        )
        return _some_work(bounds, pl.cdiv(self.static["num_queries"], self.block))

    def visible(self, refs, batch_index, row, key, shape, key_axis=1) -> jax.Array:
        """The tile of keys from `key` on that the rows from `row` on see."""
        offset, length, segments, _ = self._split(refs, batch_index)
        row_segments = key_segments = None
        if segments is not None:
            row_segments, key_segments = [
                tiles.spread(
                    plgpu.load(
                        segments.at[batch_index, pl.ds(start, shape[axis])],
                        layout=plgpu.Layout.WGMMA.reduce(1 - axis),
                        optimized=False,
                    ),
                    jax.ShapeDtypeStruct(shape, jnp.int32),
                    1 - axis,
                )
                for start, axis in ((row, 1 - key_axis), (key, key_axis))
            ]
        return blocks.visible_tile(
            indices(shape, 1 - key_axis) + row,
            indices(shape, key_axis) + key,
            offset=offset,
            length=length,
            row_segments=row_segments,
            key_segments=key_segments,
            **{**self.static, "num_queries": None},
        )

    def hide_padding(self, *arrays):
        """Zeroes the keys and values past `lengths`, whatever they hold: 0 * NaN would reach the products."""
        if self.mask.lengths is None:
            return arrays
        valid = jnp.arange(self.num_keys) < self.mask.lengths[:, None]
        return [jnp.where(valid[:, :, None, None], x, 0) for x in arrays]
