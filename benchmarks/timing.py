"""GPU time of a call as the sum of its kernels' times, by CUPTI, for JAX and for torch in one process."""

import statistics
from collections.abc import Callable

import jax
from jax.experimental.mosaic.gpu import profiler


def jax_kernels(function: Callable, *args, iterations: int = 20) -> tuple[float, dict[str, float]]:
    """Returns the median over two iterations or more of the summed kernel times, and each kernel's, in us."""
    _, runs = profiler.measure(function, aggregate=False, iterations=iterations)(*args)
    if runs is None:
        raise RuntimeError("no GPU kernel ran")
    return _median([[(name, 1e3 * milliseconds) for name, milliseconds in run] for run in runs])


def milliseconds(function: Callable, *args, iterations: int = 10, kernel: str | None = None) -> float:
    """Returns the time of a call, of the kernels whose name contains `kernel` where that is given."""
    total, kernels = jax_kernels(function, *args, iterations=iterations)
    return (total if kernel is None else sum(us for name, us in kernels.items() if kernel in name)) / 1e3


def with_gradients(attention: Callable) -> Callable:
    """Returns a function of (operands, cotangent) that gives the output and the gradients of all operands."""

    def run(operands, cotangent):
        out, vjp = jax.vjp(attention, *operands)
        return out, vjp(cotangent)

    return run


def torch_kernels(function: Callable, iterations: int = 20) -> tuple[float, dict[str, float]]:
    """`jax_kernels` for a function that launches torch work."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(iterations):
            function()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    events = [(e.name, e.time_range.start, e.self_device_time_total) for e in record.events() if e.device_type == cuda]
    events.sort(key=lambda event: event[1])
    each, rest = divmod(len(events), iterations)
    if rest or not each:
        raise RuntimeError(f"{len(events)} kernels in {iterations} iterations")
    return _median([[(n, t) for n, _, t in events[i * each : (i + 1) * each]] for i in range(iterations)])


def _median(runs: list[list[tuple[str, float]]]) -> tuple[float, dict[str, float]]:
    kernels: dict[str, float] = {}
    for i, (name, _) in enumerate(runs[0]):
        kernels[name] = kernels.get(name, 0.0) + statistics.median(run[i][1] for run in runs)
    return statistics.median(sum(time for _, time in run) for run in runs), kernels
