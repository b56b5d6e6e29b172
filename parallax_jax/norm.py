"""RMS norm and rotary embedding as functions: by one kernel on GPUs that pass over memory once, else by XLA."""

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import device
from parallax_jax.sharding import norm_per_device, rows_of_device

Rotation = tuple[Float[Array, "#B T 1 H"], Float[Array, "#B T 1 H"]]
# What a backward pass needs of these functions is recomputed from their inputs: the float32 values between are twice
# the size of those, and cost less to compute again than to keep.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], epsilon: float, rotation: Rotation | None = None
) -> Float[Array, "*B D"]:
    """`x / rms(x) * scale`, rotated where there is a rotation, in the dtype of `x` and computed in float32.

    Args:
      x: (B, T, N, D) with a rotation; any leading axes without.
      scale: gain.
      epsilon: added to the mean square.
      rotation: what `rotary_embedding` returns.
    """
    if not _by_kernel(x):
        return _norm(x, scale, rotation, epsilon)
    (out,) = _kernel_norm(epsilon, False, _with_heads(x), scale, None, rotation)
    return out.reshape(x.shape)


def residual_norm(
    x: Float[Array, "*B D"], branch: Float[Array, "*B D"] | None, scale: Float[Array, " D"], epsilon: float
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """The residual stream with a branch added (None: nothing), and `rms_norm` of it.

    The sum is returned for the backward pass to add the stream's own gradient where it computes the norm's.
    """
    if not _by_kernel(x):
        x = x if branch is None else x + branch
        return x, _norm(x, scale, None, epsilon)
    branch = None if branch is None else _with_heads(branch)
    out, total = _kernel_norm(epsilon, True, _with_heads(x), scale, branch, None)
    return total.reshape(x.shape), out.reshape(x.shape)


@functools.partial(_recomputed, static_argnums=3)
def _norm(x, scale, rotation, epsilon):
    y = x.astype(jnp.float32)
    y *= (jnp.mean(y * y, axis=-1, keepdims=True) + epsilon) ** -0.5
    y *= scale.astype(jnp.float32)
    return (y if rotation is None else _rotate(y, rotation)).astype(x.dtype)


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        return importlib.import_module("pallas_kernels.rms_norm")
    except ImportError:  # JAX has announced that it will drop Pallas' Triton backend
        return None


def _by_kernel(x) -> bool:
    if x.ndim not in (3, 4) or device.target()[0] != "gpu" or _kernels() is None:
        return False
    rows = rows_of_device(_with_heads(x))
    return rows is not None and _kernels().unsupported(rows) is None


def _with_heads(x):
    return x if x.ndim == 4 else x[:, :, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel_norm(epsilon, keep_sum, x, scale, branch, rotation):
    """The norm of `x + branch`, and that sum where it is asked for."""
    kernel = functools.partial(_kernels().forward, epsilon=epsilon)
    total, out = norm_per_device(functools.partial(device.run, kernel), x, scale, rotation, branch)
    return (out, x if branch is None else total) if keep_sum else (out,)


def _kernel_norm_forward(epsilon, keep_sum, x, scale, branch, rotation):
    results = _kernel_norm(epsilon, keep_sum, x, scale, branch, rotation)
    added = None if branch is None else ()  # structure, for a bool would become an array
    return results, (results[1] if keep_sum else x, scale, added, rotation)


def _kernel_norm_backward(epsilon, keep_sum, residuals, gradients):
    x, scale, added, rotation = residuals
    dout, dtotal = gradients if keep_sum else (*gradients, None)
    kernel = functools.partial(_kernels().backward, epsilon=epsilon)
    dx, dscale = norm_per_device(functools.partial(device.run, kernel), x, scale, rotation, dout, dtotal, sums=True)
    return dx, dscale.astype(scale.dtype), None if added is None else dx, None


_kernel_norm.defvjp(_kernel_norm_forward, _kernel_norm_backward)


def rotary_embedding(positions: Int[Array, "#B T"], head_dim: int, theta: float) -> Rotation:
    """Rotary position embedding, rotate-half form: dimension i turns with i + H/2 by `position * theta^(-2i/H)`.

    Args:
      positions: int32 position of each token.
      head_dim: H, even.
      theta: base of the frequencies.

    Returns:
      float32 factors of a dimension and of its partner, for `apply_rope`.
    """
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


@_recomputed
def apply_rope(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotates `x` in float32; the result has its dtype."""
    return _rotate(x.astype(jnp.float32), rotation).astype(x.dtype)


def _rotate(x, rotation):
    own, partner = rotation
    return x * own + jnp.roll(x, x.shape[-1] // 2, -1) * partner
