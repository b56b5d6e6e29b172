"""Fine-tunes a Qwen3 as itself and converted to Parallax, on the same tokens: `python -m experiments.convert_finetune`.

Writes docs/results/convert_finetune.md. The default folder is the byte-level Qwen3 of the tests, which was trained on
the source of a Python standard library; that is the text here too. The softmax model and the rest of the converted one
have the same learning rates; the probe has those of the preset `finetune`.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from parallax_jax.model import TransformerLM
from train.config import parse_command_line
from train.data import load_corpus
from train.evaluate import Evaluator
from train.loop import train
from train.metrics import read_metrics
from train.optimizer import make_optimizer
from train.state import abstract_state, init_state, make_mesh

ROOT = Path(__file__).parents[1]
ARMS = {
    "softmax": ["--model.attention", "softmax"],
    "Parallax, probe alone": ["--optimizer.base-rate", "0"],
    "Parallax, everything": [],
}


def validation_loss(config) -> float:
    """Loss over the validation split before any update."""
    mesh, corpus = make_mesh(config), load_corpus(config)
    model, optimizer = TransformerLM(config.model), make_optimizer(config.optimizer, config.steps)
    state = init_state(model, optimizer, abstract_state(model, optimizer, mesh), config.seed, config.init_from)
    rows = corpus.rows("validation", config.seq_len)
    return Evaluator(model, rows, config.batch_size, mesh)(state.params)[0]


def main():
    """Runs every arm with every seed and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="tests/fixtures/qwen3_byte_tiny")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "convert_finetune.md")
    args = parser.parse_args()
    losses = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as runs:
        for seed in range(args.seeds):
            for i, (name, flags) in enumerate(ARMS.items()):
                shared = ["finetune", "--init-from", args.folder, "--steps", str(args.steps), "--seed", str(seed)]
                preset, config = parse_command_line([*shared, *flags])
                folder = Path(runs) / f"{i}-{seed}"
                if train(config, folder, preset):
                    sys.exit(f"{name}, seed {seed}: training failed")
                losses[name].append(
                    next(r["validation_loss"] for r in reversed(read_metrics(folder)) if "validation_loss" in r)
                )
        config = dataclasses.replace(config, dtype="float32")
        before = validation_loss(config)

    record = load_corpus(config).record
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    spread = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0
    rows = [
        f"| {name} | {' | '.join(f'{v:.4f}' for v in values)} | {statistics.mean(values):.4f} ({spread(values):.4f}) |"
        for name, values in losses.items()
    ]
    seeds = " | ".join(f"seed {seed}" for seed in range(args.seeds))
    lines = [
        "# Fine-tuning a Qwen3 as itself and converted to Parallax",
        "",
        f"`python -m experiments.convert_finetune --steps {args.steps} --seeds {args.seeds}` on {args.folder}; commit "
        f"{commit.strip()}; {jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, Python "
        f"{record['python']} (corpus sha256 {record['sha256'][:8]}…, {record['files']} files). {args.steps} updates of "
        f"{config.batch_size} rows of {config.seq_len} bytes, preset `finetune`. Loss over the whole validation split "
        f"({record['validation']['tokens']:,} tokens), in nats per byte; {before:.4f} before fine-tuning, the same for "
        "all arms. The folder was trained on another release's library, so some of the split may have been seen.",
        "",
        f"| arm | {seeds} | mean (standard deviation) |",
        f"|---|{'---|' * args.seeds}---|",
        *rows,
    ]
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
