"""A Qwen3-style decoder language model with Parallax or softmax attention."""

import dataclasses
import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from parallax_jax import step
from parallax_jax.attention import RESIDUAL_NAMES
from parallax_jax.cache import KVCache
from parallax_jax.estimators import DEFAULT_SOLVER, ESTIMATORS, Solver
from parallax_jax.layers import INIT_STD, ParallaxAttention, ResidualNorm, RMSNorm, SwiGLU, kernel_init
from parallax_jax.sharding import constrain, embed_per_device

_policies = jax.checkpoint_policies
# A policy that keeps these never runs the operator's forward pass twice.
_keep_residuals = _policies.save_only_these_names(*RESIDUAL_NAMES)

REMAT_POLICIES = {
    "none": _policies.everything_saveable,
    "full": _policies.nothing_saveable,
    "attention": _keep_residuals,
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _keep_residuals),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and kind of a `TransformerLM`.

    Attributes:
      vocab_size: number of tokens.
      num_layers: number of blocks.
      width: width of the residual stream.
      num_heads: query heads.
      num_kv_heads: key/value heads; divides `num_heads`.
      head_dim: width of a head; even, at most 256, independent of `width / num_heads`.
      mlp_width: hidden width of the SwiGLU layer.
      attention: "parallax", "softmax", or another of `estimators.ESTIMATORS`, which cannot generate.
      solver: how attention "lla", "mesa" and "affine_mesa" solves for its probe.
      probe_rope: rotate the probe by its position.
      probe_norm: norm the probe.
      probe_norm_init: initial gain of the probe's norm; 0 starts from softmax attention.
      probe_gate: multiply each head's probe by a gate between 0 and 1, computed from the block's input.
      qk_norm: norm query and key.
      use_bias: give every projection of a block a bias; "attention": those of its attention only, "qkv": those but the
        output's.
      local_window_size: most recent keys that a token sees, itself included; None for all. A tuple has one for each
        layer; layers that differ cannot be scanned over.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of every norm.
      qk_norm_eps: epsilon of the norms of query, probe and key instead; None for `norm_eps`.
      tie_embeddings: use the embedding as the output projection.
      dtype: dtype of the computation; logits are float32 in any case.
      param_dtype: dtype of the parameters.
      remat: what the backward pass keeps of a block: "none" rematerialises nothing, "full" everything, "attention" all
        but the operator's residuals, "dots" all but those and the products with weights.
      scan_layers: stack the blocks' parameters on axis 0 and scan over them; else one subtree "layers_i" each.
      scan_unroll: blocks in an iteration of the scan. `num_layers` leaves no loop: slower to compile, faster to train,
        for a loop copies all that its backward pass needs.
      implementation: backend of the attention operator; None for the fastest that runs.

    Raises:
      ValueError: a field has a value that is not allowed.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    _: dataclasses.KW_ONLY
    attention: str = "parallax"
    solver: Solver = DEFAULT_SOLVER
    probe_rope: bool = True
    probe_norm: bool = True
    probe_norm_init: float = 1.0
    probe_gate: bool = False
    qk_norm: bool = True
    use_bias: bool | Literal["attention", "qkv"] = False
    local_window_size: int | tuple[int | None, ...] | None = None
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qk_norm_eps: float | None = None
    tie_embeddings: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    scan_unroll: int = 1
    implementation: str | None = None

    def __post_init__(self):
        floats = ("float32", "bfloat16", "float16")
        sizes = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
        for name in (*sizes, "scan_unroll"):
            self._check(name, getattr(self, name) >= 1, "an integer >= 1")
        self._check("head_dim", self.head_dim % 2 == 0 and self.head_dim <= 256, "an even integer up to 256")
        divides = self.num_heads % self.num_kv_heads == 0
        self._check("num_kv_heads", divides, f"a divisor of num_heads={self.num_heads}")
        if isinstance(self.local_window_size, list):  # from JSON
            object.__setattr__(self, "local_window_size", tuple(self.local_window_size))
        if isinstance(self.solver, dict):
            object.__setattr__(self, "solver", Solver(**self.solver))
        self._check("local_window_size", all(w is None or w >= 1 for w in self.windows), "None or an integer >= 1")
        self._check("local_window_size", len(self.windows) == self.num_layers, f"one for each of {self.num_layers}")
        alike = not self.scan_layers or len(set(self.windows)) == 1
        self._check("local_window_size", alike, "the same for all layers, or scan_layers=False")
        self._check("use_bias", self.use_bias in (False, True, "attention", "qkv"), "a bool, 'attention' or 'qkv'")
        self._check("rope_theta", self.rope_theta > 0, "a number > 0")
        self._check("norm_eps", self.norm_eps > 0, "a number > 0")
        self._check("qk_norm_eps", self.qk_norm_eps is None or self.qk_norm_eps > 0, "None or a number > 0")
        allowed = {"attention": tuple(ESTIMATORS), "remat": tuple(REMAT_POLICIES)}
        for name, values in {**allowed, "dtype": floats, "param_dtype": floats}.items():
            self._check(name, getattr(self, name) in values, "one of " + ", ".join(values))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        window = self.local_window_size
        return window if isinstance(window, tuple) else (window,) * self.num_layers

    @property
    def has_cache(self) -> bool:
        """Whether the attention can decode from cached keys and values."""
        return self.attention in ("parallax", "softmax")

    def _check(self, name: str, ok: bool, allowed: str):
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}")


class Block(nn.Module):
    """Pre-norm transformer block: attention, then SwiGLU, each added to the residual stream."""

    config: ModelConfig
    local_window_size: int | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        segment_ids: Int[Array, "B T"] | None,
        cache: KVCache | None,
        num_new: Int[Array, " B"] | None,
        key_value: tuple[Array, Array] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """Returns x and this layer's new cached keys and values: a carry and an output, as `nn.scan` wants it.

        `cache` is what the layers share of it, `key_value` what is this layer's own.
        """
        if cache is not None:
            cache = dataclasses.replace(cache, key=key_value[0], value=key_value[1])
        c = self.config
        dtypes = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
        # 2 num_layers branches add to the stream; this keeps its variance independent of depth at the start.
        shared = {"out_init_std": INIT_STD / (2 * c.num_layers) ** 0.5, **dtypes}
        norm = functools.partial(ResidualNorm, c.norm_eps, param_dtype=dtypes["param_dtype"])
        x, h = norm(name="attention_norm")(x)
        attended, cache = ParallaxAttention(
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            attention=c.attention,
            solver=c.solver,
            probe_rope=c.probe_rope,
            probe_norm=c.probe_norm,
            probe_norm_init=c.probe_norm_init,
            probe_gate=c.probe_gate,
            qk_norm=c.qk_norm,
            use_bias="qkv" if c.use_bias == "qkv" else bool(c.use_bias),
            local_window_size=self.local_window_size,
            rope_theta=c.rope_theta,
            norm_eps=c.norm_eps if c.qk_norm_eps is None else c.qk_norm_eps,
            implementation=c.implementation,
            name="attention",
            **shared,
        )(h, positions, segment_ids, cache, num_new)
        x, h = norm(name="mlp_norm")(x, attended)
        x += SwiGLU(c.mlp_width, c.use_bias is True, name="mlp", **shared)(h)
        x = constrain(x, "batch", "sequence" if cache is None else None, None)
        return x, None if cache is None else (cache.key, cache.value)


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token in its own run of equal ids, from 0."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    change = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(change, index, 0), axis=1)


class TransformerLM(nn.Module):
    """Decoder language model in Qwen3's shape: pre-norm blocks, SwiGLU, rotary positions, a final norm.

    `TransformerLM(config).apply({"params": params}, tokens)` gives float32 logits. Every parameter carries logical
    axis names: "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "norm", and "layers" where blocks are stacked.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        param_dtype, dtype = jnp.dtype(c.param_dtype), jnp.dtype(c.dtype)
        self.embed = nn.Embed(
            c.vocab_size, c.width, dtype=dtype, param_dtype=param_dtype, embedding_init=kernel_init(("vocab", "embed"))
        )
        block = Block
        if c.remat != "none":
            # Inside a loop the compiler cannot merge the two passes, so the barrier that prevents it is not needed.
            looped = c.scan_layers and c.scan_unroll == 1
            block = nn.remat(block, policy=REMAT_POLICIES[c.remat], prevent_cse=not looped)
        if c.scan_layers:
            self.layers = nn.scan(
                block,
                length=c.num_layers,
                unroll=c.scan_unroll,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, c.windows[0])
        else:
            self.layers = [block(c, window) for window in c.windows]
        self.final_norm = RMSNorm(c.norm_eps, param_dtype=param_dtype)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(
                c.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init(("embed", "vocab")),
                dot_general=_float32_product,
            )

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        num_new: Int[Array, " B"] | None = None,
    ):
        """Returns the final normed hidden states (B, T, D) in `config.dtype`; all else as in `__call__`."""
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            if cache is not None:
                positions += cache.lengths[:, None]
            elif segment_ids is not None:
                positions = segment_positions(segment_ids)
        # Rows first, then the cast: the whole table is read for neither, and gradients add up in its own dtype.
        dtype = jnp.dtype(self.config.dtype)
        x = embed_per_device(self.embed.embedding, tokens, dtype, split_sequence=cache is None)
        if cache is None:
            for layer in [self.layers] if self.config.scan_layers else self.layers:
                x, _ = layer(x, positions, segment_ids, None, None, None)
            return self.final_norm(x)
        lengths = cache.grown(tokens.shape[1], num_new)
        shared = dataclasses.replace(cache, key=None, value=None)
        params = self.variables.get("params")  # none yet where they are drawn
        if params and step.runs(self.config, params, tokens, cache):
            x, key, value = step.layers(self.config, params, x, positions, cache, num_new)
        elif self.config.scan_layers:
            x, (key, value) = self.layers(x, positions, segment_ids, shared, num_new, (cache.key, cache.value))
        else:
            pairs = []
            for layer, *pair in zip(self.layers, cache.key, cache.value, strict=True):
                x, pair = layer(x, positions, segment_ids, shared, num_new, pair)
                pairs.append(pair)
            key, value = zip(*pairs, strict=True)
        return self.final_norm(x), dataclasses.replace(cache, key=key, value=value, lengths=lengths)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B vocab"]:
        """Returns the float32 logits of hidden states, such as a chunk of what `hidden` returns."""
        if not self.config.tie_embeddings:
            return self.lm_head(hidden)
        table = self.embed.embedding.astype(hidden.dtype)
        return _float32_product(hidden, table, (((hidden.ndim - 1,), (1,)), ((), ())))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        num_new: Int[Array, " B"] | None = None,
    ):
        """Returns the logits of the next token at every position.

        Args:
          tokens: int32 token ids in [0, vocab_size).
          positions: for the rotary embedding; None for 0 to T - 1, counted anew in each segment, with a cache on from
            its lengths.
          segment_ids: packed documents: tokens see their own segment only; None for one segment. Not with a cache.
          cache: keys and values of the tokens before these, from `init_cache` or `init_paged_cache`.
          num_new: with a cache, how many tokens of each row are real, the rest being padding at its end; None for all.

        Returns:
          float32 logits (B, T, vocab); with a cache (logits, new cache).
        """
        if cache is None:
            return self.logits(self.hidden(tokens, positions, segment_ids))
        hidden, cache = self.hidden(tokens, positions, segment_ids, cache, num_new)
        return self.logits(hidden), cache


def unstack_layers(config: ModelConfig, params):
    """Returns the same model with one subtree of parameters per layer: faster to decode with, slower to compile.

    A scan over layers copies each layer's whole cache in and out; without it the cache is updated in place. Layers that
    `step.takes_stacked` are faster still.
    """
    if not config.scan_layers:
        return config, params
    layers = {f"layers_{i}": jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(config.num_layers)}
    rest = {name: p for name, p in params.items() if name != "layers"}
    return dataclasses.replace(config, scan_layers=False), {**rest, **layers}


def _float32_product(a, b, dimension_numbers, precision=None):
    return jax.lax.dot_general(a, b, dimension_numbers, precision, preferred_element_type=jnp.float32)
