import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax_jax import ModelConfig, TransformerLM
from parallax_jax.diagnostics import attention_statistics, weight_statistics

CONFIG = ModelConfig(
    vocab_size=31, num_layers=2, width=20, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=24, rope_theta=1e4
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 13), 0, 31)
SEGMENTS = jnp.asarray([[1] * 13, [4] * 5 + [2] * 6 + [0] * 2], jnp.int32)


@pytest.fixture(scope="module")
def params():
    params = nn.meta.unbox(TransformerLM(CONFIG).init(jax.random.key(1), TOKENS)["params"])
    return jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, params)


def by_hand(operands, segments, window):
    """The statistics of one layer, one row, head and token at a time."""
    ratios, combined, sinks, entropies = [], [], [], []
    for query, probe, key, value, segment in zip(
        *(np.asarray(x, np.float64) for x in (*operands, segments)), strict=True
    ):
        for t in range(len(query)):
            seen = [s for s in range(t + 1) if segment[s] == segment[t] and (window is None or t - s < window)]
            if segment[t] == 0 or len(seen) == 1:
                continue
            start = list(segment).index(segment[t])
            for n in range(query.shape[1]):
                k, v = key[seen, n // 2], value[seen, n // 2]
                p = np.exp(k @ query[t, n] / np.sqrt(k.shape[1]))
                p /= p.sum()
                covariance = ((p[:, None] * (v - p @ v)).T) @ (k - p @ k)
                ratios.append(np.linalg.norm(covariance @ probe[t, n]) / np.linalg.norm(p @ v))
                combined.extend(p * (1 - k @ probe[t, n] + p @ k @ probe[t, n]))
                entropies.append(-(p * np.log(p)).sum())
                if start in seen:
                    sinks.append(p[seen.index(start)])
    return {
        "correction_ratio": np.mean(ratios),
        "combined_weight_min": min(combined),
        "combined_weight_max": max(combined),
        "sink_mass": np.mean(sinks),
        "entropy": np.mean(entropies),
    }


@pytest.mark.parametrize("window", [None, 4])
def test_attention_statistics_by_hand(params, window):
    config = dataclasses.replace(CONFIG, local_window_size=window)
    statistics = attention_statistics(config, params, TOKENS, SEGMENTS)
    _, sown = TransformerLM(config).apply({"params": params}, TOKENS, segment_ids=SEGMENTS, mutable="intermediates")
    operands = sown["intermediates"]["layers"]["attention"]["operands"][0]
    for layer in range(2):
        expected = by_hand([x[layer] for x in operands], SEGMENTS, window)
        assert {name: pytest.approx(values[layer], rel=1e-4) for name, values in statistics.items()} == expected
    assert statistics["correction_ratio"][0] > 0.1 and statistics["combined_weight_min"][0] < 0


def test_softmax_has_no_correction(params):
    config = dataclasses.replace(CONFIG, attention="softmax")
    layers = dict(params["layers"])
    layers["attention"] = {k: v for k, v in layers["attention"].items() if not k.startswith("probe")}
    statistics = attention_statistics(config, {**params, "layers": layers}, TOKENS)
    assert statistics["correction_ratio"] == [0, 0] and min(statistics["combined_weight_min"]) >= 0
    assert max(statistics["combined_weight_max"]) <= 1
    weights = weight_statistics(config, {**params, "layers": layers})
    assert "probe_norm" not in weights and "stable_rank_RK" not in weights and len(weights) == 6


def test_weight_statistics_by_hand(params):
    statistics = weight_statistics(CONFIG, params)
    attention = jax.tree.map(lambda p: np.asarray(p[1], np.float64), params["layers"]["attention"])
    rank = lambda m: np.linalg.norm(m) ** 2 / np.linalg.norm(m, 2) ** 2
    q, r, k, v, o = (attention[name]["kernel"] for name in ("query", "probe", "key", "value", "out"))
    expected = {
        "probe_norm": np.sqrt((r**2).sum()),
        "stable_rank_Q": rank(q.reshape(20, 24)),
        "stable_rank_K": rank(k.reshape(20, 12)),
        "stable_rank_V": rank(v.reshape(20, 12)),
        "stable_rank_R": rank(r.reshape(20, 24)),
        "stable_rank_O": rank(o.reshape(24, 20)),
        "stable_rank_QK": np.mean([rank(q[:, n] @ k[:, n // 2].T) for n in range(4)]),
        "stable_rank_RK": np.mean([rank(r[:, n] @ k[:, n // 2].T) for n in range(4)]),
        "stable_rank_OV": np.mean([rank(v[:, n // 2] @ o[n]) for n in range(4)]),
    }
    assert {name: pytest.approx(values[1], rel=1e-6) for name, values in statistics.items()} == expected
