"""What the code being traced will run on."""

from collections.abc import Callable

import jax

HOPPER = "H100", "H200", "H800", "H20"  # in the names of devices; that of a GH200 holds one of them, too
HOPPER_CORES = 132  # of an H100 SXM or NVL, an H200 and a GH200
_ALL_CORES = "H100 80GB HBM3", "H100 NVL", "H200"  # in their names: an H100 PCIe has 114, an H20 78
BLACKWELL = "B200", "B300"


def target() -> tuple[str, str]:
    """(platform, device kind) of the code being traced: the mesh's devices, else JAX's default backend.

    Ahead-of-time compilation for a machine that is not there names its device through the abstract mesh.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        platform = device.platform or jax.default_backend()
        return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform), device.device_kind
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return device.platform, device.device_kind


def too_few_cores() -> str | None:
    """Why kernels whose programs wait for one another, each on a core, cannot run on the device, or None."""
    platform, kind = target()
    if platform == "cpu" or (any(name in kind for name in _ALL_CORES) and "MIG" not in kind):
        return None
    return f"implementation: needs a whole Hopper GPU of {HOPPER_CORES} cores, got {kind}"


def run(kernel: Callable, *args):
    """Calls kernel(*args, interpret=...): Pallas' interpreter on a CPU, the compiled kernel everywhere else.

    The choice falls at lowering, so the same trace serves a CPU and a cross-compiled accelerator.
    """
    return jax.lax.platform_dependent(
        *args,
        cpu=lambda *a: kernel(*a, interpret=True),
        default=lambda *a: kernel(*a, interpret=False),
    )
