"""Checkpoints of a run: what training resumes from, and the parameters alone for everything else."""

import concurrent.futures
import hashlib
import json
import shutil
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from train.config import ConfigError
from train.data import write_text_atomically
from train.distributed import gather_text
from train.state import TrainState

_DIGESTS = "sha256.json"


class DamagedError(Exception):
    """A checkpoint's files are not those that were written."""


class Checkpoints:
    """The checkpoints of a run: the state at its newest steps; a context manager. All processes call it alike.

    The step alone says which rows come next.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._saving = None
        self._orbax = ocp.training.Checkpointer(
            folder.resolve() / "checkpoints",
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, state: TrainState):
        """Begins to write a checkpoint, after the one before is complete; training goes on meanwhile."""
        self.wait()
        step = int(state.step)
        response = self._orbax.save_checkpointables_async(step, {"state": state})
        self._saving = self._thread.submit(self._finish, response, step)

    def _finish(self, response, step: int):
        response.result()
        if jax.process_index() == 0:
            write_text_atomically(self.path(step) / _DIGESTS, json.dumps(_digests(self.path(step)), indent=2))

    def wait(self):
        """Returns when the checkpoint being written is complete; raises what went wrong with it."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self._folder / "checkpoints" / str(step)

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, once the one being written is complete; None before the first."""
        self.wait()
        return None if self._orbax.latest is None else self._orbax.latest.step

    def restore(self, abstract: TrainState, warn) -> TrainState | None:
        """Loads the newest checkpoint that can be read; None where there is none.

        One that cannot is moved out of the way and reported by `warn(text)`.

        Raises:
          ConfigError: a checkpoint holds arrays of other shapes.
        """
        while (step := self.latest) is not None:
            path = self.path(step)
            state, intact, problem = None, False, ""
            try:
                intact = _check_files_once(path)
                _check_shapes(self._orbax.metadata(step).metadata, abstract, path)
                state = self._orbax.load_checkpointables(step, {"state": abstract})["state"]
            except Exception as error:  # whatever the storage raises on damaged files
                if intact or isinstance(error, ConfigError):
                    raise
                problem = _first_line(error)
            problem = next(filter(None, gather_text(problem)), "")
            if not problem:
                return state
            aside = self._folder / f"damaged-{step}"
            if jax.process_index() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            gather_text("moved")
            self._orbax.reload()
            before = f"using that of step {self.latest}" if self.latest is not None else "starting anew"
            warn(f"checkpoint {path} is damaged ({problem}); moved to {aside}; {before}")
        return None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()
        self._thread.shutdown()
        self._orbax.close()


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint. The storage format itself does not notice changed array data."""
    digests = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != _DIGESTS:
            with file.open("rb") as opened:
                digests[file.relative_to(path).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def _check_files(path: Path) -> bool:
    """Whether a checkpoint's files are known to be those that were written; DamagedError if they are not.

    A run killed between the last of them and their digests leaves a checkpoint that can only be tried.
    """
    if not (path / _DIGESTS).exists():
        return False
    was, now = json.loads((path / _DIGESTS).read_text()), _digests(path)
    for name in was:
        if was[name] != now.get(name):
            raise DamagedError(f"{name} is {'changed' if name in now else 'missing'}")
    return True


def _check_files_once(path: Path) -> bool:
    """`_check_files` for all processes; one reads the files."""
    outcome = ""
    if jax.process_index() == 0:
        try:
            outcome = "intact" if _check_files(path) else "unknown"
        except (DamagedError, OSError, ValueError) as error:
            outcome = _first_line(error)
    outcome = gather_text(outcome)[0]
    if outcome not in ("intact", "unknown"):
        raise DamagedError(outcome)
    return outcome == "intact"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _check_shapes(saved, wanted, path: Path):
    """Compares the array shapes of a checkpoint's metadata with those that a model needs.

    Raises:
      ConfigError: they differ; the message names the first array that does.
      DamagedError: there is no metadata.
    """
    if saved is None:
        raise DamagedError("its metadata cannot be read")
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
    path = folder.resolve() / "checkpoints" / str(step)
    intact = False
    try:
        intact = _check_files(path)
        saved = ocp.metadata(path, checkpointable_name="state").metadata
        _check_shapes(saved and saved["params"], abstract.params, path)
        partial = jax.tree.map(lambda _: ocp.PLACEHOLDER, abstract)._replace(params=abstract.params)
        return ocp.load(path, partial, checkpointable_name="state").params
    except Exception as error:
        if intact or isinstance(error, ConfigError):
            raise
        raise ConfigError(f"checkpoint {path} is damaged ({_first_line(error)}); try another of the run") from None
