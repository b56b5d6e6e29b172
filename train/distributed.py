"""Several processes as one run: how they meet, agree, stop and fail together. A run of one process passes through."""

import contextlib
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from orbax.checkpoint.multihost import sync_global_processes

from train.config import ConfigError, LaunchConfig

_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # set by srun and mpirun
_POD = "JOB_COMPLETION_INDEX"  # set in the pods of an indexed Kubernetes Job
_PATIENCE = 3600  # seconds to wait for a process that works alone
_TEXT_BYTES = 2048
_meetings = itertools.count()


def initialize(launch: LaunchConfig):
    """Joins this process with the others of its run, where there are any; call it before JAX is used.

    Flags go before what JAX finds by itself under srun, mpirun and, with the package kubernetes, in the pods of a Job.

    Raises:
      ConfigError: the processes cannot meet; the message says what is missing.
    """
    named = launch.coordinator is not None or "JAX_COORDINATOR_ADDRESS" in os.environ
    launched = _POD in os.environ or any(int(os.environ.get(name, "1")) > 1 for name in _TASKS)
    if launch.num_processes == 1 or not (named or launched):
        return
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.num_processes,
            launch.process_id,
            heartbeat_timeout_seconds=launch.timeout,
        )
    except (ValueError, RuntimeError) as error:
        flags = "--launch.coordinator HOST:PORT --launch.num-processes N --launch.process-id I"
        raise ConfigError(f"the processes of this run cannot meet ({error}); pass {flags}") from None


def meet():
    """Waits for all processes, however long one works alone; collectives of CPUs give up after 30 s."""
    processes = set(range(jax.process_count()))
    sync_global_processes(f"meet-{next(_meetings)}", timeout=_PATIENCE, processes=processes)


def gather_text(text: str) -> list[str]:
    """The texts of all processes, by process, cut after 2048 bytes; meets first."""
    if jax.process_count() == 1:
        return [text]
    meet()
    data = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    data[: len(encoded)] = encoded
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(data)]


def in_turn[T](function: Callable[[], T]) -> T:
    """Calls `function` in process 0, then in the others, which find what it left; returns each one's own result.

    Raises:
      ConfigError: in all processes, where one of them raised it.
    """
    if jax.process_count() == 1:
        return function()
    for first in (True, False):
        problem = ""
        if (jax.process_index() == 0) == first:
            try:
                result = function()
            except ConfigError as error:
                problem = str(error)
        for process, text in enumerate(gather_text(problem)):
            if text:
                raise ConfigError(text if process == 0 else f"process {process}: {text}")
    return result


def require_same(name: str, value: str):
    """Refuses a value that differs between processes.

    Raises:
      ConfigError: in all processes.
    """
    values = gather_text(value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise ConfigError(f"{name} is {values[0]} in process 0 and {other} in process {process}: make them equal")


def share_of_rows(sharding: Sharding, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Which of how many equal blocks of rows the devices of this process hold, of a batch (parts, rows, seq_len).

    Raises:
      ConfigError: the mesh gives it none, or rows that are not one block.
    """
    rows = shape[1]
    held = sorted({index[1].indices(rows)[:2] for index in sharding.addressable_devices_indices_map(shape).values()})
    size = sum(stop - start for start, stop in held)
    if not held or held[-1][1] - held[0][0] != size or held[0][0] % size:
        text = ", ".join(f"{start}:{stop}" for start, stop in held) or "none"
        raise ConfigError(f"mesh: process {jax.process_index()} would hold rows {text} of {rows}: use every device")
    return held[0][0] // size, rows // size


def fetch(tree):
    """Arrays that may be spread over processes, as arrays that this process has whole."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)


class StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save before it ends; a context manager.

    A second SIGINT interrupts at once. Of several processes, a signal to any stops all after the same update.
    """

    def __enter__(self):
        self._number = 0
        self._several = jax.process_count() > 1
        # With several, JAX's own handler of SIGTERM passes it on to the others; SIGINT becomes one.
        noted = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._handlers = {number: signal.signal(number, self._note) for number in noted}
        return self

    def _note(self, number, _):
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def after(self, step: int) -> int:
        """Number of the signal for which to stop after update `step`, 0 for none; call it once in every update."""
        if not self._several:
            return self._number
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Ends this process at once on an error: an orderly exit would wait for the others, and they for it.

    They notice: by a broken connection, or after `LaunchConfig.timeout`, when JAX ends them.
    """
    try:
        yield
    except ConfigError:
        raise
    except BaseException:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} failed, or lost another (see above); "
            "the same command and --run-dir continue from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(1)
