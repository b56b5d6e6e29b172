"""What the code being traced will run on."""

from collections.abc import Callable

import jax

HOPPER = "H100", "H200", "H800", "H20"  # in the names of devices; that of a GH200 holds one of them, too
HOPPER_CORES = 132  # of an H100 SXM or H200
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


def run(kernel: Callable, *args):
    """Calls kernel(*args, interpret=...): Pallas' interpreter on a CPU, the compiled kernel everywhere else.

    The choice falls at lowering, so the same trace serves a CPU and a cross-compiled accelerator.
    """
    return jax.lax.platform_dependent(
        *args,
        cpu=lambda *a: kernel(*a, interpret=True),
        default=lambda *a: kernel(*a, interpret=False),
    )
