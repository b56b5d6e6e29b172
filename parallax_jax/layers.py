"""The Parallax attention layer in flax.linen, with the RMSNorm and rotary embedding it uses."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import device
from pallas_kernels.blocks import Mask
from parallax_jax.attention import parallax_attention
from parallax_jax.cache import KVCache
from parallax_jax.estimators import DEFAULT_SOLVER, ESTIMATORS, Solver, local_estimator
from parallax_jax.norm import Rotation, apply_rope, residual_norm, rms_norm, rotary_embedding
from parallax_jax.sharding import attend_per_device, splits_sequence

INIT_STD = 0.02


def kernel_init(axes: tuple[str, ...], std: float = INIT_STD):
    """Normal initialiser whose parameter carries the logical axis names `axes`."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def bias_init(axes: tuple[str, ...]):
    """Zero initialiser whose parameter carries the logical axis names `axes`."""
    return nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)


def _cast_input_only(x, kernel, bias, *, dtype):
    """`promote_dtype` of a projection: `_dot_general` casts the kernel."""
    return x.astype(dtype), kernel, None if bias is None else bias.astype(dtype)


def _dot_general(x: Array, kernel: Array, dimension_numbers, precision=None) -> Array:
    """Product of the last axes of `x` with the first of `kernel`, in the dtype of `x`; on a GPU a row gets company.

    XLA turns a vector's product with a matrix into elementwise products, which it writes out before it sums them.
    """
    num_axes = len(dimension_numbers[0][0])
    if math.prod(x.shape[:-num_axes]) > 1 or device.target()[0] != "gpu":
        return _project(num_axes, x, kernel)
    return _project(num_axes, jnp.pad(x, [(0, 15)] + [(0, 0)] * (x.ndim - 1)), kernel)[:1]


def _product(num_axes, x, kernel):
    return jnp.tensordot(x, kernel.astype(x.dtype), num_axes)


_project = jax.custom_vjp(_product, nondiff_argnums=(0,))


def _project_forward(num_axes, x, kernel):
    return _product(num_axes, x, kernel), (x, kernel)  # not the cast kernel: memory for every layer


def _project_backward(num_axes, residuals, dout):
    x, kernel = residuals
    rows, features = range(x.ndim - num_axes), kernel.ndim - num_axes
    along_features = (range(dout.ndim - features, dout.ndim), range(num_axes, kernel.ndim))
    dx = lax.dot_general(dout, kernel.astype(dout.dtype), (along_features, ((), ())))
    # In the kernel's dtype, so that neither this sum nor those over devices and parts of the batch round to bfloat16.
    dkernel = lax.dot_general(x, dout, ((rows, rows), ((), ())), preferred_element_type=kernel.dtype)
    return dx, dkernel


_project.defvjp(_project_forward, _project_backward)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned gain, computed in float32.

    Attributes:
      epsilon: added to the mean square.
      scale_init: initial gain.
      param_dtype: dtype of the gain.
    """

    epsilon: float = 1e-6
    scale_init: float = 1.0
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], rotation: Rotation | None = None) -> Float[Array, "*B D"]:
        """Returns `x / rms(x) * scale`, rotated where there is a rotation, in the dtype of `x`."""
        return rms_norm(x, self._scale(x), self.epsilon, rotation)

    def _scale(self, x):
        init = nn.with_logical_partitioning(nn.initializers.constant(self.scale_init), ("norm",))
        return self.param("scale", init, x.shape[-1:], self.param_dtype)


class ResidualNorm(RMSNorm):
    """`RMSNorm` of the residual stream after a branch is added to it: one pass over memory, backward too."""

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], branch: Float[Array, "*B D"] | None = None) -> tuple[Array, Array]:
        """Returns `x + branch`, or `x` without a branch, and the norm of that."""
        return residual_norm(x, branch, self._scale(x), self.epsilon)


def cudnn_runs(query: Array, segment_ids: Array | None, *, implementation: str | None, **_) -> bool:
    """Whether softmax attention is left to cuDNN, the fastest for it: on a GPU, where it can, unless another is named.

    Raises:
      NotImplementedError: "cudnn" is named and cannot run the call.
    """
    if implementation not in (None, "cudnn"):
        return False
    reasons = {
        f"runs on GPUs, not on {device.target()[0]}": device.target()[0] != "gpu",
        "needs segment_ids=None": segment_ids is not None,
        "needs whole rows on each device": splits_sequence(query),
        f"needs bfloat16 or float16, got {query.dtype}": query.dtype not in (jnp.bfloat16, jnp.float16),
        f"needs a multiple of 8 up to 128 as head_dim, got {query.shape[-1]}": query.shape[-1] % 8
        or query.shape[-1] > 128,
    }
    refused = [reason for reason, holds in reasons.items() if holds]
    if implementation == "cudnn" and refused:
        raise NotImplementedError(f"implementation 'cudnn' cannot run this call: it {refused[0]}")
    return not refused


class ParallaxAttention(nn.Module):
    """Multi-head Parallax attention (arXiv 2605.29157, eq. 8): softmax attention minus a covariance term.

    A probe, a second query from its own projection, tilts the softmax weights: `p (1 - t + sum p t)` with
    `t = probe . key`. Query, probe and key are normed, then rotated. `attention="softmax"` has no probe and is the
    plain softmax baseline. The probe has the query's heads and is never cached. The other estimators have no cache;
    where the weights are uniform the query is the probe.

    Kernels start normal with standard deviation 0.02 (the paper gives none), the probe's included: a zero projection
    under a norm would have no usable gradient. To start from softmax attention set `probe_norm_init=0`.

    Attributes:
      num_heads: query heads N.
      num_kv_heads: key/value heads K; divides N.
      head_dim: width H of a head; even; independent of D / N.
      attention: "parallax", "softmax", or another of `estimators.ESTIMATORS`, such as "lla" or "linear".
      solver: how "lla", "mesa" and "affine_mesa" find their probe.
      probe_rope: rotate the probe with the query's angles.
      probe_norm: norm the probe.
      probe_norm_init: initial gain of the probe's norm; 0 is softmax attention at the start.
      probe_gate: multiply each head's probe by a gate, sigmoid of a linear function of the layer's input.
      qk_norm: norm query and key.
      use_bias: give every projection a bias; "qkv": all but the output's.
      local_window_size: most recent keys seen, the diagonal included; None for all.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of the norms of query, probe and key.
      out_init_std: initial standard deviation of the output projection.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
      implementation: passed to `parallax_attention` and, with a cache, to `parallax_decode`. For softmax also "cudnn",
        which None takes on a GPU where it can: half precision, no segment ids, no cache, sequences not split.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention: str = "parallax"
    solver: Solver = DEFAULT_SOLVER
    probe_rope: bool = True
    probe_norm: bool = True
    probe_norm_init: float = 1.0
    probe_gate: bool = False
    qk_norm: bool = True
    use_bias: bool | str = False
    local_window_size: int | None = None
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    out_init_std: float = INIT_STD
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        num_new: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends causally within `x`, and with a cache to what came before.

        Args:
          x: inputs.
          positions: position of each token for the rotary embedding; None for 0 to T - 1, with a cache on from its
            lengths. It hides nothing.
          segment_ids: tokens see their own segment only; None for one segment. Not with a cache.
          cache: this layer's keys and values so far.
          num_new: with a cache, how many tokens of each row are real, the rest being padding at its end; None for all.

        Returns:
          (B, T, D) in `dtype`, and the new cache (None without one).

        Raises:
          ValueError: segment ids came with a cache, or a cache with attention that has none.
        """
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids: a cache holds one segment per sequence, so it must be None")
        if cache is not None and self.attention not in ("softmax", "parallax"):
            raise ValueError(f"cache: attention {self.attention!r} has none, so it must be None")
        if positions is None:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            if cache is not None:
                positions += cache.lengths[:, None]

        def heads(name: str, num_heads: int, axis: str, *, norm: bool, rope: bool, gain: float = 1.0):
            h = nn.DenseGeneral(
                (num_heads, self.head_dim),
                use_bias=bool(self.use_bias),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=kernel_init(("embed", axis, "head_dim")),
                bias_init=bias_init((axis, "head_dim")),
                promote_dtype=_cast_input_only,
                dot_general=_dot_general,
                name=name,
            )(x)
            if norm:
                return RMSNorm(self.norm_eps, gain, self.param_dtype, name=f"{name}_norm")(
                    h, rotation if rope else None
                )
            return apply_rope(h, rotation) if rope else h

        rotation = rotary_embedding(positions, self.head_dim, self.rope_theta)
        query = heads("query", self.num_heads, "heads", norm=self.qk_norm, rope=True)
        key = heads("key", self.num_kv_heads, "kv_heads", norm=self.qk_norm, rope=True)
        value = heads("value", self.num_kv_heads, "kv_heads", norm=False, rope=False)
        softmax = self.attention == "softmax"
        if self.attention == "parallax":
            probe = heads(
                "probe",
                self.num_heads,
                "heads",
                norm=self.probe_norm,
                rope=self.probe_rope,
                gain=self.probe_norm_init,
            )
            if self.probe_gate:
                gate = nn.Dense(
                    self.num_heads,
                    use_bias=False,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    kernel_init=kernel_init(("embed", "heads")),
                    name="probe_gate",
                )(x)
                gate = nn.sigmoid(gate)
                self.sow("intermediates", "gate", gate)
                probe *= gate[..., None]
        else:
            probe = query if ESTIMATORS[self.attention].probe == "learned" else jnp.zeros_like(query)
        self.sow("intermediates", "operands", (query, probe, key, value))  # kept only where a caller asks for them
        options = {"local_window_size": self.local_window_size, "implementation": self.implementation}
        if softmax and cache is None and cudnn_runs(query, segment_ids, **options):
            window = None if self.local_window_size is None else (self.local_window_size - 1, 0)
            options = {"is_causal": True, "local_window_size": window, "implementation": "cudnn"}
            cudnn = lambda query, _, key, value, __: jax.nn.dot_product_attention(query, key, value, **options)
            out = attend_per_device(cudnn, query, probe, key, value, Mask(jnp.int32(0)))
        elif self.attention not in ("softmax", "parallax"):
            probe = query if ESTIMATORS[self.attention].probe == "learned" else None
            family = {"estimator": self.attention, "solver": self.solver, "segment_ids": segment_ids}
            out = local_estimator(query, probe, key, value, **family, **options)
        elif cache is None:
            out = parallax_attention(query, probe, key, value, segment_ids=segment_ids, **options)
        else:
            out, cache = cache.attend(query, probe, key, value, num_new, **options)
        out = nn.DenseGeneral(
            x.shape[-1],
            axis=(-2, -1),
            use_bias=self.use_bias is True,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=kernel_init(("heads", "head_dim", "embed"), self.out_init_std),
            bias_init=bias_init(("embed",)),
            promote_dtype=_cast_input_only,
            dot_general=_dot_general,
            name="out",
        )(out)
        return out, cache


@jax.custom_vjp
def _gated(gate, up):
    return (nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)


def _gated_backward(inputs, dout):
    # The barriers make XLA compute both gradients in one pass over the three.
    gate, up, d = (x.astype(jnp.float32) for x in lax.optimization_barrier((*inputs, dout)))
    sigmoid = nn.sigmoid(gate)
    dgate, dup = d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * gate * sigmoid
    return lax.optimization_barrier((dgate.astype(dout.dtype), dup.astype(dout.dtype)))


_gated.defvjp(lambda gate, up: (_gated(gate, up), (gate, up)), _gated_backward)


class SwiGLU(nn.Module):
    """Gated feed-forward layer: `down(silu(gate(x)) * up(x))`.

    Attributes:
      mlp_width: hidden width.
      use_bias: give every projection a bias.
      out_init_std: initial standard deviation of the down projection.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    mlp_width: int
    use_bias: bool = False
    out_init_std: float = INIT_STD
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the layer's output, of the width of `x`, in `dtype`."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        products = {"promote_dtype": _cast_input_only, "dot_general": _dot_general}
        dense = functools.partial(nn.Dense, use_bias=self.use_bias, **products, **dtypes)
        wide = functools.partial(
            dense, self.mlp_width, kernel_init=kernel_init(("embed", "mlp")), bias_init=bias_init(("mlp",))
        )
        hidden = _gated(wide(name="gate")(x), wide(name="up")(x))
        return dense(
            x.shape[-1],
            kernel_init=kernel_init(("mlp", "embed"), self.out_init_std),
            bias_init=bias_init(("embed",)),
            name="down",
        )(hidden)
