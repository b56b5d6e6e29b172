"""Run folders: what training leaves behind, and how the other commands read it.

    runs/PRESET-TIME/  config.json  run.json  metrics.jsonl  events...  loss.png  [tokenizer.json]
                       checkpoints/STEP

STEP counts the updates applied. A run folder appears whole; a checkpoint appears when it is complete.
"""

import dataclasses
import importlib.metadata
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from parallax_jax.model import TransformerLM
from train.checkpoint import load_params
from train.config import Config, ConfigError, MeshConfig, difference
from train.data import Corpus
from train.optimizer import make_optimizer
from train.state import abstract_state, make_mesh
from train.tokenizer import Tokenizer, load_tokenizer

ONE_DEVICE = MeshConfig(data=1)
_RECORDED = ("parallax-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def run_record(preset: str, corpus: Corpus, num_params: int) -> dict:
    """What a run was made from and on: preset, corpus, versions, devices."""
    devices = jax.devices()
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return {
        "preset": preset,
        "corpus": corpus.record,
        "parameters": num_params,
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
        "versions": {name: installed.get(name) for name in _RECORDED},  # this one may run from its checkout
    }


def enter_run(folder: Path, config: Config, record: dict, tokenizer_folder: Path):
    """Makes a run's folder, or checks that the one that is there can be continued; process 0 calls it first.

    Raises:
      ConfigError: it cannot be made, holds another run, or is not one folder for all processes.
    """
    if (folder / "config.json").exists():
        check_resumable(folder, config, record)
    elif jax.process_index() == 0:
        create_run(folder, config, record, tokenizer_folder)
    else:
        raise ConfigError(f"run_dir={str(folder)!r} is not there: choose a folder on storage that all processes share")


def create_run(folder: Path, config: Config, record: dict, tokenizer_folder: Path):
    """Makes a run folder with its configuration, its record and its tokenizer.

    Raises:
      ConfigError: the folder cannot be written, or holds something else.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
        try:
            made.chmod(0o755)
            (made / "config.json").write_text(config.to_json())
            (made / "run.json").write_text(json.dumps(record, indent=2) + "\n")
            if config.tokenizer != "bytes":
                shutil.copy(tokenizer_folder / "tokenizer.json", made)
            made.rename(folder)  # onto an empty folder at most
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"run_dir={str(folder)!r} cannot be made ({error.strerror}): choose another") from None


def read_run(folder: Path) -> tuple[Config, dict]:
    """Configuration and record of a run folder.

    Raises:
      ConfigError: it is not one, or one of another version.
    """
    try:
        return Config.from_json((folder / "config.json").read_text()), json.loads((folder / "run.json").read_text())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder} is not a run folder that can be read ({error})") from None


def check_resumable(folder: Path, config: Config, record: dict):
    """Refuses to continue a run with another configuration or on other text.

    Raises:
      ConfigError: the message names the first difference.
    """
    old_config, old_record = read_run(folder)
    if changed := difference(old_config, config):
        raise ConfigError(f"run_dir={str(folder)!r} holds another run: {changed}; choose another or the same flags")
    check_corpus(old_record, record, folder)


def check_corpus(old: dict, new: dict, folder: Path):
    """Refuses to compare losses over different texts.

    Raises:
      ConfigError: the corpus is not the one that the run was trained on.
    """
    if old["corpus"]["sha256"] != new["corpus"]["sha256"]:
        was, now = (f"{r['corpus']['source']}, Python {r['corpus']['python']}" for r in (old, new))
        raise ConfigError(f"{folder} was trained on other text ({was}; here {now}): restore that, or start a new run")


def find_checkpoint(path: str) -> tuple[Path, int]:
    """Run folder and step that CHECKPOINT names: a run folder (its newest step) or one of its checkpoints.

    Raises:
      ConfigError: there is no checkpoint there.
    """
    place = Path(path)
    if place.parent.name == "checkpoints" and place.name.isdecimal() and place.is_dir():
        return place.parent.parent, int(place.name)
    steps = [int(child.name) for child in (place / "checkpoints").glob("*") if child.name.isdecimal()]
    if not steps:
        raise ConfigError(f"{path}: no checkpoint there; pass a run folder or one of its checkpoints/STEP")
    return place, max(steps)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint ready for use.

    Attributes:
      folder: the run's folder.
      step: updates applied.
      config: the run's configuration.
      record: what `run_record` noted.
      mesh: the devices that hold the parameters.
      model: the model.
      params: its parameters.
      tokenizer: the run's tokenizer.
    """

    folder: Path
    step: int
    config: Config
    record: dict
    mesh: jax.sharding.Mesh
    model: TransformerLM
    params: Any
    tokenizer: Tokenizer


def load_checkpoint(path: str, devices: MeshConfig = ONE_DEVICE) -> Loaded:
    """Loads a run folder's newest checkpoint, or the one named, onto `devices`, whichever ones the run had.

    Raises:
      ConfigError: there is none, or it does not fit its run's configuration or this machine's devices.
    """
    folder, step = find_checkpoint(path)
    config, record = read_run(folder)
    config = dataclasses.replace(config, mesh=devices)
    mesh = make_mesh(config)
    model = TransformerLM(config.resolved_model(jax.default_backend()))
    abstract = abstract_state(model, make_optimizer(config.optimizer, config.steps), mesh)
    params = load_params(folder, step, abstract)
    return Loaded(folder, step, config, record, mesh, model, params, load_tokenizer(config, folder))
