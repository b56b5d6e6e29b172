"""A step of generation on a GPU in one kernel or in five a block, where the blocks themselves compile to twenty.

A step for a few sequences is the reading of weights and cache, and every kernel's start and end is a pause in it. One
sequence on a Hopper GPU takes `pallas_kernels.mosaic_gpu.layer` where that can, one kernel for all blocks where they
are stacked, else one for each; all else takes Triton's five. The model's blocks (`parallax_jax.model.Block`) say what
is computed; `TransformerLM.hidden` calls `layers` instead where `runs` says so.
"""

import functools
import importlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import device, triton_routes
from pallas_kernels.blocks import Mask
from parallax_jax.cache import KVCache
from parallax_jax.layers import rotary_embedding

# What each of five kernels has read into the L2 cache for the kernels after it; "next" is for the next block.
AHEAD = {"in": ("gains", "out"), "out": ("gate",), "gate": ("down",), "down": ("next",)}
_KERNELS = ("pallas_kernels.triton.projection", "pallas_kernels.triton.decode")


def runs(config, params, tokens: Int[Array, "B T"], cache: KVCache) -> bool:
    """Whether `layers` takes the call: one new token for each of a few sequences, in half precision, on one GPU."""
    mesh = jax.sharding.get_abstract_mesh()
    if device.target()[0] != "gpu" or math.prod(mesh.shape.values()) > 1:
        return False
    modules = [triton_routes.load(name) for name in _KERNELS]
    return (
        not any(isinstance(module, str) for module in modules)
        and tokens.shape[1] == 1
        and tokens.shape[0] <= modules[0].MAX_ROWS
        and takes(config, params, cache)
        and config.implementation in (None, "triton")
        and config.dtype != "float32"
    )


def takes_stacked(config, params, cache: KVCache) -> bool:
    """Whether one kernel takes all layers of a step, for which they have to be stacked; `cache` may be shapes."""
    tokens = jax.ShapeDtypeStruct((len(cache.lengths), 1), jnp.int32)
    return config.scan_layers and runs(config, params, tokens, cache)


def takes(config, params, cache: KVCache) -> bool:
    """Whether the kernels know all that the model's blocks do: no biases, no gate; blocks that are stacked fit one."""
    if not config.has_cache or config.use_bias or config.probe_gate:
        return False
    if config.scan_layers:
        stacked = not isinstance(cache.key, tuple)
        return stacked and _fits_one_kernel(
            config, cache, nn.meta.unbox(params["layers"]), cache.key, config.windows[0]
        )
    return cache.page_table is None or cache.key[0].shape[1] % 16 == 0


def layers(
    config,
    params,
    x: Float[Array, "B 1 D"],
    positions: Int[Array, "#B 1"],
    cache: KVCache,
    num_new: Int[Array, " B"] | None,
) -> tuple[Float[Array, "B 1 D"], tuple[Array, ...], tuple[Array, ...]]:
    """Runs all blocks on one new token of each sequence.

    Args:
      config: the model's `ModelConfig`.
      params: the model's parameters.
      x: embedded tokens.
      positions: of the tokens, for the rotary embedding.
      cache: the model's cache.
      num_new: 0 for a sequence that has no new token, else 1; None for all 1.

    Returns:
      x, and the keys and values of every layer.
    """
    batch = x.shape[0]
    factors = rotary_embedding(positions, config.head_dim, config.rope_theta)
    rotation = tuple(
        jnp.broadcast_to(factor.reshape(-1, config.head_dim), (batch, config.head_dim)) for factor in factors
    )
    counters = {
        "append": jnp.zeros(batch * config.num_heads, jnp.int32),
        "layer": jnp.zeros((1 + config.num_kv_heads, 32), jnp.int32),
    }
    lengths = cache.grown(1, num_new)
    x, keys, values = triton_routes.load(_KERNELS[0]).Stream(x[:, 0]), [], []
    shared = {"page_table": cache.page_table, "counters": counters}
    mask = lambda window: Mask(cache.lengths, lengths, window=None if cache.ring else window)
    if config.scan_layers:
        layer = {"key": cache.key, "value": cache.value, **shared}
        blocks = nn.meta.unbox(params["layers"])
        x, key, value, _ = _one_kernel(config, cache.ring, blocks, x, rotation, mask(config.windows[0]), layer)
        return x.whole()[:, None], key, value
    blocks = [nn.meta.unbox(params[f"layers_{i}"]) for i in range(config.num_layers)]
    for i, window in enumerate(config.windows):
        layer = {"key": cache.key[i], "value": cache.value[i], **shared}
        stacked = jax.tree.map(lambda x: x[None], blocks[i])
        if _fits_one_kernel(config, cache, stacked, layer["key"][None], window):
            layer |= {name: layer[name][None] for name in ("key", "value")}
            x, key, value, counters = _one_kernel(config, cache.ring, stacked, x, rotation, mask(window), layer)
            key, value = key[0], value[0]
        else:
            following = list(_first_weights(config, blocks[i + 1]).values()) if i + 1 < len(blocks) else []
            arguments = config, cache.ring, blocks[i], following, x, rotation, mask(window), layer
            x, key, value, counters = _five_kernels(*arguments)
        shared["counters"] = counters
        keys.append(key)
        values.append(value)
    return x.whole()[:, None], tuple(keys), tuple(values)


def _first_weights(config, params) -> dict[str, Float[Array, "*L D _"]]:
    """Weights of a block's first product."""
    names = ("query", "probe", "key", "value") if config.attention == "parallax" else ("query", "key", "value")
    kernels = {name: params["attention"][name]["kernel"] for name in names}
    return {name: x.reshape(*x.shape[:-2], -1) for name, x in kernels.items()}


def _fits_one_kernel(config, cache: KVCache, params, key, window: int | None) -> bool:
    """Whether Hopper's kernel takes stacked blocks: a token must see all of a contiguous cache, or a ring."""
    sees_all = window is None or cache.ring or window >= cache.capacity
    if config.implementation is not None or cache.page_table is not None or not sees_all:
        return False
    x = jax.ShapeDtypeStruct((key.shape[1], config.width), jnp.dtype(config.dtype))
    return _hopper().unsupported(x, _weights(config, params), key) is None


def _hopper():
    """The module of the one kernel, loaded when a step is traced."""
    return importlib.import_module("pallas_kernels.mosaic_gpu.layer")


def _weights(config, params) -> dict[str, list[Float[Array, "*L _ _"]]]:
    """The weights of a block or of stacked ones, product by product."""
    out, mlp = params["attention"]["out"]["kernel"], params["mlp"]
    return {
        "in": list(_first_weights(config, params).values()),
        "out": [out.reshape(*out.shape[:-3], -1, config.width)],
        "gate": [mlp["gate"]["kernel"], mlp["up"]["kernel"]],
        "down": [mlp["down"]["kernel"]],
    }


def _head_norms(params) -> list[Array | None]:
    """Gains of a block's norms of query, probe and key; None where there is no norm."""
    return [params["attention"].get(f"{name}_norm", {}).get("scale") for name in ("query", "probe", "key")]


def _head_epsilon(config) -> float:
    return config.norm_eps if config.qk_norm_eps is None else config.qk_norm_eps


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one_kernel(config, ring, params, x, rotation, mask, cache):
    """`parallax_jax.model.Block` of one sequence, stacked; under jit, so that the layers of a model are traced once."""
    one_kernel = _hopper()
    x, parts, key, value, counters = one_kernel.layers(
        x.x,
        x.parts,
        _weights(config, params),
        one_kernel.Norms(params["attention_norm"]["scale"], params["mlp_norm"]["scale"], *_head_norms(params)),
        cache["key"],
        cache["value"],
        cache["counters"]["layer"],
        jnp.concatenate([mask.offset, mask.lengths]),
        jnp.concatenate(rotation),
        epsilon=config.norm_eps,
        head_epsilon=_head_epsilon(config),
        rotated=("query", "probe", "key") if config.probe_rope else ("query", "key"),
        ring=ring,
    )
    stream = triton_routes.load(_KERNELS[0]).Stream(x, parts)
    return stream, key, value, cache["counters"] | {"layer": counters}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _five_kernels(config, ring, params, following, x, rotation, mask, cache):
    """`parallax_jax.model.Block`; under jit, as above."""
    projection, decode = (triton_routes.load(name) for name in _KERNELS)
    first, weights, gains = _first_weights(config, params), _weights(config, params), _head_norms(params)
    later = weights | {"gains": [gain for gain in gains if gain is not None], "next": following}
    ahead = {name: [array for what in names for array in later[what]] for name, names in AHEAD.items()}
    project = functools.partial(projection.project, epsilon=config.norm_eps)
    *products, x = project(x, list(first.values()), gain=params["attention_norm"]["scale"], ahead=ahead["in"])
    heads = {name: y.reshape(len(y), 1, -1, config.head_dim) for name, y in zip(first, products, strict=True)}
    fresh = decode.Fresh(
        heads["key"],
        heads["value"],
        tuple(gains),
        (rotation, rotation if config.probe_rope else None, rotation),
        _head_epsilon(config),
        ring,
    )
    out, key, value, counters = decode.append(
        heads["query"],
        heads.get("probe"),
        cache["key"],
        cache["value"],
        cache["counters"]["append"],
        mask,
        cache["page_table"],
        fresh,
        scale=config.head_dim**-0.5,
    )
    (x,) = project(projection.Stream(out.reshape(len(out), -1)), weights["out"], residual=x.x, ahead=ahead["out"])
    gain = params["mlp_norm"]["scale"]
    hidden, x = project(x, weights["gate"], gain=gain, gated=True, ahead=ahead["gate"])
    (x,) = project(projection.Stream(hidden), weights["down"], residual=x.x, ahead=ahead["down"])
    return x, key, value, cache["counters"] | {"append": counters}
