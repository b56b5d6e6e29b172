"""Does Muon open a gap between Parallax and softmax attention that AdamW does not (arXiv 2605.29157, section 4.3)?

    python -m experiments.codesign --minutes 5   # goes on with what docs/results/codesign.jsonl lacks
    python -m experiments.codesign --report      # docs/results/codesign.md and codesign.png from it, without training

Byte-level language models of some 10 M parameters (`--size small`; `medium` is some 50 M) on the source of the
installed Python packages, which lies on the device; a batch is random windows of it, the same ones for a seed in every
arm. The optimizers differ in how they treat the weight matrices alone: embeddings and norm gains have the same Adam at
the same rates in all arms. The paper's runs also differ there, by a factor of four in the gains' rate.

Each arm's rate is the best of a sweep of short runs with a seed of its own; the two variants of Parallax take that of
Parallax. An arm is compiled once, for all rates, lengths and seeds. Every run appends one line to the log, so that the
experiment can be done in slices.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Read when the GPU backend starts: cuDNN's attention cannot be recorded into a graph while other threads use the GPU.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from parallax_jax.diagnostics import attention_statistics, weight_statistics
from parallax_jax.model import ModelConfig, TransformerLM
from train.config import Config, OptimizerConfig
from train.data import load_corpus
from train.optimizer import group_of, make_optimizer

LOG = Path(__file__).parents[1] / "docs" / "results" / "codesign.jsonl"
VOCAB, WARMUP, DECAY = 257, 20, 0.2
RATES = {"muon": (1e-2, 2e-2, 4e-2, 8e-2), "adamw": (2.5e-4, 5e-4, 1e-3, 2e-3)}
OTHER_RATES = {"embedding": 1.5e-3, "norm": 3e-4}  # the same for both optimizers
LOOKS = 4  # evenly spaced moments at which a run's attention and weights are described


@dataclasses.dataclass(frozen=True)
class Size:
    """A model without a probe, and the batch it is trained on."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    batch: int
    seq_len: int
    head_dim: int = 64


SIZES = {
    "tiny": Size(2, 64, 2, 128, batch=4, seq_len=64, head_dim=16),
    "small": Size(6, 384, 6, 1024, batch=64, seq_len=1024),
    "medium": Size(12, 640, 10, 1728, batch=64, seq_len=1024),
}
# Parameter-matched softmax has half as many query heads again; compute-matched Parallax half the head width, and its
# MLP is as wide as the parameters allow: the paper's two controls.
ARMS = {
    "softmax": {},
    "softmax, matched parameters": {"heads": 1.5},
    "Parallax": {"attention": "parallax"},
    "Parallax, matched compute": {"attention": "parallax", "head_dim": 0.5},
    "Parallax, gate": {"attention": "parallax", "probe_gate": True},
    "Parallax, no RoPE on the probe": {"attention": "parallax", "probe_rope": False},
}
RATE_OF = {"Parallax, gate": "Parallax", "Parallax, no RoPE on the probe": "Parallax"}


def model_config(arm: str, size: Size, dtype: str, implementation: str | None) -> ModelConfig:
    """The model of an arm; one key/value head for two query heads of the plain model."""
    options = dict(ARMS[arm])
    heads, head_dim = round(size.heads * options.pop("heads", 1)), round(size.head_dim * options.pop("head_dim", 1))
    kv_heads, mlp_width = size.heads // 2, size.mlp_width
    if head_dim < size.head_dim:
        per_column = 3 * heads + 2 * kv_heads  # query, probe, output; key, value
        mlp_width += per_column * (size.head_dim - head_dim) // 3
    shape = (VOCAB, size.layers, size.width, heads, kv_heads, head_dim, mlp_width)
    options = {"attention": "softmax", "rope_theta": 1e4, "dtype": dtype, "implementation": implementation} | options
    return ModelConfig(*shape, **options)


class Run(NamedTuple):
    """One training run."""

    arm: str
    optimizer: str
    rate: float
    seed: int
    steps: int
    stage: str


class Arm:
    """The compiled training of an arm under an optimizer: `chunk` updates a call, then the validation loss."""

    def __init__(
        self, config: ModelConfig, optimizer: str, size: Size, chunk: int, validation: np.ndarray, corpus: int
    ):
        self.config, self.size, self.chunk = config, size, chunk
        self._model, self._validation = TransformerLM(config), jnp.asarray(validation)
        # Updates are linear in the learning rate, so the optimizer's own rates are 1 and `_update` multiplies.
        units = OptimizerConfig(
            name=optimizer,
            learning_rate=1.0,
            decay_fraction=0.0,
            embedding_rate=1.0,
            norm_rate=1.0,
            adam_b1=0.9,
            adam_eps=1e-8,
        )
        self._optimizer = make_optimizer(units, steps=2**30)
        state = jax.eval_shape(self._init, jax.random.key(0))
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
        tokens, scalar = jax.ShapeDtypeStruct((corpus,), jnp.uint16), jax.ShapeDtypeStruct((), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        self.init = jax.jit(self._init).lower(key).compile()
        self._describe(self.init(jax.random.key(0))[0])  # compiles
        self.advance = (
            jax.jit(self._advance, donate_argnums=0).lower(state, tokens, key, scalar, scalar, scalar).compile()
        )

    def _init(self, key):
        params = nn.meta.unbox(self._model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
        return params, self._optimizer.init(params)

    def _describe(self, params) -> dict[str, list[float]]:
        rows = self._validation[:2, :-1].astype(jnp.int32)
        found = attention_statistics(self.config, params, rows) | weight_statistics(self.config, params)
        return {name: [float(f"{x:.4g}") for x in values] for name, values in found.items()}

    def _loss(self, params, windows):
        logits = self._model.apply({"params": params}, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def _advance(self, state, tokens, key, begin, steps, rate):
        """`chunk` updates from `begin` on of `steps`; the state, the training losses and the validation loss."""
        size = self.size

        def update(carry, step):
            params, opt_state = carry
            starts = jax.random.randint(
                jax.random.fold_in(key, step.astype(jnp.int32)), (size.batch,), 0, tokens.size - size.seq_len
            )
            windows = tokens[starts[:, None] + jnp.arange(size.seq_len + 1)].astype(jnp.int32)
            loss, grads = jax.value_and_grad(self._loss)(params, windows)
            updates, opt_state = self._optimizer.update(grads, opt_state, params)
            now = jnp.clip(jnp.minimum((step + 1) / WARMUP, (steps - step) / (DECAY * steps)), 0.0, 1.0)
            rates = {"matrix": rate, **OTHER_RATES}
            scaled = jax.tree.map_with_path(lambda p, u: u * (now * rates[group_of(_names(p))]), updates)
            return (optax.apply_updates(params, scaled), opt_state), loss

        state, losses = jax.lax.scan(update, state, begin + jnp.arange(self.chunk, dtype=jnp.float32))
        parts = self._validation.reshape(-1, min(size.batch, len(self._validation)), size.seq_len + 1).astype(jnp.int32)
        validation = jax.lax.map(functools.partial(self._loss, state[0]), parts).mean()
        return state, losses, validation

    def warm_up(self, tokens):
        """Runs `advance` once: cuDNN records its attention at first, which fails while other threads use the GPU."""
        key, scalars = jax.random.key(0), (jnp.float32(x) for x in (0, self.chunk, 0))
        jax.block_until_ready(self.advance(self.init(key), tokens, key, *scalars))

    def train(self, run: Run, tokens, pool: ThreadPoolExecutor) -> tuple[dict, dict[int, Future]]:
        """Trains a run. `pool` describes the model at the start and at `LOOKS` moments while training goes on."""
        state, key = self.init(jax.random.key(run.seed)), jax.random.key(10_000 + run.seed)
        jax.block_until_ready(state)
        began, losses, validation, looks = time.perf_counter(), [], [], {}
        looking = {round(run.steps * i / LOOKS / self.chunk) * self.chunk for i in range(1, LOOKS + 1)}

        if run.stage == "final":
            looks[0] = pool.submit(self._describe, jax.device_get(state[0]))
        for begin in range(0, run.steps, self.chunk):
            scalars = (jnp.float32(x) for x in (begin, run.steps, run.rate))
            state, some, loss = self.advance(state, tokens, key, *scalars)
            losses.append(some)
            validation.append(loss)
            if run.stage == "final" and begin + self.chunk in looking:
                looks[begin + self.chunk] = pool.submit(self._describe, jax.device_get(state[0]))
        losses, validation = np.concatenate(jax.device_get(losses)), jax.device_get(validation)
        seconds = time.perf_counter() - began
        every = max(1, self.chunk // 5)
        row = {
            "validation_loss": float(validation[-1]),
            "validation_losses": [round(float(x), 4) for x in validation],
            "train_losses": [round(float(x), 4) for x in losses.reshape(-1, every).mean(1)],
            "chunk": self.chunk,
            "parameters": self.parameters,
            "tokens": run.steps * self.size.batch * self.size.seq_len,
            "seconds": round(seconds, 2),
        }
        return row, looks


def _names(path) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def read_log(path: Path) -> list[dict]:
    """The runs logged so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def planned(args: argparse.Namespace, rows: list[dict]):
    """The runs still to do that are known: all sweeps, then by seed the arms whose sweep is done, variants last."""
    arms = [(arm, optimizer) for arm in args.arms for optimizer in args.optimizers]

    def has(run: Run):
        wanted = run._asdict() | {"size": args.size}
        return any(wanted.items() <= row.items() for row in rows)

    swept = dict.fromkeys((RATE_OF.get(arm, arm), optimizer) for arm, optimizer in arms)
    sweeps = [
        Run(arm, name, rate, 0, args.sweep_steps, "sweep") for arm, name in swept for rate in args.rates or RATES[name]
    ]
    yield from (run for run in sweeps if not has(run))
    finals = itertools.product(range(1, args.seeds + 1), arms)
    for seed, (arm, optimizer) in sorted(finals, key=lambda x: x[1][0] in RATE_OF):
        rate = best_rate(rows, args.size, RATE_OF.get(arm, arm), optimizer, args.sweep_steps)
        run = Run(arm, optimizer, rate, seed, args.steps, "final")
        if not has(run):
            yield run


def best_rate(rows: list[dict], size: str, arm: str, optimizer: str, steps: int) -> float | None:
    """The rate with the lowest validation loss in the sweep; None before the sweep."""
    key = {"stage": "sweep", "size": size, "arm": arm, "optimizer": optimizer, "steps": steps}
    swept = [row for row in rows if key.items() <= row.items() and np.isfinite(row["validation_loss"])]
    return min(swept, key=lambda row: row["validation_loss"])["rate"] if swept else None


def train_all(args: argparse.Namespace):
    """Does what the log lacks, as far as the minutes go."""
    began = time.perf_counter()
    left = lambda: 60 * args.minutes - (time.perf_counter() - began)
    size, rows = SIZES[args.size], read_log(args.log)
    unwritten: list[tuple[dict, dict[int, Future]]] = []
    # The corpus does not depend on the model of this configuration.
    corpus = load_corpus(Config(model=ModelConfig(VOCAB, 1, 2, 1, 1, 2, 1), data=args.data))
    dtype = np.dtype(corpus.record["dtype"])
    train, held_out = (np.fromfile(corpus.folder / f"{split}.bin", dtype) for split in ("train", "validation"))
    starts = np.linspace(0, len(held_out) - size.seq_len - 1, args.validation_rows).astype(int)
    validation = held_out[starts[:, None] + np.arange(size.seq_len + 1)].astype(np.uint16)
    tokens = jax.device_put(train.astype(np.uint16))
    about = {
        "size": args.size,
        "corpus": {name: corpus.record[name] for name in ("source", "sha256", "files", "bytes", "python")},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": args.commit,
        "dtype": args.dtype,
        "implementation": args.implementation,
    }
    if any(row["corpus"]["sha256"] != about["corpus"]["sha256"] for row in rows):
        raise SystemExit(f"--log {args.log}: its runs are of another corpus, and their losses do not compare")
    print(f"{left():.0f} s left: corpus of {len(train):,} tokens", flush=True)

    with (
        ThreadPoolExecutor(4) as compilers,
        ThreadPoolExecutor(4) as describers,
        args.log.open("a", buffering=1) as log,
    ):

        @functools.cache
        def compiled(arm: str, optimizer: str) -> Future:
            config = model_config(arm, size, args.dtype, args.implementation)
            return compilers.submit(Arm, config, optimizer, size, args.chunk, validation, len(train))

        def write(ready):
            """Logs the runs whose descriptions are there, or all."""
            while unwritten and ready(unwritten[0][1]):
                row, looks = unwritten.pop(0)
                row["statistics"] = {str(step): look.result() for step, look in looks.items()}
                log.write(json.dumps(row) + "\n")

        arms = dict.fromkeys((run.arm, run.optimizer) for run in planned(args, rows))
        programs = [future.result() for future in [compiled(*arm) for arm in arms]]
        for program in programs:
            program.warm_up(tokens)
        print(f"{left():.0f} s left: {len(programs)} arms compiled", flush=True)
        seconds = {}  # arm -> of one update
        while (run := next(planned(args, rows), None)) is not None:
            program = compiled(run.arm, run.optimizer).result()
            name = (run.arm, run.optimizer)
            expected = run.steps * seconds.get(name, max(seconds.values(), default=0.0))
            if expected > left():
                print(f"stopped: the next run would take {expected:.0f} s and {left():.0f} s are left", flush=True)
                break
            row, looks = program.train(run, tokens, describers)
            row = run._asdict() | row | about
            seconds[name] = row["seconds"] / run.steps
            rows.append(row)
            unwritten.append((row, looks))
            write(lambda looks: all(look.done() for look in looks.values()))
            speed = row["tokens"] / row["seconds"] / 1e6
            print(
                f"{left():.0f} s left: {run.stage} {run.arm}, {run.optimizer} {run.rate:g}, seed {run.seed}: "
                f"{row['validation_loss']:.4f} in {row['seconds']:.1f} s, {speed:.2f} M tokens/s",
                flush=True,
            )
        write(lambda _: True)
        compilers.shutdown(wait=False, cancel_futures=True)


def main():
    """Trains, or writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="write the page and the figure from the log")
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--minutes", type=float, default=5.0, help="begin no run that would end later")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--optimizers", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--rates", nargs="+", type=float, help="of the sweep; default: the optimizer's")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sweep-steps", type=int, default=100)
    parser.add_argument("--chunk", type=int, default=50, help="updates in a call; divides both numbers of steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default="site-packages", help="as in python -m train")
    parser.add_argument("--validation-rows", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", help="of the operator; default: the fastest")
    parser.add_argument("--commit", help="recorded in the log")
    args = parser.parse_args()
    if args.report:
        from experiments.codesign_report import write_report

        return write_report(args.log)
    for name in ("steps", "sweep_steps"):
        if getattr(args, name) % args.chunk:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(args, name)}: must be a multiple of --chunk {args.chunk}"
            )
    train_all(args)


if __name__ == "__main__":
    main()
