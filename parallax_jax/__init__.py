"""Parallax attention for JAX: softmax attention plus a learned correction, read from how keys and values covary."""

from parallax_jax.attention import parallax_attention
from parallax_jax.decode import parallax_decode
from parallax_jax.estimators import local_estimator
from parallax_jax.layers import ParallaxAttention
from parallax_jax.model import ModelConfig, TransformerLM
from parallax_jax.pretrained import load_pretrained, save_pretrained
from parallax_jax.reference import parallax_reference
from parallax_jax.sampling import generate

__version__ = "0.1.0"

__all__ = [
    "ModelConfig",
    "ParallaxAttention",
    "TransformerLM",
    "__version__",
    "generate",
    "load_pretrained",
    "local_estimator",
    "parallax_attention",
    "parallax_decode",
    "parallax_reference",
    "save_pretrained",
]
