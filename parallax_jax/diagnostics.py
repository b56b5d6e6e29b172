"""What the paper plots of a model (arXiv 2605.29157, sections 4.3 and 4.4): how far and in which way it left softmax.

Every value is one per layer, so that all of it is JSON.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from parallax_jax.model import ModelConfig, TransformerLM, unstack_layers


def attention_statistics(
    config: ModelConfig, params, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
) -> dict[str, list[float]]:
    """Statistics of the attention of each layer over a batch. Dense: meant for a few rows of moderate length.

    Args:
      config: the model.
      params: its parameters, as `config` stacks them.
      tokens: int32 token ids.
      segment_ids: as in `TransformerLM`; tokens of segment 0 are padding and do not count. None counts all.

    Returns:
      For each layer, over all heads and tokens that see a key beside their own:
      "correction_ratio", mean of |Sigma_KV r| / |softmax output|; "combined_weight_min" and "combined_weight_max", the
      extremes of p (1 - t + t_mean); "sink_mass", mean softmax weight on the segment's first token (over tokens that
      can see it), "entropy", mean of the softmax weights' in nats; with a gate "probe_gate", its mean over all tokens.
    """
    config, params = unstack_layers(config, params)
    rows = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    layers = jax.device_get(_attention_statistics(config, params, tokens, rows))
    return {name: [float(layer[name]) for layer in layers] for name in layers[0]}


@functools.partial(jax.jit, static_argnums=0)
def _attention_statistics(config, params, tokens, rows):
    apply = functools.partial(TransformerLM(config).apply, method="hidden", mutable="intermediates")
    _, sown = apply({"params": params}, tokens, segment_ids=rows)
    layers = []
    for i, window in enumerate(config.windows):
        attention = sown["intermediates"][f"layers_{i}"]["attention"]
        operands = attention["operands"][0]
        per_row = jax.lax.map(lambda row, window=window: _row_statistics(*row, window=window), (*operands, rows))
        total = {name: values.sum() for name, values in per_row.items()}
        many = per_row["count"].sum() * config.num_heads
        layers.append(
            {
                "correction_ratio": total["correction_ratio"] / many,
                "combined_weight_min": per_row["min"].min(),
                "combined_weight_max": per_row["max"].max(),
                "sink_mass": total["sink_mass"] / jnp.maximum(1.0, total["sink_count"] * config.num_heads),
                "entropy": total["entropy"] / many,
            }
        )
        if "gate" in attention:
            layers[-1]["probe_gate"] = jnp.mean(attention["gate"][0].astype(jnp.float32))
    return layers


def _row_statistics(query, probe, key, value, segments, *, window):
    """Sums over the heads and tokens of one row, from (T, N, H) operands."""
    length, heads = query.shape[:2]
    query, probe, key, value = (x.astype(jnp.float32) for x in (query, probe, key, value))
    key, value = (jnp.repeat(x, heads // x.shape[1], axis=1) for x in (key, value))
    at = jnp.arange(length)
    visible = (at[:, None] >= at) & (segments[:, None] == segments)
    first = jnp.argmax(segments[:, None] == segments, axis=1)  # of each token's segment
    if window is not None:
        visible &= at[:, None] - at < window
    counts = (visible.sum(1) > 1) & (segments > 0)
    dot = lambda a, b: jnp.einsum("tnh,snh->nts", a, b, precision="highest")
    p = jax.nn.softmax(jnp.where(visible, dot(query, key) * query.shape[-1] ** -0.5, -jnp.inf))
    t = dot(probe, key)
    centred = t - jnp.sum(p * t, axis=-1, keepdims=True)
    mix = lambda weights: jnp.einsum("nts,snh->nth", weights, value, precision="highest")
    ratio = jnp.linalg.norm(mix(p * centred), axis=-1) / jnp.linalg.norm(mix(p), axis=-1)
    combined = p * (1 - centred)
    shown = visible & counts[:, None]
    sinks = counts & visible[at, first] & (first < at)
    return {
        "count": counts.sum().astype(jnp.float32),
        "sink_count": sinks.sum().astype(jnp.float32),
        "correction_ratio": jnp.sum(ratio, where=counts),
        "min": jnp.where(shown, combined, jnp.inf).min(),
        "max": jnp.where(shown, combined, -jnp.inf).max(),
        "sink_mass": jnp.sum(p[:, at, first], where=sinks),
        "entropy": jnp.sum(-jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1), where=counts),
    }


def weight_statistics(config: ModelConfig, params) -> dict[str, list[float]]:
    """Norms and stable ranks of the attention weights of each layer.

    Returns:
      For each layer "probe_norm", |W_R|_F, and "stable_rank_X", the squared ratio of Frobenius and spectral norm, for X
      in Q, K, V, O, R: the whole projection, all heads in one matrix; for X in QK, RK, OV: the mean over heads of the
      products W_Q W_K^T, W_R W_K^T and W_V W_O. Gains of norms and biases are left out; without a probe so is R.
    """
    config, params = unstack_layers(config, params)
    return _by_name([_layer_weights(config, params[f"layers_{i}"]["attention"]) for i in range(config.num_layers)])


def _layer_weights(config: ModelConfig, attention) -> dict[str, float]:
    kernel = lambda name: np.asarray(attention[name]["kernel"], np.float64)
    heads = {"Q": kernel("query"), "K": kernel("key"), "V": kernel("value"), "O": kernel("out").transpose(2, 0, 1)}
    if config.attention == "parallax":
        heads["R"] = kernel("probe")
    whole = {name: w.reshape(len(w), -1) for name, w in heads.items()}
    stats = {f"stable_rank_{name}": float(_stable_rank(w)) for name, w in whole.items()}
    group = config.num_heads // config.num_kv_heads
    # (heads, width, head_dim), key and value heads once per query head.
    each = {name: w.transpose(1, 0, 2).repeat(1 if name in "QRO" else group, axis=0) for name, w in heads.items()}
    for pair in ("QK", "RK", "OV"):
        if pair[0] in each:
            # |A B^T| has the singular values of the product of the two triangular factors.
            a, b = (np.linalg.qr(each[name], mode="r") for name in pair)
            stats[f"stable_rank_{pair}"] = float(_stable_rank(a @ b.transpose(0, 2, 1)).mean())
    if "R" in heads:
        stats["probe_norm"] = float(np.linalg.norm(heads["R"]))
    return stats


def _stable_rank(matrix: Float[np.ndarray, "*B M N"]) -> Float[np.ndarray, "*B"]:
    singular = np.linalg.svd(matrix, compute_uv=False)
    return (singular**2).sum(-1) / singular[..., 0] ** 2


def _by_name(layers: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [layer[name] for layer in layers] for name in layers[0]}
