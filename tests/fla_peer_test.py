"""flash-linear-attention's own model reads what `save_pretrained` writes: `pytest -m gpu tests/fla_peer_test.py`."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax_jax import ModelConfig, TransformerLM, load_pretrained, save_pretrained

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(  # heads x head_dim must be the width there
    vocab_size=500, num_layers=2, width=256, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=512, rope_theta=1e4
)


def random_params(config):
    """As initialised, but for norms, which are not 1."""
    shapes = jax.eval_shape(TransformerLM(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng()

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        is_scale = path[-1].key == "scale"
        return jnp.asarray(1 + x / 5 if is_scale else x / 50, leaf.dtype)

    return jax.tree.map_with_path(draw, nn.meta.unbox(shapes))


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "probe_norm": False, "use_bias": "qkv"}])
def test_reads_an_exported_folder(changes, tmp_path):
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("fla.models")

    config = dataclasses.replace(CONFIG, param_dtype="bfloat16", **changes)
    save_pretrained(tmp_path, config, random_params(config))
    tokens = np.random.default_rng().integers(0, config.vocab_size, (2, 300), np.int32)
    model = models.ParallaxForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).cuda().eval()
    with torch.no_grad():
        found = model(torch.from_numpy(tokens).long().cuda(), use_cache=False).logits.float().cpu().numpy()

    config, params = load_pretrained(tmp_path, dtype="float32")

    def ours(attention):
        model = TransformerLM(dataclasses.replace(config, attention=attention, implementation="reference"))
        return np.asarray(jax.jit(model.apply)({"params": params}, tokens))

    expected = ours("parallax")
    distance = lambda a: np.linalg.norm(a - expected) / np.linalg.norm(expected)
    assert distance(ours("softmax")) > 0.1, "the probe matters in this model"
    assert distance(found) < 2e-2
