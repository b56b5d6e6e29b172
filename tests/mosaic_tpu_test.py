"""The TPU kernels: numerics in the interpreters, lowering for a TPU, and plans against dense masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sizes import MosaicTpuBlockSizes, MosaicTpuPass
from parallax_jax import compare, parallax_attention
from tests.conformance import Conformance

SMALL = MosaicTpuBlockSizes(*(MosaicTpuPass(128, 128),) * 3)


class TestMosaicTpu(Conformance):
    """With the smallest blocks, so that the workloads have several."""

    implementation = "mosaic_tpu"
    half_workloads = ("mqa", "packed")

    def attention(self, *operands, **options):
        return super().attention(*operands, block_sizes=SMALL, **options)

    def check(self, workload, dtype):
        allowed = compare.bounds(self.implementation, dtype)
        found = compare.errors(self.implementation, workload, dtype, block_sizes=SMALL)
        for i, (name, error) in enumerate(found.items()):
            assert error <= allowed[min(i, 1)], f"{name}: {error:.2e} > {allowed[min(i, 1)]:.0e}"
