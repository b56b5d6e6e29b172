"""`python -m train.evaluate CHECKPOINT`: loss, perplexity and bits per byte on the validation split."""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from parallax_jax.model import TransformerLM
from train.config import parse_flags, run_command
from train.data import PackedRows, load_corpus
from train.run import check_corpus, load_checkpoint
from train.state import device_batch, token_losses


class Evaluator:
    """Mean loss of parameters on a split's rows, batch after batch in a fixed order."""

    def __init__(self, model: TransformerLM, rows: PackedRows, batch_size: int, mesh: jax.sharding.Mesh):
        self._rows, self._batch_size, self._mesh = rows, batch_size, mesh

        @jax.jit
        def sums(params, batch):
            batch = jax.tree.map(lambda leaf: leaf[0], batch)
            return jnp.sum(token_losses(model, params, batch)), jnp.sum(batch["segment_ids"] > 0)

        self._sums = sums

    def __call__(self, params, max_batches: int | None = None) -> tuple[float, int]:
        """Returns the mean loss in nats per token over the first batches (None for all), and their tokens."""
        totals = []
        for first in range(0, len(self._rows), self._batch_size)[:max_batches]:
            rows = [self._rows[i] for i in range(first, min(first + self._batch_size, len(self._rows)))]
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            padding = ((0, self._batch_size - len(rows)), (0, 0))
            batch = {name: np.pad(value, padding) for name, value in batch.items()}
            totals.append(self._sums(params, device_batch(self._mesh, batch, 1)))
        nats, tokens = (math.fsum(float(value) for value in column) for column in zip(*totals, strict=True))
        return nats / tokens, int(tokens)


def describe(loss: float, tokens: int, split: dict) -> str:
    """One line on a loss over a whole split; `split` is the corpus's record of it."""
    bits_per_byte = loss * tokens / split["bytes"] / math.log(2)
    return (
        f"validation loss {loss:.6f} nats/token, perplexity {math.exp(loss):.4f}, {bits_per_byte:.4f} bits/byte "
        f"({tokens:,} tokens, {split['bytes']:,} bytes)"
    )


@dataclasses.dataclass(frozen=True)
class Args:
    """Loss, perplexity and bits per byte of a checkpoint on its validation split."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Run folder, or one of its checkpoints/STEP."""


def main(argv: list[str]):
    """Evaluates the checkpoint that the command line names."""
    args = parse_flags(Args, argv, "python -m train.evaluate")
    loaded = load_checkpoint(args.checkpoint)
    corpus = load_corpus(loaded.config)
    check_corpus(loaded.record, {"corpus": corpus.record}, loaded.folder)
    rows = corpus.rows("validation", loaded.config.seq_len)
    part = loaded.config.batch_size // loaded.config.accumulation_steps
    print(describe(*Evaluator(loaded.model, rows, part, loaded.mesh)(loaded.params), corpus.record["validation"]))


if __name__ == "__main__":
    run_command(main)
