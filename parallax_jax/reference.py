"""The definition of Parallax attention, dense and differentiable by JAX. Every implementation is judged against it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def _visible(
    num_queries: int,
    num_keys: int,
    is_causal: bool,
    query_offset: int | Int[Array, ""] | None,
    local_window_size: int | None,
    segment_ids: Int[Array, "B T"] | None,
    key_segment_ids: Int[Array, "B S"] | None,
    key_value_seq_lengths: Int[Array, " B"] | None,
) -> Bool[Array, "#B T S"]:
    offset = num_keys - num_queries if query_offset is None else query_offset
    position = jnp.arange(num_queries, dtype=jnp.int32)[:, None] + offset
    key = jnp.arange(num_keys, dtype=jnp.int32)
    visible = jnp.ones((1, num_queries, num_keys), bool)
    if is_causal:
        visible &= key <= position
    if local_window_size is not None:
        visible &= position - key < local_window_size
    if segment_ids is not None:
        key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
        visible &= segment_ids[:, :, None] == key_segment_ids[:, None, :]
    if key_value_seq_lengths is not None:
        visible &= key < key_value_seq_lengths[:, None, None]
    return visible


def parallax_reference(
    query: Float[Array, "B T N H"],
    probe: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    scale: float | None = None,
    is_causal: bool = True,
    query_offset: int | Int[Array, ""] | None = None,
    local_window_size: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N Hv"]:
    r"""Softmax attention minus the covariance of values and keys times the probe, written as it is defined.

    With p the softmax weights of row t over its visible keys, `v_mean = sum_s p_s v_s` and `k_mean = sum_s p_s k_s`,

        out_t = v_mean - (sum_s p_s (v_s - v_mean) (k_s - k_mean)^T) probe_t

    (arXiv 2605.29157, eq. 8). Memory grows with T x S. Computed in float64 for float64 inputs, else in float32 at the
    highest matmul precision. A row that sees no key is zero, and so are its gradients.

    Args:
      query: (B, T, N, H) queries.
      probe: (B, T, N, H) probes; the scale does not apply to them.
      key: (B, S, K, H) keys, N divisible by K.
      value: (B, S, K, Hv) values.
      scale: factor on query . key, default H ** -0.5.
      is_causal: query t sees keys s <= t + query_offset.
      query_offset: position of query 0 on the key axis, default S - T.
      local_window_size: number of most recent keys seen, the diagonal included.
      segment_ids: tokens see their own segment only; needs T == S, or `key_segment_ids`.
      key_segment_ids: segments of the keys; None for those of the queries.
      key_value_seq_lengths: keys from this index on are padding and may hold anything.

    Returns:
      (B, T, N, Hv) in query's dtype.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    dtype = jnp.dtype("float64" if query.dtype == jnp.float64 else "float32")
    scale = head_dim**-0.5 if scale is None else scale
    segments = segment_ids, key_segment_ids
    visible = _visible(
        num_queries, num_keys, is_causal, query_offset, local_window_size, *segments, key_value_seq_lengths
    )

    # Keys nobody may see are zeroed, so that NaN in padding meets no product.
    used = visible.any(1)[:, :, None, None]
    k = jnp.where(used, key, 0).astype(dtype)
    v = jnp.where(used, value, 0).astype(dtype)
    grouped = (batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q, r = (x.astype(dtype).reshape(grouped) for x in (query, probe))

    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * scale
        mask = jnp.broadcast_to(visible[:, None, None], scores.shape)
        # Rows without a key take the softmax of zeros and lose it in the second `where`: no NaN in value or gradient.
        seen = mask.any(-1, keepdims=True)
        p = jnp.where(mask & seen, jax.nn.softmax(jnp.where(mask | ~seen, scores, -jnp.inf), axis=-1), 0.0)
        t = jnp.einsum("btkgh,bskh->bkgts", r, k)
        # Cov(v, k) r = sum_s p_s (t_s - t_mean) v_s: the centring of v drops out, that of k is kept for accuracy.
        t = t - jnp.sum(p * t, axis=-1, keepdims=True)
        out = jnp.einsum("bkgts,bskh->btkgh", p * (1.0 - t), v)
    return out.reshape(batch, num_queries, num_heads, value.shape[-1]).astype(query.dtype)
