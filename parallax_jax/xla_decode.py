"""Decode in blockwise jnp, on any device: work follows the longest sequence, not the cache's capacity."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import blocks, tiles
from pallas_kernels.block_sizes import XlaBlockSizes


def unsupported(query, probe, key, value, mask, page_table, *, scale, block_sizes) -> str | None:
    """Why this backend cannot run the call, or None."""
    if block_sizes is not None and not isinstance(block_sizes, XlaBlockSizes):
        return f"block_sizes: needs XlaBlockSizes, got {type(block_sizes).__name__}"
    return None


def decode(query, probe, key, value, mask: blocks.Mask, page_table, *, scale, block_sizes):
    """Returns the output (B, T, N, Hv); `mask.lengths` is (B,), `mask.offset` (B,) or None for lengths - T."""
    batch, num_queries, num_heads, head_dim = query.shape
    page_size, num_kv_heads = key.shape[1:3]
    block_k = (block_sizes or XlaBlockSizes()).block_k
    if page_table is None:
        num_keys = page_size
        block_k = min(block_k, num_keys)
    else:
        pages = max(1, block_k // page_size)
        num_keys, block_k = page_table.shape[1] * page_size, pages * page_size
        page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))
    wide = jnp.dtype("float64" if query.dtype == jnp.float64 else "float32")
    dot = lambda spec, x, y: jnp.einsum(
        spec, x, y, preferred_element_type=wide, precision=tiles.dot_precision(query.dtype)
    )

    def tile(x, j):
        if page_table is None:
            return lax.dynamic_slice_in_dim(x, first_key(j), block_k, 1)
        ids = lax.dynamic_slice_in_dim(page_table, j * pages, pages, 1)
        return jnp.take(x, ids, axis=0, mode="clip").reshape(batch, block_k, *x.shape[2:])

    def first_key(j):
        # The last slice of a cache that is no whole number of blocks starts early; `again` hides what it repeats.
        return jnp.minimum(j * block_k, num_keys - block_k) if page_table is None else j * block_k

    grouped = (batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q, r = (x.reshape(grouped) for x in (query, probe))
    length = jnp.minimum(mask.lengths, num_keys)
    sight = {
        "offset": length - num_queries if mask.offset is None else mask.offset,
        "length": length,
        "is_causal": True,
        "window": mask.window,
    }
    bounds = blocks.key_bounds(0, num_queries, block_k, num_queries=num_queries, **sight)
    first = jnp.broadcast_to(bounds.first, (batch,))
    sight |= {name: sight[name][:, None, None] for name in ("offset", "length")}
    end = blocks.visible_end(sight["offset"], num_queries, sight["length"], True)
    row = jnp.arange(num_queries)[:, None]

    def step(j, state):
        key_index = first_key(j) + jnp.arange(block_k)
        again = key_index < j * block_k
        visible = ~again & blocks.visible_tile(row, key_index, num_queries=None, **sight)
        used = (key_index < end[:, 0]) & ~again
        k, v = (jnp.where(used[..., None, None], tile(x, j), jnp.zeros((), x.dtype)) for x in (key, value))
        s1, s2 = (dot("btkgh,bskh->bkgts", x, k) for x in (q, r))
        times_value = lambda p: dot("bkgts,bskh->bkgth", p.astype(v.dtype), v)
        return tiles.update(state, s1, s2, scale * tiles.LOG2_E, visible[:, None, None], times_value)

    rows = (batch, num_kv_heads, num_heads // num_kv_heads, num_queries)
    state = tiles.initial_state(rows, value.shape[3], wide)
    state = lax.fori_loop(jnp.min(first), jnp.max(bounds.last), step, state)
    out = jnp.moveaxis(tiles.finish(state)[0], 3, 1)
    return out.reshape(batch, num_queries, num_heads, value.shape[3]).astype(query.dtype)
