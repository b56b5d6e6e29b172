"""Parallax attention for JAX: softmax attention plus a learned correction read from the covariance of keys and values."""

from parallax_jax.attention import parallax_attention
from parallax_jax.reference import parallax_reference

__version__ = "0.1.0"

__all__ = ["__version__", "parallax_attention", "parallax_reference"]
