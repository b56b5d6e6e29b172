"""Checkpoints of a run: what training resumes from, and the parameters alone for everything else."""

import shutil
from pathlib import Path

import grain
import jax
from orbax.checkpoint import v1 as ocp

from train.config import ConfigError
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


def check_shapes(saved, wanted, path: Path):
    """Compares the array shapes of a checkpoint's metadata with those that a model needs.

    Raises:
      ConfigError: they differ; the message names the first array that does.
    """
    shapes = [
        {jax.tree_util.keystr(key, simple=True, separator="/"): leaf.shape for key, leaf in leaves}
        for leaves in (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (saved, wanted))
    ]
    for name, shape in shapes[1].items():
        if shapes[0].get(name) != shape:
            raise ConfigError(f"checkpoint {path}: {name} is {shapes[0].get(name)}, the configuration needs {shape}")


def load_params(folder: Path, step: int, abstract: TrainState):
    """The parameters of a checkpoint, without the optimizer's state.

    Raises:
      ConfigError: the checkpoint is damaged, or its arrays have other shapes.
    """
    path = folder / "checkpoints" / str(step)
    try:
        check_shapes(ocp.metadata(path, checkpointable_name="state").metadata["params"], abstract.params, path)
        partial = jax.tree.map(lambda _: ocp.PLACEHOLDER, abstract)._replace(params=abstract.params)
        return ocp.load(path, partial, checkpointable_name="state").params
    except ConfigError:
        raise
    except Exception as error:
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ConfigError(f"checkpoint {path} cannot be read ({text})") from None
