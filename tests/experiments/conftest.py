import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax multiplies int32 counts into float32, which strict promotion refuses; in every thread that compiles."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
