"""`parallax_decode`: a few new tokens against a key/value cache. Checks and choice of implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import Mask
from parallax_jax.attention import check_int32, check_operands, check_scale, check_window, choose, load
from parallax_jax.reference import parallax_reference
from parallax_jax.sharding import decode_per_device

# Name -> (module with `unsupported` and `decode`, platforms on which None may choose it), fastest first.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mosaic_gpu": ("pallas_kernels.mosaic_gpu.decode", ("gpu",)),
    "triton": ("pallas_kernels.triton_routes.decode", ("gpu",)),
    "mosaic_tpu": ("pallas_kernels.mosaic_tpu.decode", ("tpu",)),
    "xla": ("parallax_jax.xla_decode", ("cpu", "gpu", "tpu")),
}


def parallax_decode(
    query: Float[Array, "B T N H"],
    probe: Float[Array, "B T N H"],
    key_cache: Float[Array, "B S K H"],
    value_cache: Float[Array, "B S K Hv"],
    lengths: Int[Array, " B"],
    *,
    scale: float | None = None,
    local_window_size: int | None = None,
    page_table: Int[Array, "B P"] | None = None,
    implementation: str | None = None,
    block_sizes: object | None = None,
) -> Float[Array, "B T N Hv"]:
    """Parallax attention of the T newest tokens of each sequence to everything in its cache, their own keys included.

    The new tokens are the last T of `lengths[b]` valid keys: query t sits at position lengths[b] - T + t and sees the
    keys up to its own (arXiv 2605.29157, eq. 8, appendix C). T is 1 for a plain step, a few for speculative decoding, a
    chunk for prefill. A query at a negative position, so any query of a sequence of length 0, gives zero. What lies in
    the cache past `lengths`, or in pages that no sequence owns, may be anything, NaN included. New lengths never
    recompile. Under a mesh (`jax.set_mesh`) every device computes its own sequences and heads: see
    `parallax_jax.sharding`.

    Args:
      query: (B, T, N, H) bfloat16, float16 or float32 ("reference" and "xla" also take float64).
      probe: (B, T, N, H), query's dtype; a probe is never cached.
      key_cache: (B, S, K, H), N divisible by K, query's dtype. With a page table (num_pages, page_size, K, H).
      value_cache: (B, S, K, Hv), or (num_pages, page_size, K, Hv).
      lengths: int32 (B,), valid keys of each sequence, the T new ones included; at most the cache's capacity.
      scale: factor on query . key, default H ** -0.5; does not apply to the probe.
      local_window_size: W >= 1, the most recent keys that a query sees, its own included.
      page_table: int32 (B, pages_per_sequence): key s of sequence b is row s % page_size of page
        page_table[b, s // page_size]. Entries past a sequence's length are not used.
      implementation: "reference", "xla", "triton", "mosaic_gpu", "mosaic_tpu", or None for the fastest that supports
        the call on this device.
      block_sizes: the implementation's frozen dataclass of `pallas_kernels.block_sizes`; None for its choice.

    Returns:
      (B, T, N, Hv) in query's dtype.

    Raises:
      ValueError: a shape, dtype or value is wrong. Lengths and page ids are checked where they are known, outside jit;
        inside, a length over the capacity counts as the capacity and a page id is clipped to the pages there are. Heads
        must divide among the mesh's devices.
      NotImplementedError: the explicit `implementation` cannot run this call; the message says why.
    """
    query, probe, key_cache, value_cache = (jnp.asarray(x) for x in (query, probe, key_cache, value_cache))
    lengths = check_int32("lengths", lengths, (query.shape[0],))
    scale = check_scale(scale, query.shape[-1])
    check_window(local_window_size)
    if page_table is not None:
        page_table = jnp.asarray(page_table)
    _check_cache(query, probe, key_cache, value_cache, lengths, page_table)
    return decode_at(
        query,
        probe,
        key_cache,
        value_cache,
        Mask(None, lengths, window=local_window_size),
        page_table,
        scale=scale,
        implementation=implementation,
        block_sizes=block_sizes,
    )


def decode_at(
    query, probe, key_cache, value_cache, mask: Mask, page_table=None, *, scale, implementation=None, block_sizes=None
):
    """`parallax_decode` of checked operands, where `mask.offset` (B,) may say at which position the queries start.

    None stands for `mask.lengths` - T. A chunk whose last tokens are padding starts later.
    """

    def decode(*operands):
        if implementation == "reference":
            if block_sizes is not None:
                raise NotImplementedError("block_sizes: implementation 'reference' has no blocks")
            return _reference(*operands, scale)
        options = {"scale": scale, "block_sizes": block_sizes}
        name = choose(BACKENDS, implementation, *operands, **options)
        return load(BACKENDS[name][0]).decode(*operands, **options)

    return decode_per_device(decode, query, probe, key_cache, value_cache, mask, page_table)


def _reference(query, probe, key, value, mask: Mask, page_table, scale):
    if page_table is not None:
        key, value = (jnp.take(x, page_table, axis=0, mode="clip") for x in (key, value))
        key, value = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (key, value))

    def one(offset, length, *operands):
        return parallax_reference(
            *(x[None] for x in operands),
            scale=scale,
            query_offset=offset,
            key_value_seq_lengths=length[None],
            local_window_size=mask.window,
        )[0]

    lengths = jnp.minimum(mask.lengths, key.shape[1])
    offset = lengths - query.shape[1] if mask.offset is None else mask.offset
    return jax.vmap(one)(offset, lengths, query, probe, key, value)


def _check_cache(query, probe, key_cache, value_cache, lengths, page_table) -> None:
    """Raises ValueError unless the cache fits the queries and what is known of its indices is in range."""
    paged = page_table is not None
    check_operands(query, probe, key_cache, value_cache, key_name="key_cache", value_name="value_cache", paged=paged)
    num_pages, page_size = key_cache.shape[:2]
    if paged and (page_table.ndim != 2 or page_table.shape[0] != query.shape[0] or page_table.dtype != jnp.int32):
        got = f"{page_table.dtype} of shape {page_table.shape}"
        raise ValueError(f"page_table: must be int32 of shape ({query.shape[0]}, pages_per_sequence), got {got}")
    capacity = page_size * (page_table.shape[1] if paged else 1)
    if isinstance(lengths, jax.core.Tracer):
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > capacity:
        raise ValueError(f"lengths: must lie in [0, {capacity}], the cache's capacity, got {low} to {high}")
    if paged and not isinstance(page_table, jax.core.Tracer):
        used = jnp.arange(page_table.shape[1]) * page_size < lengths[:, None]
        bad = page_table[used & ((page_table < 0) | (page_table >= num_pages))]
        if bad.size:
            raise ValueError(f"page_table: page ids must lie in [0, {num_pages - 1}], got {bad[0]}")
