"""The training loop. The metrics of an update are fetched when the next one is under way."""

import contextlib
import functools
import math
import signal
from pathlib import Path

import jax

from parallax_jax.model import TransformerLM
from train.checkpoint import Checkpoints
from train.config import Config
from train.data import batches, load_corpus
from train.diagnose import diagnose
from train.distributed import StopSignal, fetch, in_turn, meet, require_same, share_of_rows
from train.evaluate import Evaluator, describe
from train.generate import DEFAULT_SAMPLING, sample
from train.metrics import MetricWriter, NoMetrics, Progress, read_metrics, save_loss_curve
from train.optimizer import learning_rate_schedule, make_optimizer, stop_frozen
from train.run import enter_run, run_record
from train.state import abstract_state, batch_sharding, device_batch, init_state, make_mesh, make_train_step

_SAMPLE_TOKENS = 200
_TRACED = 3  # updates in a trace


class NonFinite(Exception):
    """An update's loss, gradient or parameters are NaN or infinite."""


def train(config: Config, folder: Path, preset: str) -> int:
    """Trains a run to its end, from its newest checkpoint if `folder` holds one.

    Returns:
      The exit code: 0, 1 after a non-finite loss, 128 plus its number after a signal.

    Raises:
      ConfigError: something must be changed first; no run folder was made.
    """
    mesh = make_mesh(config)
    first = jax.process_index() == 0
    corpus = in_turn(lambda: load_corpus(config))
    require_same("the text's sha256", corpus.record["sha256"])
    model = TransformerLM(config.resolved_model(jax.default_backend()))
    optimizer = make_optimizer(config.optimizer, config.steps)
    abstract = abstract_state(model, optimizer, mesh)
    record = run_record(preset, corpus, sum(leaf.size for leaf in jax.tree.leaves(abstract.params)))
    in_turn(lambda: enter_run(folder, config, record, corpus.folder))

    schedule = learning_rate_schedule(config.optimizer, config.steps)
    trainable = functools.partial(stop_frozen, config.optimizer)
    train_step = make_train_step(
        model, optimizer, schedule, abstract, trainable, config.loss_chunk, config.gradient_dtype
    )
    parts, part = config.accumulation_steps, config.batch_size // config.accumulation_steps
    block, blocks = in_turn(lambda: share_of_rows(batch_sharding(mesh), (parts, part, config.seq_len)))
    held_out = corpus.rows("validation", config.seq_len)
    evaluate = Evaluator(model, held_out, part, mesh, config.loss_chunk)
    rows = corpus.rows("train", config.seq_len)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder, config.keep_checkpoints))
        state = checkpoints.restore(abstract, warn=print if first else lambda _: None)
        state = state or init_state(model, optimizer, abstract, config.seed, config.init_from)
        start = int(state.step)
        share = {"parts": parts, "block": block, "blocks": blocks}
        data = batches(rows, config.batch_size, config.seed, start=start, **share)
        stack.enter_context(contextlib.closing(data))
        writer = stack.enter_context(MetricWriter(folder, start) if first else NoMetrics())
        progress = stack.enter_context(Progress(start, config.steps, config.log_interval, quiet=not first))
        several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        progress.print(
            f"{folder}: {preset}{f' from step {start}' if start else ''}, {record['parameters']:,} parameters on "
            f"{mesh.size} x {record['devices']['kind']}{several}, {corpus.record['train']['tokens']:,} tokens of text"
        )

        def report(step: int, metrics: dict[str, jax.Array]):
            values = {name: value.item() for name, value in metrics.items()}
            speed = progress.update(step, values["loss"], values["tokens"])
            writer.write(step, **values, tokens_per_second=round(speed))
            if not all(map(math.isfinite, values.values())):
                norms = f"gradient norm {values['grad_norm']:g}, parameter norm {values['param_norm']:g}"
                raise NonFinite(f"loss {values['loss']:g}, {norms} at step {step}")

        def describe_attention(step: int, params):
            statistics = diagnose(model.config, params, held_out, config.diagnose_rows)
            by_layer = {f"{name}/{i}": value for name, row in statistics.items() for i, value in enumerate(row)}
            writer.write(step, **by_layer)

        pending, stopped_by = None, 0
        try:
            with StopSignal() as stop:  # until all is saved; what follows may be cut short
                for step in range(start + 1, config.steps + 1):
                    if step == config.profile and first:
                        jax.profiler.start_trace(folder / "trace")
                    state, metrics = train_step(state, device_batch(mesh, next(data), parts))
                    if pending:
                        report(*pending)
                    pending = step, metrics
                    if step - _TRACED + 1 == config.profile and first:
                        jax.block_until_ready(metrics)
                        jax.profiler.stop_trace()
                    stopped_by = stop.after(step)
                    last = step == config.steps or stopped_by > 0
                    look = step % config.eval_interval == 0 and not last
                    save = step % config.checkpoint_interval == 0 or last
                    if look or save:
                        report(*pending)
                        pending = None
                    if look:
                        loss, _ = evaluate(state.params, config.eval_batches)
                        writer.write(step, validation_loss_part=loss)
                        if config.diagnose_rows:
                            describe_attention(step, fetch(state.params))
                        progress.print(f"step {step}/{config.steps}  validation loss {loss:.4f} on a part of the split")
                    if save:
                        checkpoints.save(state)
                    if last:
                        break
                saved = checkpoints.path(checkpoints.latest)
        except NonFinite as error:
            good = checkpoints.latest
            where = f"the last good checkpoint is {checkpoints.path(good)}" if good else "there is no checkpoint yet"
            progress.print(f"stopped: {error}; {where}; a lower optimizer.learning_rate may help")
            return 1

        if stopped_by:
            name = signal.Signals(stopped_by).name
            progress.print(f"stopped by {name}; saved {saved}; continue with the same flags and --run-dir {folder}")
            return 128 + stopped_by
        loss, tokens = evaluate(state.params)
        params = fetch(state.params)
        if first:
            final = {"step": config.steps, "validation_loss": loss}
            if final not in read_metrics(folder):  # a run that was finished before has it
                writer.write(**final)
                if config.diagnose_rows:
                    describe_attention(config.steps, params)
            save_loss_curve(folder)
            options = (config.seq_len, (config.prompt,), _SAMPLE_TOKENS, DEFAULT_SAMPLING)
            if model.config.has_cache:
                text = "".join(piece for (piece,) in sample(model, params, corpus.tokenizer, *options))
                progress.print(f"\n{config.prompt}{text}\n")
            progress.print(describe(loss, tokens, corpus.record["validation"]))
            progress.print(f"checkpoint {saved}")
        meet()
        return 0
