"""Tests run on eight emulated CPU devices and with strict dtype promotion."""

import os

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    """On a CPU compiling takes longer than running, most of all for interpreted kernels."""
    if config.getoption("markexpr") not in ("compile", "gpu"):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"


def pytest_generate_tests(metafunc):
    """Conformance classes say which workloads they run in half precision."""
    if "half_workload" in metafunc.fixturenames:
        metafunc.parametrize("half_workload", metafunc.cls.half_workloads)
