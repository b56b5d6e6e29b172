"""The MAD suite (arXiv 2605.29157, section 4.1): Parallax beside softmax attention and their relatives.

    python -m experiments.mad              # trains what docs/results/mad.jsonl does not hold yet
    python -m experiments.mad --report     # docs/results/mad.md and mad.png from that log, without training

Two blocks of width 128, 60 epochs, Muon with a constant rate that decays over the last fifth, rates 5e-3, 1e-3 and
5e-4, as in the paper. The rate of each mixer and task is chosen by the test accuracy of one seed trained for
`--sweep-epochs`; the numbers reported are those of other seeds, trained in full, each with a data set of its own.

All models that share a shape, whatever their task, rate and seed, train together: one compiled program runs an epoch of
all of them, with the data on the device.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.mad_tasks import BASELINES, IGNORE, Task, generate, parse_task
from parallax_jax.estimators import Solver
from parallax_jax.layers import RMSNorm
from parallax_jax.model import ModelConfig, TransformerLM
from train.config import OptimizerConfig
from train.optimizer import make_optimizer

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MIXERS = ("softmax", "parallax", "linear", "lla")
RATES = (5e-3, 1e-3, 5e-4)
BATCH, WIDTH, LAYERS, MLP_WIDTH, DECAY = 128, 128, 2, 352, 0.2
SOLVER = Solver(ridge=1.0, max_iterations=16, tolerance=1e-2)  # of "lla"
# Table 1 of the paper.
PAPER = {
    "compression": {"softmax": 0.342, "parallax": 0.332},
    "in_context_recall": {"softmax": 0.803, "parallax": 0.951},
    "fuzzy_recall": {"softmax": 0.268, "parallax": 0.356},
    "noisy_recall": {"softmax": 0.861, "parallax": 0.937},
    "memorization": {"softmax": 0.807, "parallax": 0.733},
    "selective_copying": {"softmax": 0.950, "parallax": 0.988},
}


class Decoder(nn.Module):
    """MAD's decoder of the compression task: a two-layer perceptron from one vector to one of each position."""

    length: int
    dtype: Any

    @nn.compact
    def __call__(self, encoding):
        """(B, D) -> (B, length, D)."""
        half = encoding.shape[-1] // 2
        angle = np.arange(self.length)[:, None] * 10_000.0 ** (-np.arange(half) / (half - 1))
        x = encoding[:, None] + jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], -1), self.dtype)
        for name in ("up", "down"):
            x = RMSNorm(name=f"{name}_norm")(x)
            x = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name=name)(x)
            x = nn.gelu(x, approximate=False)
        return RMSNorm(name="out_norm")(x)


class Shape(NamedTuple):
    """What must agree for models to train in one program."""

    compresses: bool
    train_examples: int
    test_examples: int
    length: int
    vocab_size: int


def shape_of(task: Task) -> Shape:
    """Lengths are rounded up to multiples of 32 and vocabularies to powers of two; what is added never counts."""
    length, vocab_size = -(-task.seq_len // 32) * 32, max(32, 2 ** math.ceil(math.log2(task.vocab_size)))
    return Shape(task.name == "compression", task.train_examples, task.test_examples, length, vocab_size)


class Run(NamedTuple):
    """One model to train."""

    task: Task
    seed: int
    rate: float


class Program:
    """Initialises, trains and tests `models` models of one shape and mixer at once."""

    def __init__(self, shape: Shape, mixer: str, models: int, args: argparse.Namespace):
        self.shape, self.models = shape, models
        self.config = ModelConfig(
            *(shape.vocab_size, LAYERS, WIDTH, args.heads, args.heads, WIDTH // args.heads, MLP_WIDTH),
            attention=mixer,
            solver=SOLVER,
            rope_theta=1e4,
            tie_embeddings=False,
            dtype=args.dtype,
            scan_unroll=LAYERS,
            implementation=args.implementation,
        )
        self._model = TransformerLM(self.config)
        self._decoder = Decoder(shape.length, jnp.dtype(args.dtype))
        # Updates are linear in the rate, which differs from model to model: the optimizer's own is 1 throughout.
        config = OptimizerConfig(learning_rate=1.0, decay_fraction=0.0)
        self._optimizer = make_optimizer(config, steps=2**30)
        self.updates_per_epoch = max(1, shape.train_examples // BATCH)

        functions = {
            "init": self._init,
            "epoch": jax.vmap(self._epoch, (0, 0, 0, 0, 0, None, None)),
            "test": self._test,
        }
        functions = {name: f if name == "epoch" else jax.vmap(f) for name, f in functions.items()}
        self.functions = {
            name: jax.jit(f, donate_argnums=0 if name == "epoch" else ()) for name, f in functions.items()
        }

    def arguments(self) -> dict[str, tuple]:
        """Shapes and dtypes of what each function takes, the axis of models first."""
        struct, models = jax.ShapeDtypeStruct, self.models
        data = lambda examples: 2 * (struct((models, examples, self.shape.length), jnp.int16),)
        vocabularies, rates = struct((models,), jnp.int32), struct((models,), jnp.float32)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), models))
        state, epoch = jax.eval_shape(self.functions["init"], keys), struct((), jnp.int32)
        return {
            "init": (keys,),
            "epoch": (state, keys, data(self.shape.train_examples), vocabularies, rates, epoch, epoch),
            "test": (state[0], data(self.shape.test_examples), vocabularies),
        }

    def compiled(self) -> "Program":
        """Compiles ahead of time; returns itself."""
        arguments = self.arguments()
        self.functions = {name: f.lower(*arguments[name]).compile() for name, f in self.functions.items()}
        return self

    def _init(self, key):
        tokens = jnp.zeros((1, self.shape.length), jnp.int32)
        params = self._model.init(key, tokens)["params"]
        if self.shape.compresses:
            params["mlp"] = self._decoder.init(key, jnp.zeros((1, WIDTH), jnp.float32))["params"]
        params = nn.meta.unbox(params)
        return params, self._optimizer.init(params)

    def _logits(self, params, inputs, vocabulary):
        if self.shape.compresses:
            rest = {name: p for name, p in params.items() if name != "mlp"}
            hidden = self._model.apply({"params": rest}, inputs, method="hidden")
            hidden = self._decoder.apply({"params": params["mlp"]}, hidden[:, -1])
            logits = self._model.apply({"params": rest}, hidden, method="logits")
        else:
            logits = self._model.apply({"params": params}, inputs)
        return jnp.where(jnp.arange(self.shape.vocab_size) < vocabulary, logits, -1e9)

    def _loss(self, params, inputs, targets, vocabulary):
        logits = self._logits(params, inputs, vocabulary)
        counts = targets != IGNORE
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, targets, 0))
        return jnp.sum(losses, where=counts) / jnp.sum(counts).astype(jnp.float32), logits

    def _epoch(self, state, key, data, vocabulary, rate, epoch, epochs):
        """An epoch of updates; also the mean loss over it."""
        total = (epochs * self.updates_per_epoch).astype(jnp.float32)
        order = jax.random.permutation(jax.random.fold_in(key, epoch), self.shape.train_examples)

        def update(carry, rows):
            params, opt_state, step = carry
            inputs, targets = (x[rows].astype(jnp.int32) for x in data)
            (loss, _), grads = jax.value_and_grad(self._loss, has_aux=True)(params, inputs, targets, vocabulary)
            updates, opt_state = self._optimizer.update(grads, opt_state, params)
            now = rate * jnp.minimum(1.0, (total - step) / (DECAY * total))
            params = optax.apply_updates(params, jax.tree.map(lambda u: now * u, updates))
            return (params, opt_state, step + 1), loss

        rows = order[: self.updates_per_epoch * BATCH].reshape(self.updates_per_epoch, -1)
        begin = (epoch * self.updates_per_epoch).astype(jnp.float32)
        (*state, _), losses = jax.lax.scan(update, (*state, begin), rows)
        return tuple(state), jnp.mean(losses)

    def _test(self, params, data, vocabulary):
        """Loss, accuracy, and MAD's own accuracy, the mean over classes, those neither asked for nor named left out."""

        def part(data):
            inputs, targets = (x.astype(jnp.int32) for x in data)
            loss, logits = self._loss(params, inputs, targets, vocabulary)
            named = jnp.where(targets == IGNORE, IGNORE, jnp.argmax(logits, -1))
            one_hot = lambda x: jax.nn.one_hot(x, self.shape.vocab_size).reshape(-1, self.shape.vocab_size)
            asked, named = one_hot(targets), one_hot(named)
            return loss, (asked * named).sum(0), asked.sum(0), named.sum(0)

        losses, right, asked, named = jax.lax.map(part, tuple(x.reshape(-1, BATCH, self.shape.length) for x in data))
        right, asked, named = (x.sum(0) for x in (right, asked, named))
        by_class = right / jnp.maximum(asked, 1)
        macro = jnp.sum(by_class) / jnp.sum(asked + named > 0).astype(jnp.float32)
        return {"loss": losses.mean(), "accuracy": right.sum() / asked.sum(), "class_accuracy": macro}

    def train(self, runs: list[Run], epochs: int, seconds: float) -> list[dict] | None:
        """Trains and tests the runs; None if the first epochs say that it would take longer than `seconds`."""
        keys = jnp.stack([jax.random.fold_in(jax.random.key(run.seed), 0) for run in runs])
        vocabularies = jnp.asarray([run.task.vocab_size for run in runs], jnp.int32)
        rates = jnp.asarray([run.rate for run in runs], jnp.float32)
        data, test = (_data_sets(runs, self.shape, training) for training in (True, False))
        state, losses = self.functions["init"](keys), []
        jax.block_until_ready((state, data, test))
        step, began = self.functions["epoch"], time.perf_counter()
        for epoch in range(epochs):
            state, loss = step(state, keys, data, vocabularies, rates, jnp.int32(epoch), jnp.int32(epochs))
            losses.append(loss)
            if epoch == 1:
                loss.block_until_ready()
                if (time.perf_counter() - began) / 2 * epochs > seconds:
                    return None
        found = jax.device_get(self.functions["test"](state[0], test, vocabularies))
        took, losses = time.perf_counter() - began, np.stack(losses, 1)
        return [
            {f"test_{name}": round(float(x[i]), 5) for name, x in found.items()}
            | {"train_loss": [round(float(x), 4) for x in losses[i]], "seconds": round(took, 2), "together": len(runs)}
            for i in range(len(runs))
        ]


@functools.cache
def _data_set(task: Task, seed: int, training: bool):
    return generate(task, seed, training)


def _data_sets(runs: list[Run], shape: Shape, training: bool):
    """Inputs and targets (models, examples, length) on the device."""
    stacked = []
    for fill, which in ((0, 0), (IGNORE, 1)):
        sets = [_data_set(run.task, run.seed, training)[which] for run in runs]
        sets = [np.pad(x, ((0, 0), (0, shape.length - x.shape[1])), constant_values=fill) for x in sets]
        stacked.append(jax.device_put(np.stack(sets).astype(np.int16)))
    return tuple(stacked)


def read_log(path: Path) -> list[dict]:
    """The runs logged so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_all(args: argparse.Namespace):
    """Trains what the log lacks, mixer by mixer and shape by shape, and appends to it."""
    began = time.perf_counter()
    settings = {name: getattr(args, name) for name in ("heads", "dtype", "implementation", "commit")}
    settings |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    rows = [row for row in read_log(args.log) if row["heads"] == args.heads and row["stage"] == "final"]
    groups: dict[Shape, list[Task]] = {}
    for text in args.tasks:
        task = parse_task(text)
        if args.train_examples is not None:
            task = dataclasses.replace(task, train_examples=args.train_examples)
        groups.setdefault(shape_of(task), []).append(task)

    def logged(stage, mixer, task):
        key = {"stage": stage, "mixer": mixer, "task": task.label, "epochs": epochs_of[stage]}
        return [row for row in rows if key.items() <= row.items()]

    def runs_of(stage, mixer, task):
        if stage == "sweep":
            return [Run(task, 0, rate) for rate in RATES]
        rate = max(logged("sweep", mixer, task), key=score)["rate"]
        return [Run(task, seed, rate) for seed in range(1, args.seeds + 1)]

    epochs_of = {"sweep": args.sweep_epochs, "final": args.epochs}
    count_of = {"sweep": len(RATES), "final": args.seeds}
    work = []
    for mixer in args.mixers:
        for shape, tasks in groups.items():
            for stage, count in count_of.items():
                # A task without a final run is swept again: other settings may have changed.
                if lacking := [task for task in tasks if len(logged("final", mixer, task)) < args.seeds]:
                    work.append((mixer, shape, lacking, stage, len(lacking) * count))

    with ThreadPoolExecutor(args.compile_threads) as pool, args.log.open("a", buffering=1) as log:
        # A program compiles while others run. Both stages of a shape share one where they have as many models.
        build = functools.cache(lambda shape, mixer, models: pool.submit(Program(shape, mixer, models, args).compiled))
        for mixer, shape, _, _, models in work:
            build(shape, mixer, models)
        skipped = set()
        for mixer, shape, tasks, stage, models in work:
            if (mixer, shape) in skipped:
                continue
            runs, epochs = [run for task in tasks for run in runs_of(stage, mixer, task)], epochs_of[stage]
            for run in runs:  # made while the program compiles
                _data_set(run.task, run.seed, True), _data_set(run.task, run.seed, False)
            program = build(shape, mixer, models).result()
            found = program.train(runs, epochs, 60 * args.minutes - (time.perf_counter() - began))
            at = f"{time.perf_counter() - began:.0f} s  {mixer}, length {shape.length}, {stage}"
            if found is None:
                skipped.add((mixer, shape))
                print(f"{at}: skipped, for it would end after --minutes {args.minutes:g}", flush=True)
                continue
            keys = (
                {"stage": stage, "mixer": mixer, "task": r.task.label, "seed": r.seed, "rate": r.rate} for r in runs
            )
            new = [key | {"epochs": epochs} | result | settings for key, result in zip(keys, found, strict=True)]
            log.writelines(json.dumps(row) + "\n" for row in new)
            rows += new
            print(
                f"{at}, {new[0]['seconds']:.0f} s:",
                *(f"{r['task']} {r['rate']:g} {score(r):.3f}" for r in new),
                flush=True,
            )


def score(row: dict) -> float:
    """MAD's accuracy of a logged run."""
    return row["test_class_accuracy"]


def main():
    """Trains, or writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="write the table and the figure from the log")
    parser.add_argument("--log", type=Path, default=RESULTS / "mad.jsonl")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(BASELINES),
        help="NAME, or for another difficulty NAME:VOCAB-LENGTH, such as noisy_recall:144-1024",
    )
    parser.add_argument("--mixers", nargs="+", default=MIXERS, choices=MIXERS)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--sweep-epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-examples", type=int, help="default: the task's own")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", help="of the operator; default: triton on a GPU, else xla")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing that would end later")
    parser.add_argument("--compile-threads", type=int, default=4)
    parser.add_argument("--commit", help="recorded in the log")
    args = parser.parse_args()
    if args.report:
        from experiments.mad_report import write_report

        return write_report(args.log)
    args.implementation = args.implementation or ("triton" if jax.default_backend() == "gpu" else "xla")
    jax.config.update("jax_default_matmul_precision", "tensorfloat32")
    args.log.parent.mkdir(parents=True, exist_ok=True)
    train_all(args)


if __name__ == "__main__":
    main()
