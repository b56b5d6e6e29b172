"""Where a run's numbers go: JSON lines, TensorBoard, a curve, the terminal."""

import contextlib
import json
import time
from pathlib import Path

import rich.console
import rich.progress
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from train.data import write_text_atomically


class MetricWriter:
    """Appends metrics to metrics.jsonl and TensorBoard's events; a context manager.

    A resumed run takes back the lines after its step, so that every step is there once.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(folder) if record["step"] <= step]
        write_text_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._lines = path.open("a", buffering=1)
        self._events = EventFileWriter(str(folder))
        self._events.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, **values: float):
        """Records scalars after `step` updates."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._events.add_event(Event(step=step, wall_time=time.time(), summary=summary))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._lines.close()
        self._events.close()


class NoMetrics(contextlib.AbstractContextManager):
    """A `MetricWriter` that drops everything, for all processes but the first."""

    def write(self, step: int, **values: float):
        """Does nothing."""

    def __exit__(self, *_):
        pass


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run's metrics.jsonl; a last line cut off by a crash is dropped."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def save_loss_curve(folder: Path):
    """Draws loss.png from a run's metrics."""
    records = read_metrics(folder)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (
        ("loss", "loss", {"linewidth": 0.8}),
        ("validation_loss_part", "validation loss, a part of the split", {"marker": "o"}),
        ("validation_loss", "validation loss, the whole split", {"marker": "*", "markersize": 11, "linestyle": ""}),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), label=label, **style) if points else None
    axes.set(xlabel="update", ylabel="nats per token", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)


class Progress:
    """A bar with loss, tokens/s and time left on a terminal, else a line every few steps; a context manager.

    `quiet` shows nothing, for all processes but the first.
    """

    def __init__(self, start: int, steps: int, log_interval: int, quiet: bool = False):
        self._console = rich.console.Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._steps, self._log_interval = steps, log_interval
        self._window = [(start, 0, time.perf_counter())]  # (step, tokens so far, time) of the last few steps
        self._bar = None
        if self._console.is_terminal:
            columns = ("step {task.completed}/{task.total}", rich.progress.BarColumn(), "{task.description}")
            self._bar = rich.progress.Progress(
                *columns, rich.progress.TimeRemainingColumn(elapsed_when_finished=True), console=self._console
            )
            self._task = self._bar.add_task("compiling", total=steps, completed=start)

    def update(self, step: int, loss: float, tokens: int) -> float:
        """Shows the loss after `step` updates; returns the tokens per second of the last few steps."""
        _, total, _ = self._window[-1]
        self._window = [*self._window[-20:], (step, total + tokens, time.perf_counter())]
        # The first entry ends before compilation: it serves only until there are two steps.
        (_, first, began), (_, last, ended) = self._window[1 if len(self._window) > 2 else 0], self._window[-1]
        speed = (last - first) / (ended - began)
        text = f"loss {loss:.4f}  {speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif step % self._log_interval == 0 or step == self._steps:
            left = (self._steps - step) * (ended - began) / max(1, len(self._window) - 2)
            self.print(f"step {step}/{self._steps}  {text}  {left:.0f} s left")
        return speed

    def print(self, text: str):
        """Prints a line, above the bar if there is one."""
        self._console.print(text, markup=False)

    def __enter__(self):
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()
