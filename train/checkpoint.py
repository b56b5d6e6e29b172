"""Run folders and their checkpoints.

    runs/PRESET-TIME/  config.json  run.json  metrics.jsonl  events...  loss.png  [tokenizer.json]
                       checkpoints/STEP/{state,data}

STEP counts the updates applied. A run folder appears whole; a checkpoint appears when it is complete.
"""

import json
import shutil
import tempfile
from pathlib import Path

import grain
import jax
from orbax.checkpoint import v1 as ocp

from train.config import Config, ConfigError, difference
from train.state import TrainState


class Checkpoints:
    """The checkpoints of a run: the state and the data iterator of its newest steps; a context manager."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        self._orbax = ocp.training.Checkpointer(
            folder.resolve() / "checkpoints",
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, state: TrainState, data: grain.DatasetIterator):
        """Begins to write a checkpoint, after the one before is complete; training goes on meanwhile."""
        self._orbax.save_checkpointables_async(int(state.step), {"state": state, "data": data})

    def path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self._folder / "checkpoints" / str(step)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        self._orbax.wait()
        return None if self._orbax.latest is None else self._orbax.latest.step

    def restore(self, abstract: TrainState, data: grain.DatasetIterator, warn) -> TrainState | None:
        """Loads the newest checkpoint that can be read, and sets `data` to its place; None where there is none.

        One that cannot is moved out of the way and reported by `warn(text)`.

        Raises:
          ConfigError: a checkpoint holds arrays of other shapes.
        """
        while (step := self.latest) is not None:
            try:
                check_shapes(self._orbax.metadata(step).metadata, abstract, self.path(step))
                loaded = self._orbax.load_checkpointables(step, {"state": abstract, "data": data})
                return loaded["state"]
            except ConfigError:
                raise
            except Exception as error:  # whatever the storage raises on damaged files
                aside = self._folder / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                self.path(step).rename(aside)
                self._orbax.reload()
                text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                before = f"using that of step {self.latest}" if self.latest is not None else "starting anew"
                warn(f"checkpoint {self.path(step)} is damaged ({text}); moved to {aside}; {before}")
        return None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._orbax.close()
