"""`parallax_attention`: checks, choice of implementation, and the one custom_vjp that all of them share."""

import functools
import importlib
import math
import numbers
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import device
from pallas_kernels.blocks import Mask
from parallax_jax.reference import parallax_reference
from parallax_jax.sharding import attend_per_device

# Name -> (module with `unsupported`, `forward` and `backward`, platforms on which None may choose it), fastest first.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mosaic_gpu": ("pallas_kernels.mosaic_gpu", ("gpu",)),
    "triton": ("pallas_kernels.triton_routes", ("gpu",)),
    "mosaic_tpu": ("pallas_kernels.mosaic_tpu", ("tpu",)),
    "xla": ("parallax_jax.xla", ("cpu", "gpu", "tpu")),
}
MAX_HEAD_DIM = 256

# Names of the residuals, for `jax.checkpoint_policies.save_only_these_names`.
RESIDUAL_NAMES = ("parallax_out", "parallax_v_mean", "parallax_lse", "parallax_t_mean")


def parallax_attention(
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
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    implementation: str | None = None,
    block_sizes: object | None = None,
) -> Float[Array, "B T N Hv"]:
    """Parallax attention: softmax attention minus the covariance of values and keys times the probe.

    With p the softmax weights and t_s = probe . key_s, the output of a row is sum_s p_s (1 - t_s + sum_u p_u t_u) v_s
    (arXiv 2605.29157, eq. 8). A probe of zeros gives softmax attention. A row that sees no key gives zero, and zero
    gradients. Differentiable in query, probe, key and value; gradients have their dtypes and are bitwise the same from
    run to run. Leading batch axes work through `jax.vmap`. Under a mesh (`jax.set_mesh`) every device computes its own
    rows, heads and share of the sequence: see `parallax_jax.sharding`.

    Args:
      query: (B, T, N, H) bfloat16, float16 or float32. float32 is computed in float32 (no TF32) unless
        `jax.default_matmul_precision` asks for less. "reference" and "xla" also take float64.
      probe: (B, T, N, H), query's dtype. The scale does not apply to it.
      key: (B, S, K, H), N divisible by K, query's dtype.
      value: (B, S, K, Hv), query's dtype. H and Hv are at most 256.
      scale: factor on query . key, default H ** -0.5.
      is_causal: query t sees keys s <= t + query_offset.
      query_offset: position of query 0 on the key axis, int or int32 scalar array, default S - T (end-aligned).
      local_window_size: W >= 1, keys s > t + query_offset - W are seen: the W most recent, the diagonal included.
      segment_ids: int32 (B, T), needs T == S; tokens see their own segment only.
      key_value_seq_lengths: int32 (B,); keys from this index on are padding and may hold anything, NaN included.
      implementation: "reference", "xla", "triton", "mosaic_gpu", "mosaic_tpu", or None for the fastest that supports
        the call on this device.
      block_sizes: the implementation's frozen dataclass of `pallas_kernels.block_sizes`; None takes the tuned table.

    Returns:
      (B, T, N, Hv) in query's dtype.

    Raises:
      ValueError: a shape, dtype or value is wrong, or does not divide among the mesh's devices; the message names the
        argument, what came and what is allowed.
      NotImplementedError: the explicit `implementation` cannot run this call; the message says why.
    """
    query, probe, key, value = (jnp.asarray(x) for x in (query, probe, key, value))
    check_operands(query, probe, key, value, key_name="key", value_name="value")
    batch, num_queries, _, head_dim = query.shape
    num_keys = key.shape[1]
    scale = check_scale(scale, head_dim)
    check_window(local_window_size)
    end_aligned = query_offset is None
    if end_aligned:
        query_offset = num_keys - num_queries
    if segment_ids is not None:
        segment_ids = check_int32("segment_ids", segment_ids, (batch, num_queries))
        if num_queries != num_keys:
            raise ValueError(f"segment_ids: needs as many queries as keys, got T = {num_queries}, S = {num_keys}")
    if key_value_seq_lengths is not None:
        key_value_seq_lengths = check_int32("key_value_seq_lengths", key_value_seq_lengths, (batch,))

    mask = Mask(
        check_int32("query_offset", query_offset, ()),
        key_value_seq_lengths,
        segment_ids,
        bool(is_causal),
        local_window_size,
        end_aligned=end_aligned,
    )
    one = functools.partial(attend, implementation, scale, block_sizes)
    return attend_per_device(one, query, probe, key, value, mask)


def attend(implementation, scale, block_sizes, query, probe, key, value, mask: Mask):
    """`parallax_attention` of checked operands on one device; segments of queries and of keys may differ."""
    if implementation == "reference":
        if block_sizes is not None:
            raise NotImplementedError("block_sizes: implementation 'reference' has no blocks")
        return parallax_reference(
            query,
            probe,
            key,
            value,
            scale=scale,
            is_causal=mask.is_causal,
            query_offset=mask.offset,
            local_window_size=mask.window,
            segment_ids=mask.segment_ids,
            key_segment_ids=mask.key_segment_ids,
            key_value_seq_lengths=mask.lengths,
        )
    name = choose(BACKENDS, implementation, query, probe, key, value, mask, scale=scale, block_sizes=block_sizes)
    return _attention(name, scale, block_sizes, query, probe, key, value, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(name, scale, block_sizes, query, probe, key, value, mask):
    out, *_ = load(BACKENDS[name][0]).forward(query, probe, key, value, mask, scale=scale, block_sizes=block_sizes)
    return out


def _attention_forward(name, scale, block_sizes, query, probe, key, value, mask):
    backend = load(BACKENDS[name][0])
    results = backend.forward(query, probe, key, value, mask, scale=scale, block_sizes=block_sizes)
    results = tuple(checkpoint_name(x, label) for x, label in zip(results, RESIDUAL_NAMES, strict=True))
    return results[0], (query, probe, key, value, mask, *results)


def _attention_backward(name, scale, block_sizes, residuals, dout):
    grads = load(BACKENDS[name][0]).backward(*residuals, dout, scale=scale, block_sizes=block_sizes)
    return (*grads, None)


_attention.defvjp(_attention_forward, _attention_backward)


@functools.cache
def load(module: str) -> ModuleType:
    """Imports a backend on first use."""
    return importlib.import_module(module)


def choose(backends: dict, implementation: str | None, *operands, **options) -> str:
    """Returns the name of the implementation that runs this call.

    Args:
      backends: name -> (module, platforms), fastest first. A module may have `outrun`, which says of a call that it
        supports why a later backend is faster, or None.
      implementation: a name of `backends`, or None for the first that takes the call on the device traced for.
      *operands: handed to the backend's `unsupported`.
      **options: handed to the backend's `unsupported`.

    Raises:
      ValueError: no such implementation.
      NotImplementedError: the named implementation, or every one for None, refuses the call.
    """
    platform, _ = device.target()
    if implementation is None:
        candidates = [name for name, (_, platforms) in backends.items() if platform in platforms]
    elif implementation in backends:
        candidates = [implementation]
    else:
        allowed = ", ".join(repr(name) for name in ("reference", *backends))
        raise ValueError(f"implementation: got {implementation!r}, allowed are {allowed} and None")
    reasons = []
    for name in candidates:
        try:
            module = load(backends[name][0])
            reason = module.unsupported(*operands, **options)
            if reason is None and implementation is None and hasattr(module, "outrun"):
                reason = module.outrun(*operands)
        except ImportError as error:
            reason = f"implementation: {error}"
        if reason is None:
            return name
        reasons.append(f"implementation {name!r} cannot run this call: {reason}")
    raise NotImplementedError("; ".join(reasons))


def check_operands(query, probe, key, value, *, key_name: str, value_name: str, paged: bool = False) -> None:
    """Raises ValueError unless shapes and dtypes of the four operands fit together.

    Keys and values are (B, S, K, ...), or (num_pages, page_size, K, ...) where `paged`.
    """
    operands = {"query": query, "probe": probe, key_name: key, value_name: value}
    for name, x in operands.items():
        if x.ndim != 4:
            raise ValueError(f"{name}: needs 4 axes, got shape {x.shape}")
        if 0 in x.shape:
            raise ValueError(f"{name}: every axis must be at least 1, got shape {x.shape}")
        if x.dtype != query.dtype:
            raise ValueError(f"{name}: needs query's dtype {query.dtype}, got {x.dtype}")
    if query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        raise ValueError(f"query: dtype must be bfloat16, float16 or float32, got {query.dtype}")
    batch, _, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    if probe.shape != query.shape:
        raise ValueError(f"probe: needs query's shape {query.shape}, got {probe.shape}")
    leading = key.shape[0] if paged else batch
    if (key.shape[0], key.shape[3]) != (leading, head_dim):
        raise ValueError(f"{key_name}: needs shape ({leading}, S, K, {head_dim}) to fit query, got {key.shape}")
    if value.shape[:3] != key.shape[:3]:
        needed = f"({leading}, {num_keys}, {num_kv_heads}, Hv)"
        raise ValueError(f"{value_name}: needs shape {needed} to fit {key_name}, got {value.shape}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{key_name}: {num_kv_heads} heads do not divide query's {num_heads} heads")
    for name, size in (("query", head_dim), (value_name, value.shape[3])):
        if size > MAX_HEAD_DIM:
            raise ValueError(f"{name}: head width is at most {MAX_HEAD_DIM}, got {size}")


def check_scale(scale, head_dim: int) -> float:
    """Returns the scale as a float, or raises ValueError."""
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale: must be a finite Python number or None, got {scale!r}")
    return float(scale)


def check_window(local_window_size) -> None:
    """Raises ValueError unless the window is None or an int >= 1."""
    if local_window_size is None:
        return
    if isinstance(local_window_size, bool) or not isinstance(local_window_size, int) or local_window_size < 1:
        raise ValueError(f"local_window_size: must be an int >= 1 or None, got {local_window_size!r}")


def check_int32(name: str, x, shape: tuple[int, ...]) -> jax.Array:
    """Returns `x` as an int32 array of `shape`, or raises ValueError. Python ints and numpy arrays are converted."""
    array = jnp.asarray(x, jnp.int32) if isinstance(x, int | np.integer) and not isinstance(x, bool) else jnp.asarray(x)
    if array.dtype != jnp.int32 or array.shape != shape:
        raise ValueError(f"{name}: must be int32 of shape {shape}, got {array.dtype} of shape {array.shape}")
    return array
