"""`python -m train.diagnose CHECKPOINT`: how far each layer left softmax attention, as JSON and a figure."""

import dataclasses
import json
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

from parallax_jax.diagnostics import attention_statistics, weight_statistics
from parallax_jax.model import ModelConfig
from train.config import parse_flags, run_command
from train.data import PackedRows, load_corpus, write_text_atomically
from train.run import check_corpus, load_checkpoint

_PANELS = {
    "correction ratio": ("correction_ratio",),
    "combined weights": ("combined_weight_min", "combined_weight_max"),
    "sink mass": ("sink_mass",),
    "entropy, nats": ("entropy",),
    "|W_R|": ("probe_norm",),
    "stable rank": tuple(f"stable_rank_{name}" for name in ("Q", "K", "V", "O", "R", "QK", "OV", "RK")),
}


def diagnose(config: ModelConfig, params, rows: PackedRows, num_rows: int) -> dict[str, list[float]]:
    """All statistics of a model by layer, those of the attention over the first rows of a split."""
    batch = [rows[i] for i in range(min(num_rows, len(rows)))]
    tokens, segments = (jnp.asarray(np.stack([row[name] for row in batch])) for name in ("inputs", "segment_ids"))
    return attention_statistics(config, params, tokens, segments) | weight_statistics(config, params)


def figure(statistics: dict[str, list[float]], title: str) -> Figure:
    """One panel per kind of statistic, over the layers."""
    drawn = Figure(figsize=(11, 6), layout="constrained")
    drawn.suptitle(title)
    for axes, (label, names) in zip(drawn.subplots(2, 3).flat, _PANELS.items(), strict=True):
        for name in names:
            if name in statistics:
                short = name.removeprefix("stable_rank_").removeprefix("combined_weight_")
                axes.plot(statistics[name], marker=".", label=short)
        axes.set(xlabel="layer", ylabel=label)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(ncols=2, fontsize="small")
    return drawn


@dataclasses.dataclass(frozen=True)
class Args:
    """Statistics of a checkpoint's attention by layer, written beside its run as JSON and as a figure."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Run folder, or one of its checkpoints/STEP."""
    rows: int = 8
    """Rows of the validation split to look at."""


def main(argv: list[str]):
    """Writes diagnostics-STEP.json and .png into the run folder."""
    args = parse_flags(Args, argv, "python -m train.diagnose")
    run = load_checkpoint(args.checkpoint)
    corpus = load_corpus(run.config)
    check_corpus(run.record, {"corpus": corpus.record}, run.folder)
    statistics = diagnose(run.model.config, run.params, corpus.rows("validation", run.config.seq_len), args.rows)
    path = run.folder / f"diagnostics-{run.step}.json"
    write_text_atomically(path, json.dumps(statistics, indent=2) + "\n")
    figure(statistics, f"{run.folder.name}, step {run.step}").savefig(path.with_suffix(".png"), dpi=150)
    print(f"{path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    run_command(main)
