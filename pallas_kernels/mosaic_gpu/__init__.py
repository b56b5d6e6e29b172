"""Parallax attention for Hopper in Pallas Mosaic GPU: wgmma, bulk tensor copies, warpgroups that take turns."""

from pallas_kernels.mosaic_gpu.backward import backward
from pallas_kernels.mosaic_gpu.forward import forward

__all__ = ["backward", "forward"]
