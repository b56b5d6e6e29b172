"""Root-mean-square norm, with the sum before it and the rotation after it: one reading and one writing of memory.

Memory-bound: XLA reads the rows once for the mean square and once more to apply it, and in the backward pass likewise.
Rows are (R, N, H): R tokens of N heads, or of N = 1 for a norm over the residual stream. A program holds the two halves
of its rows apart, for the rotation turns one against the other. All but arrays in memory is float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

ELEMENTS = 2048  # of each array that a program of 4 warps holds at once: 16 a thread
STEPS = 16  # tiles that a program of the backward pass takes, which adds up their gradients of the gain


def unsupported(x: Array) -> str | None:
    """Why these kernels cannot norm the rows of a (B, T, N, H) array, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"needs bfloat16, float16 or float32, got {x.dtype}"
    if x.shape[-1] & (x.shape[-1] - 1) or not 32 <= x.shape[-1] <= 8192:
        return f"needs rows of a power of two from 32 to 8192, got {x.shape[-1]}"
    if x.shape[1] % 16:
        return f"needs a multiple of 16 tokens, got {x.shape[1]}"
    return None


def _power_of_two_in(size: int) -> int:
    return size & -size


def _tile(shape) -> tuple[int, int]:
    """Tokens and heads of a tile."""
    rows = max(1, ELEMENTS // shape[3])
    heads = min(rows, _power_of_two_in(shape[2]))
    return min(rows // heads, _power_of_two_in(shape[1])), heads


def _load(ref, tokens=slice(None)):
    """The two halves of a tile of rows, in float32."""
    half = ref.shape[-1] // 2
    return [ref[tokens, ..., part].astype(jnp.float32) for part in (slice(0, half), slice(half, 2 * half))]


def _store(ref, halves, tokens=slice(None)):
    half = ref.shape[-1] // 2
    for part, x in zip((slice(0, half), slice(half, 2 * half)), halves, strict=True):
        ref[tokens, ..., part] = x.astype(ref.dtype)


def _mean(a, b):
    """The mean over rows of the product of two pairs of halves."""
    total = sum(jnp.sum(x * y, axis=-1, keepdims=True) for x, y in zip(a, b, strict=True))
    return total / (2 * a[0].shape[-1])


def _angles(rotation_refs, tokens=slice(None)):
    """Cosines and sines of a tile's tokens, (tokens, 1, H / 2)."""
    own, partner = rotation_refs
    half = own.shape[-1] // 2
    return own[tokens, :half][:, None], partner[tokens, half:][:, None]


def _forward_kernel(x_ref, scale_ref, branch_ref, rotation_refs, sum_ref, out_ref, *, epsilon):
    x = _load(x_ref)
    if branch_ref is not None:
        x = [(a + b).astype(sum_ref.dtype) for a, b in zip(x, _load(branch_ref), strict=True)]
        _store(sum_ref, x)
        x = [a.astype(jnp.float32) for a in x]  # rounded as the sum is
    factor = lax.rsqrt(_mean(x, x) + epsilon)
    a, b = (h * factor * scale for h, scale in zip(x, _load(scale_ref), strict=True))
    if rotation_refs is not None:
        cos, sin = _angles(rotation_refs)
        a, b = a * cos - b * sin, b * cos + a * sin
    _store(out_ref, (a, b))


def _backward_kernel(x_ref, scale_ref, dout_ref, dsum_ref, rotation_refs, dx_ref, dscale_ref, *, epsilon, tokens):
    scale = _load(scale_ref)

    def step(i, dscale):
        at = pl.ds(i * tokens, tokens)
        x, (da, db) = _load(x_ref, at), _load(dout_ref, at)
        if rotation_refs is not None:
            cos, sin = _angles(rotation_refs, at)
            da, db = da * cos + db * sin, db * cos - da * sin
        factor = lax.rsqrt(_mean(x, x) + epsilon)
        normed = [h * factor for h in x]
        dscale = [total + d * h for total, d, h in zip(dscale, (da, db), normed, strict=True)]
        dnormed = [d * s for d, s in zip((da, db), scale, strict=True)]
        along = _mean(dnormed, normed)
        dx = [factor * (d - h * along) for d, h in zip(dnormed, normed, strict=True)]
        if dsum_ref is not None:
            dx = [d + e for d, e in zip(dx, _load(dsum_ref, at), strict=True)]
        _store(dx_ref, dx, at)
        return dscale

    zeros = jnp.zeros((tokens, x_ref.shape[1], x_ref.shape[2] // 2), jnp.float32)
    dscale = lax.fori_loop(0, x_ref.shape[0] // tokens, step, [zeros, zeros])
    _store(dscale_ref, [jnp.sum(d, axis=(0, 1))[None] for d in dscale])


def _specs(shape, tokens: int, heads: int, rotation):
    """The grid, and blocks of rows, of the gain and of the rotation."""
    groups = shape[2] // heads
    rows = pl.BlockSpec((tokens, heads, shape[3]), lambda p: (p // groups, p % groups, 0))
    gain = pl.BlockSpec((1, shape[3]), lambda p: (0, 0))
    if rotation is not None:
        count = rotation[0].shape[0] // tokens  # one row of a batch may serve them all
        rotation = (pl.BlockSpec((tokens, shape[3]), lambda p: (p // groups % count, 0)),) * 2
    return (shape[0] * shape[1] // tokens * groups,), rows, gain, rotation


def _flat(x, *trailing: int):
    return None if x is None else x.reshape(-1, *trailing)


def forward(
    x: Float[Array, "B T N H"],
    scale: Float[Array, " H"],
    rotation: tuple[Float[Array, "#B T 1 H"], Float[Array, "#B T 1 H"]] | None,
    branch: Float[Array, "B T N H"] | None,
    *,
    epsilon: float,
    interpret: bool,
) -> tuple[Float[Array, "B T N H"] | None, Float[Array, "B T N H"]]:
    """Returns `x + branch` (None without a branch), and that sum normed, times the gain, then rotated.

    The rotation is that of `parallax_jax.norm.rotary_embedding`: in float32 the cosines and the sines of the tokens.
    """
    *_, heads, width = shape = x.shape
    rotation = None if rotation is None else tuple(_flat(r, width) for r in rotation)
    grid, rows, gain, angles = _specs(shape, *_tile(shape), rotation)
    out = jax.ShapeDtypeStruct((shape[0] * shape[1], heads, width), x.dtype)
    summed = branch is not None
    total, y = pl.pallas_call(
        functools.partial(_forward_kernel, epsilon=epsilon),
        out_shape=(out if summed else None, out),
        grid=grid,
        in_specs=(rows, gain, rows if summed else None, angles),
        out_specs=(rows if summed else None, rows),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rms_norm_forward",
    )(_flat(x, heads, width), scale[None], _flat(branch, heads, width), rotation)
    return total.reshape(shape) if summed else None, y.reshape(shape)


def backward(
    x: Float[Array, "B T N H"],
    scale: Float[Array, " H"],
    rotation: tuple[Float[Array, "#B T 1 H"], Float[Array, "#B T 1 H"]] | None,
    dout: Float[Array, "B T N H"],
    dsum: Float[Array, "B T N H"] | None,
    *,
    epsilon: float,
    interpret: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, " H"]]:
    """Gradients of what was normed, `dsum` included where it is given, and of the gain, in float32.

    Args:
      x: what was normed: the sum, where there was a branch.
      scale: the gain.
      rotation: as in `forward`.
      dout: gradient of the result.
      dsum: gradient of `x` from elsewhere.
      epsilon: as in `forward`.
      interpret: run in Pallas' interpreter.
    """
    *_, heads, width = shape = x.shape
    rotation = None if rotation is None else tuple(_flat(r, width) for r in rotation)
    tokens, group = _tile(shape)
    grid, rows, gain, angles = _specs(shape, min(STEPS * tokens, _power_of_two_in(shape[1])), group, rotation)
    dx, dscale = pl.pallas_call(
        functools.partial(_backward_kernel, epsilon=epsilon, tokens=tokens),
        out_shape=(
            jax.ShapeDtypeStruct((shape[0] * shape[1], heads, width), x.dtype),
            jax.ShapeDtypeStruct((*grid, width), jnp.float32),
        ),
        grid=grid,
        in_specs=(rows, gain, rows, None if dsum is None else rows, angles),
        out_specs=(rows, pl.BlockSpec((1, width), lambda p: (p, 0))),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rms_norm_backward",
    )(_flat(x, heads, width), scale[None], _flat(dout, heads, width), _flat(dsum, heads, width), rotation)
    return dx.reshape(shape), jnp.sum(dscale, axis=0)
