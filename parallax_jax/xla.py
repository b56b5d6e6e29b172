"""Parallax attention in blockwise jnp: memory linear in length, forward and backward, on any device."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import blocks, tiles
from pallas_kernels.block_sizes import XlaBlockSizes


def unsupported(query, probe, key, value, mask, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if block_sizes is not None and not isinstance(block_sizes, XlaBlockSizes):
        return f"block_sizes: needs XlaBlockSizes, got {type(block_sizes).__name__}"
    return None


class _Tiles:
    """Cuts one call into tiles. Heads are grouped: queries are (B, K, G, T, H), keys (B, K, S, H)."""

    def __init__(self, query, key, mask: blocks.Mask, block_sizes: XlaBlockSizes | None):
        self.batch, self.T, self.num_heads, _ = query.shape
        self.S, self.num_kv_heads = key.shape[1:3]
        sizes = block_sizes or XlaBlockSizes()
        self.mask = mask
        self.block_q, self.block_k = min(sizes.block_q, self.T), min(sizes.block_k, self.S)
        self.rows, self.keys = -(-self.T // self.block_q), -(-self.S // self.block_k)
        self.state_dtype = jnp.dtype("float64" if query.dtype == jnp.float64 else "float32")
        self.precision = tiles.dot_precision(query.dtype)
        self.lengths = jnp.full((self.batch,), self.S, jnp.int32) if mask.lengths is None else mask.lengths
        self.lengths = jnp.minimum(self.lengths, self.S)
        self.end = blocks.visible_end(mask.offset, self.T, self.lengths, mask.is_causal)
        self.spans = mask.row_spans(self.block_q)
        if self.spans is not None:
            self.row_segments = _pad(mask.segment_ids, self.rows * self.block_q)
            self.key_segments = _pad(mask.segments_of_keys, self.keys * self.block_k)

    def split_rows(self, x, kv_heads: int):
        """(B, T, N, ...) -> (rows, B, K, G, block_q, ...)."""
        x = _pad(x, self.rows * self.block_q)
        x = x.reshape(self.batch, self.rows, self.block_q, kv_heads, -1, *x.shape[3:])
        return jnp.moveaxis(x, (1, 2), (0, 4))

    def join_rows(self, x):
        """(rows, B, K, G, block_q, ...) -> (B, T, N, ...)."""
        x = jnp.moveaxis(x, (0, 4), (1, 2))
        return x.reshape(self.batch, -1, self.num_heads, *x.shape[5:])[:, : self.T]

    def pad_keys(self, x):
        """(B, S, K, H) -> (B, K, keys * block_k, H)."""
        return jnp.moveaxis(_pad(x, self.keys * self.block_k), 2, 1)

    def key_tile(self, x, j):
        """Block j of padded keys or values, zero where no query looks."""
        tile = lax.dynamic_slice_in_dim(x, j * self.block_k, self.block_k, 2)
        index = j * self.block_k + jnp.arange(self.block_k, dtype=jnp.int32)
        return jnp.where((index < self.end[:, None])[:, None, :, None], tile, jnp.zeros((), x.dtype))

    def visible(self, i, j):
        """(B, 1, 1, block_q, block_k) bool."""
        row = i * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)[:, None]
        key = j * self.block_k + jnp.arange(self.block_k, dtype=jnp.int32)
        row_segments = key_segments = None
        if self.spans is not None:
            row_segments = lax.dynamic_slice_in_dim(self.row_segments, i * self.block_q, self.block_q, 1)[:, :, None]
            key_segments = lax.dynamic_slice_in_dim(self.key_segments, j * self.block_k, self.block_k, 1)[:, None, :]
        visible = blocks.visible_tile(
            row,
            key,
            num_queries=self.T,
            offset=self.mask.offset,
            length=self.end[:, None, None],
            is_causal=self.mask.is_causal,
            window=self.mask.window,
            row_segments=row_segments,
            key_segments=key_segments,
        )
        return visible[:, None, None]

    def key_range(self, i):
        """[first, last) of the key blocks that any sequence of the batch needs for row block i."""
        if self.keys == 1:
            return 0, 1
        bounds = blocks.key_bounds(
            i * self.block_q,
            self.block_q,
            self.block_k,
            num_queries=self.T,
            offset=self.mask.offset,
            length=self.lengths,
            is_causal=self.mask.is_causal,
            window=self.mask.window,
            segment=None if self.spans is None else tuple(self.spans[:, i].T),
        )
        return jnp.min(bounds.first), jnp.max(bounds.last)

    def dot(self, spec, x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=self.state_dtype, precision=self.precision)

    def scores(self, x, y):
        return self.dot("bkgqh,bksh->bkgqs", x, y)


def _pad(x, size: int):
    return jnp.pad(x, [(0, 0), (0, size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


@functools.partial(jax.jit, static_argnames=("scale", "block_sizes"))
def forward(query, probe, key, value, mask: blocks.Mask, *, scale: float, block_sizes: XlaBlockSizes | None):
    """Returns (out, v_mean, lse, t_mean); see `pallas_kernels.tiles.finish`."""
    cut = _Tiles(query, key, mask, block_sizes)
    k_all, v_all = cut.pad_keys(key), cut.pad_keys(value)
    c = scale * tiles.LOG2_E

    def row_block(args):
        i, q, r = args

        def key_block(j, state):
            k, v = cut.key_tile(k_all, j), cut.key_tile(v_all, j)
            times_value = lambda p: cut.dot("bkgqs,bksh->bkgqh", p.astype(v.dtype), v)
            return tiles.update(state, cut.scores(q, k), cut.scores(r, k), c, cut.visible(i, j), times_value)

        state = tiles.initial_state(q.shape[:-1], value.shape[-1], cut.state_dtype)
        state = lax.fori_loop(*cut.key_range(i), key_block, state)
        out, v_mean, lse, t_mean = tiles.finish(state)
        return out.astype(query.dtype), v_mean.astype(query.dtype), lse, t_mean

    rows = (jnp.arange(cut.rows, dtype=jnp.int32), *(cut.split_rows(x, cut.num_kv_heads) for x in (query, probe)))
    out, v_mean, lse, t_mean = (cut.join_rows(x) for x in lax.map(row_block, rows))
    return out, v_mean, jnp.moveaxis(lse, 2, 1), jnp.moveaxis(t_mean, 2, 1)


@functools.partial(jax.jit, static_argnames=("scale", "block_sizes"))
def backward(
    query,
    probe,
    key,
    value,
    mask: blocks.Mask,
    out,
    v_mean,
    lse,
    t_mean,
    dout,
    *,
    scale: float,
    block_sizes: XlaBlockSizes | None,
):
    """Returns (dquery, dprobe, dkey, dvalue)."""
    cut = _Tiles(query, key, mask, block_sizes)
    k_all, v_all = cut.pad_keys(key), cut.pad_keys(value)
    c = scale * tiles.LOG2_E
    wide = lambda x: x.astype(cut.state_dtype)
    tau = jnp.sum(wide(dout) * wide(out), axis=-1)
    beta = jnp.sum(wide(dout) * wide(v_mean), axis=-1)
    # Rows past T get lse = 0: `visible` hides them.
    stats = [jnp.moveaxis(lse, 1, 2), jnp.moveaxis(t_mean, 1, 2), tau, beta]

    def row_block(carry, args):
        i, q, r, do, *row_stats = args

        def key_block(j, sums):
            dq, dr, dk_all, dv_all = sums
            k, v = cut.key_tile(k_all, j), cut.key_tile(v_all, j)
            s1, s2, a = cut.scores(q, k), cut.scores(r, k), cut.scores(do, v)
            w, ds1, ds2 = tiles.backward_tile(s1, s2, a, c, cut.visible(i, j), *row_stats)
            w, ds1, ds2 = w.astype(dout.dtype), ds1.astype(query.dtype), ds2.astype(query.dtype)
            dk = cut.dot("bkgqs,bkgqh->bksh", ds1, q) * scale + cut.dot("bkgqs,bkgqh->bksh", ds2, r)
            dv = cut.dot("bkgqs,bkgqh->bksh", w, do)
            return (
                dq + cut.dot("bkgqs,bksh->bkgqh", ds1, k),
                dr + cut.dot("bkgqs,bksh->bkgqh", ds2, k),
                _add_tile(dk_all, dk, j * cut.block_k),
                _add_tile(dv_all, dv, j * cut.block_k),
            )

        zero = jnp.zeros(q.shape, cut.state_dtype)
        dq, dr, *carry = lax.fori_loop(*cut.key_range(i), key_block, (zero, zero, *carry))
        return tuple(carry), ((dq * scale).astype(query.dtype), dr.astype(probe.dtype))

    rows = (
        jnp.arange(cut.rows, dtype=jnp.int32),
        *(cut.split_rows(x, cut.num_kv_heads) for x in (query, probe, dout, *stats)),
    )
    zeros = tuple(jnp.zeros(x.shape, cut.state_dtype) for x in (k_all, v_all))
    (dk, dv), (dq, dr) = lax.scan(row_block, zeros, rows)
    dk, dv = (jnp.moveaxis(x, 1, 2)[:, : cut.S] for x in (dk, dv))
    return cut.join_rows(dq), cut.join_rows(dr), dk.astype(key.dtype), dv.astype(value.dtype)


def _add_tile(whole, tile, start):
    old = lax.dynamic_slice_in_dim(whole, start, tile.shape[2], 2)
    return lax.dynamic_update_slice_in_dim(whole, old + tile, start, 2)
