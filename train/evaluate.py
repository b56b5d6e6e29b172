"""`python -m train.evaluate CHECKPOINT`: loss, perplexity and bits per byte on the validation split."""

import dataclasses
import math
from typing import Annotated

import jax
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from parallax_jax.model import TransformerLM
from parallax_jax.sharding import on_mesh
from train.config import MeshConfig, parse_flags, run_command
from train.data import PackedRows, load_corpus
from train.distributed import share_of_rows
from train.run import ONE_DEVICE, check_corpus, load_checkpoint
from train.state import batch_sharding, device_batch, real_tokens, sum_of_losses


class Evaluator:
    """Mean loss of parameters on a split's rows, batch after batch in a fixed order; each process reads its share."""

    def __init__(
        self, model: TransformerLM, rows: PackedRows, batch_size: int, mesh: jax.sharding.Mesh, loss_chunk: int = 4096
    ):
        self._rows, self._batch_size, self._mesh = rows, batch_size, mesh
        self._blank = jax.tree.map(np.zeros_like, rows[0])
        block, blocks = share_of_rows(batch_sharding(mesh), (1, batch_size, len(self._blank["inputs"])))
        self._mine = slice(block * batch_size // blocks, (block + 1) * batch_size // blocks)

        def sums(params, batch):
            batch = jax.tree.map(lambda leaf: leaf[0], batch)
            return sum_of_losses(model, params, batch, loss_chunk), real_tokens(batch)

        self._sums = jax.jit(on_mesh(mesh, sums), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, params, max_batches: int | None = None) -> tuple[float, int]:
        """Returns the mean loss in nats per token over the first batches (None for all), and their tokens."""
        totals = []
        for first in range(0, len(self._rows), self._batch_size)[:max_batches]:
            mine = range(first, first + self._batch_size)[self._mine]
            rows = [self._rows[i] if i < len(self._rows) else self._blank for i in mine]
            batch = {name: np.stack([row[name] for row in rows]) for name in self._blank}
            batch = device_batch(self._mesh, batch, 1)
            jax.block_until_ready(totals[-1:])  # collectives of two programs at a time can block one another on CPUs
            totals.append(self._sums(params, batch))
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
    mesh: MeshConfig = ONE_DEVICE
    """Devices to use; they need not be those of the run."""


def main(argv: list[str]):
    """Evaluates the checkpoint that the command line names."""
    args = parse_flags(Args, argv, "python -m train.evaluate")
    loaded = load_checkpoint(args.checkpoint, args.mesh)
    corpus = load_corpus(loaded.config)
    check_corpus(loaded.record, {"corpus": corpus.record}, loaded.folder)
    rows = corpus.rows("validation", loaded.config.seq_len)
    part = loaded.config.batch_size // loaded.config.accumulation_steps
    evaluate = Evaluator(loaded.model, rows, part, loaded.mesh, loaded.config.loss_chunk)
    print(describe(*evaluate(loaded.params), corpus.record["validation"]))


if __name__ == "__main__":
    run_command(main)
