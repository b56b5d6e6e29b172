"""The paper's models, by their exact numbers of parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from parallax_jax.model import TransformerLM
from train.config import load_preset

EMBEDDING = 151_936 * 1024
COUNTS = {
    "parallax_0p6b": 654_773_760,
    "parallax_0p6b_adamw": 654_773_760,
    "parallax_0p6b_matched": 658_438_400,
    "parallax_1p7b": 1_838_019_072,
    "softmax_0p6b": 596_049_920,
    "softmax_0p6b_adamw": 596_049_920,
    "softmax_0p6b_matched": 654_770_176,
    "softmax_1p7b": 1_720_574_976,
}


def shapes_of(name):
    init = lambda: TransformerLM(load_preset(name).model).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return nn.meta.unbox(jax.eval_shape(init))["params"]


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    shapes = shapes_of(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]
    assert "lm_head" not in shapes and load_preset(name).model.num_kv_heads == 8


def test_matched_models_match():
    """Table 5 and section 4.2: the same matrices as Parallax but for 24 query heads, the same attention as softmax."""
    matrices = lambda name: sum(leaf.size for leaf in jax.tree.leaves(shapes_of(name)["layers"]) if leaf.ndim > 2)
    assert matrices("softmax_0p6b_matched") == matrices("parallax_0p6b") == 499_122_176
    assert abs(matrices("parallax_0p6b_matched") / matrices("parallax_0p6b") - 1) < 0.01
    half, softmax = (load_preset(name).model for name in ("parallax_0p6b_matched", "softmax_0p6b"))
    assert 2 * half.num_heads * half.head_dim == softmax.num_heads * softmax.head_dim


@pytest.mark.parametrize(("name", "tokens"), [("parallax_0p6b", 3.93e6), ("parallax_1p7b", 7.86e6)])
def test_tokens_of_an_update(name, tokens):
    config = load_preset(name)
    assert abs(config.batch_size * config.seq_len / tokens - 1) < 1e-3 and config.steps == 20_000
