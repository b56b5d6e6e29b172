"""Implementation "triton" by two routes: the Triton language through jax-triton, and Pallas lowered to Triton.

They take the same calls and leave the same residuals. `block_sizes` names the route by its type; None takes the faster
by this device's tuned table, pass by pass, of those that can run here.
"""

import functools
import importlib
from types import ModuleType

from pallas_kernels import block_sizes as sizes_of
from pallas_kernels import device

# Section of the tuned table -> module with `unsupported`, `forward`, `backward` and a module `decode`. Without times
# the first is taken.
ROUTES = {"triton": "pallas_kernels.triton", "triton_lang": "pallas_kernels.triton_lang"}


@functools.cache
def load(module: str) -> ModuleType | str:
    """Imports a route on first use; where it cannot be, returns why."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return f"implementation: {error}"


def choose(passes: tuple[str, ...], part: str, *operands, **options) -> tuple[ModuleType | None, dict[str, str]]:
    """The route that takes a call, and why those before it do not.

    Args:
      passes: the passes of the tuned table whose times count.
      part: module below the route's, such as ".decode".
      *operands: handed to the route's `unsupported`, query first and value fourth.
      **options: likewise.
    """
    query, value = operands[0], operands[3]
    width = max(query.shape[-1], value.shape[-1])
    reasons = {}
    for name in sizes_of.faster(tuple(ROUTES), passes, device.target()[1], 8 * query.dtype.itemsize, width):
        module = load(ROUTES[name] + part)
        reason = module if isinstance(module, str) else module.unsupported(*operands, **options)
        if reason is None:
            return module, reasons
        reasons[name] = reason
    return None, reasons


def refusal(reasons: dict[str, str]) -> str:
    """Every route's reason, in one line."""
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def unsupported(*operands, scale, block_sizes) -> str | None:
    """Why no route can run the call, or None."""
    module, reasons = choose(("forward",), "", *operands, scale=scale, block_sizes=block_sizes)
    return refusal(reasons) if module is None else None


def forward(*operands, scale, block_sizes):
    """Returns (out, v_mean, lse, t_mean); see `pallas_kernels.tiles.finish`."""
    options = dict(scale=scale, block_sizes=block_sizes)
    return choose(("forward",), "", *operands, **options)[0].forward(*operands, **options)


def backward(query, probe, key, value, mask, *residuals, scale, block_sizes):
    """Returns (dquery, dprobe, dkey, dvalue)."""
    operands, options = (query, probe, key, value, mask), dict(scale=scale, block_sizes=block_sizes)
    return choose(("rows", "columns"), "", *operands, **options)[0].backward(*operands, *residuals, **options)
