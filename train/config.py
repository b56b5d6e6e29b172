"""What a run is made of: frozen dataclasses, presets from configs/, and the command line over them."""

import contextlib
import dataclasses
import difflib
import importlib
import io
import json
import pkgutil
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

import configs
from parallax_jax.model import ModelConfig
from parallax_jax.pretrained import pretrained_config

NUM_BYTES = 256


class ConfigError(Exception):
    """The user asked for something that cannot be done; the message is one line that says what to change."""


def _require(ok: bool, message: str):
    if not ok:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Muon for the matrices and Adam for the rest, or Adam for all; the paper's values by default (table 2b)."""

    name: Literal["muon", "adamw"] = "muon"
    """Optimizer of the weight matrices. Embeddings, norms and biases always go to Adam."""
    learning_rate: float = 5e-3
    """Peak learning rate."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """Warm-up, then constant with a linear decay to 0 at the end (wsd), or a cosine to 0."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_fraction: float = 0.2
    """Share of all steps in which wsd decays."""
    weight_decay: float = 0.1
    """Decay of the weight matrices, multiplied by the learning rate."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients; applied before the optimizer."""
    momentum: float = 0.95
    """Muon's momentum (Nesterov)."""
    newton_schulz_steps: int = 5
    """Iterations of Muon's orthogonalisation."""
    newton_schulz_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of those iterations. Each device takes its share of the matrices."""
    scaling: Literal["spectral", "width", "consistent_rms"] = "spectral"
    """Factor of Muon's update: sqrt(out/in), sqrt(max(1, out/in)), or 0.2 sqrt(max(in, out))."""
    per_head: bool = False
    """Orthogonalise each head of a projection by itself, not the projection as one matrix."""
    adam_b1: float = 0.8
    """Adam's decay of the first moment."""
    adam_b2: float = 0.95
    """Adam's decay of the second moment."""
    adam_eps: float = 1e-7
    """Adam's epsilon."""
    adam_weight_decay: float = 0.0
    """Decay of embeddings, norms and biases, multiplied by their learning rate."""
    embedding_rate: float = 0.3
    """Learning rate of the embedding and the output projection, relative to `learning_rate`."""
    norm_rate: float = 0.015
    """Learning rate of norms and biases, relative to `learning_rate`."""
    probe_norm_rate: float | None = None
    """Learning rate of the probe's norm, relative to `learning_rate`; None for `norm_rate`."""
    probe_rate: float = 1.0
    """Learning rate of the probe's projection, relative to its group's."""
    base_rate: float = 1.0
    """Learning rate of all but the probe, relative to their groups'; 0 freezes them and trains the probe alone."""

    def __post_init__(self):
        _require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate}: it must be above 0")
        _require(self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm}: it must be above 0")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps}: it must be 0 or more")
        _require(0 <= self.decay_fraction <= 1, f"optimizer.decay_fraction={self.decay_fraction}: it must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes."""

    data: int | None = None
    """Devices that split the batch; None for all that the other axes leave."""
    fsdp: int = 1
    """Devices that split the batch and the parameters."""
    tensor: int = 1
    """Devices that split heads and hidden units."""
    context: int = 1
    """Devices that split the tokens of a row."""

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            _require(size is None or size >= 1, f"mesh.{name}={size}: it must be 1 or more")


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How the processes of a run meet. Under srun and mpirun, and in pods with jax[k8s], they do so without flags."""

    coordinator: str | None = None
    """HOST:PORT of process 0, which all of them can reach."""
    num_processes: int | None = None
    """Number of processes; 1 starts one alone whatever launched it."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    timeout: int = 60
    """Seconds of silence after which a process counts as dead, and the others end."""

    def __post_init__(self):
        _require(self.timeout >= 1, f"launch.timeout={self.timeout}: it must be 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    model: ModelConfig
    init_from: str | None = None
    """Hugging Face folder of a pretrained model to start from. The model's shape becomes that of the folder, and its
    tokenizer.json is used if it has one; a Qwen3 becomes what model.attention says."""
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    data: str = "stdlib"
    """Text file or folder to train on; stdlib for the source of Python's own standard library, site-packages for that
    of the packages installed beside this one."""
    tokenizer: Literal["bytes", "bpe", "pretrained"] = "bytes"
    """Bytes, or byte-level BPE of model.vocab_size tokens trained on the training split; pretrained: tokenizer.json of
    `init_from`, which is set for you."""
    separator: int | None = None
    """Token that parts documents; None for the tokenizer's own. With a pretrained tokenizer its end of text."""
    seq_len: int = 256
    """Tokens of a row."""
    batch_size: int = 32
    """Rows of one update, over all devices."""
    accumulation_steps: int = 1
    """Parts in which the rows of one update are computed, one after another."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the matrices' gradients of a part are computed and added up over devices; bfloat16 moves half the
    bytes. Parts always add up in float32."""
    loss_chunk: int = 4096
    """Tokens whose logits exist at once, on each device; the loss does not depend on it."""
    steps: int = 1000
    """Updates."""
    seed: int = 0
    """Seed of the parameters and of the order of the rows."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; auto: bfloat16 on GPU and TPU, float32 on CPU. Parameters are float32."""
    log_interval: int = 10
    """Steps between two lines of output where there is no terminal for a progress bar."""
    eval_interval: int = 100
    """Steps between two looks at the validation split."""
    eval_batches: int = 8
    """Batches of such a look; the last one, after training, takes the whole split."""
    diagnose_rows: int = 0
    """Rows of the validation split whose attention each look describes, layer by layer, in the metrics; 0 for none."""
    checkpoint_interval: int = 100
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    profile: int | None = None
    """First of three updates of which a trace is written to the run's folder, for TensorBoard or Perfetto."""
    prompt: str = "def "
    """Start of the sample that training ends with."""
    run_dir: str | None = None
    """Folder of the run; that of an unfinished run continues it. None for runs/PRESET-TIME."""
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self):
        for name in (
            *("seq_len", "batch_size", "accumulation_steps", "loss_chunk", "steps", "log_interval", "eval_interval"),
            *("eval_batches", "checkpoint_interval"),
        ):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: it must be 1 or more")
        _require(self.diagnose_rows >= 0, f"diagnose_rows={self.diagnose_rows}: it must be 0 or more")
        _require(self.keep_checkpoints >= 2, f"keep_checkpoints={self.keep_checkpoints}: it must be 2 or more")
        _require(
            self.batch_size % self.accumulation_steps == 0,
            f"batch_size={self.batch_size}: it must be a multiple of accumulation_steps={self.accumulation_steps}",
        )
        # A model of 256 tokens has none to spare for the separator: the NUL byte, which no text has, serves as it.
        least = NUM_BYTES + (self.tokenizer == "bpe")
        if self.tokenizer != "pretrained":
            _require(
                self.model.vocab_size >= least, f"model.vocab_size={self.model.vocab_size}: it must be {least} or more"
            )
        _require(self.tokenizer != "pretrained" or self.init_from is not None, "tokenizer='pretrained': set init_from")
        _require(
            self.optimizer.base_rate > 0 or self.model.attention == "parallax",
            "optimizer.base_rate=0.0: it must be above 0 for a model without a probe",
        )
        _require(self.model.dtype == "float32", f"model.dtype={self.model.dtype!r}: set dtype instead")

    def resolved_model(self, platform: str) -> ModelConfig:
        """The model with its dtype decided for `platform` ("cpu", "gpu", "tpu")."""
        auto = "float32" if platform == "cpu" else "bfloat16"
        return dataclasses.replace(self.model, dtype=auto if self.dtype == "auto" else self.dtype)

    def pretrained(self) -> "Config":
        """This run with the shape and the tokenizer of the folder that `init_from` names; itself where it names none.

        Raises:
          ConfigError: the folder cannot be used.
        """
        if self.init_from is None:
            return self
        folder = Path(self.init_from)
        try:
            model = pretrained_config(folder, attention=self.model.attention, dtype="float32")
            model = dataclasses.replace(model, remat=self.model.remat, implementation=self.model.implementation)
            changes = {"model": model}
            if (folder / "tokenizer.json").exists():
                separator = end_of_text(folder) if self.separator is None else self.separator
                changes |= {"tokenizer": "pretrained", "separator": separator}
            return dataclasses.replace(self, **changes)
        except (OSError, ValueError) as error:
            raise ConfigError(f"init_from={self.init_from!r}: {error}") from None

    def to_json(self) -> str:
        """The configuration as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Inverse of `to_json`; TypeError or ValueError where the text is not a configuration."""
        return _from_dict(cls, json.loads(text))


def end_of_text(folder: Path) -> int:
    """Id of the token with which a pretrained model ends a text.

    Raises:
      ValueError: the folder does not say.
    """
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            ids = json.loads((folder / name).read_text()).get("eos_token_id")
            if ids is not None:
                return ids[0] if isinstance(ids, list) else ids
    raise ValueError("config.json has no eos_token_id, which parts documents: pass --separator ID")


def _from_dict(cls: type, values: dict[str, Any]):
    types = typing.get_type_hints(cls)
    return cls(**{k: _from_dict(types[k], v) if dataclasses.is_dataclass(types[k]) else v for k, v in values.items()})


def difference(a: Config, b: Config) -> str | None:
    """The first field in which two runs differ, as text; where and on what they run does not count. None for no field.

    A run may go on over another mesh or number of processes: its rows and their order stay the same.
    """

    def flat(values, prefix=""):
        for key, value in values.items():
            if key in ("run_dir", "mesh", "launch", "profile"):
                continue
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    for (name, old), (_, new) in zip(flat(dataclasses.asdict(a)), flat(dataclasses.asdict(b)), strict=True):
        if old != new:
            return f"{name} is {old!r} there and {new!r} here"
    return None


def preset_names() -> list[str]:
    """Names that `python -m train` accepts."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__) if not module.ispkg)


def load_preset(name: str) -> Config:
    """The configuration of a preset.

    Raises:
      ConfigError: there is no such preset.
    """
    names = preset_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(names)}{hint}")
    return importlib.import_module(f"configs.{name}").config


def parse_command_line(argv: Sequence[str]) -> tuple[str, Config]:
    """Reads `[PRESET] [--flags]` into the preset's name and its configuration with the flags applied.

    Raises:
      ConfigError: unknown preset or flag, a value that is not allowed, or a pretrained folder that cannot be used.
      SystemExit: `--help` was asked for and printed.
    """
    named = bool(argv) and not argv[0].startswith("-")
    preset = argv[0] if named else "laptop"
    config = parse_flags(Config, argv[1:] if named else argv, f"python -m train {preset}", load_preset(preset))
    return preset, config.pretrained()


def parse_flags(cls: type, argv: Sequence[str], prog: str, default: Any = None):
    """`tyro.cli`, with its errors as one-line ConfigErrors."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            defaults = {} if default is None else {"default": default}
            return tyro.cli(cls, args=list(argv), prog=prog, **defaults)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_first_message(stderr.getvalue())} (flags: {prog} --help)") from None


def _first_message(box: str) -> str:
    """The message of tyro's error box, without the frame and the help text around it."""
    blocks = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯─ ")
        blocks[-1].append(text) if text else blocks.append([])
    message = " ".join(blocks[0])
    if len(blocks) > 1 and blocks[1] and blocks[1][0].startswith("Perhaps you meant"):
        message += f"; perhaps you meant {blocks[1][1].split()[0]}"
    return message


def run_command(main: Callable[[list[str]], int | None]):
    """Runs a command and exits; where the user must change something, with one line on stderr and code 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
