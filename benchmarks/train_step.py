"""Times a whole training step of a preset: `python -m benchmarks.train_step parallax_0p6b --json OUT`.

Tokens per second, model FLOP utilisation (MFU), memory and the optimizer's share of the step; for Parallax, for the
same model with softmax attention (cuDNN's) and for flash-linear-attention's ParallaxForCausalLM in torch, which forces
heads x head_dim = width and is therefore compared with our model in that shape. Random tokens, one document to a row.

MFU = FLOPs per second / the GPU's bfloat16 peak, where one token costs

    6 x parameters + 3 x layers x m x heads x head_dim x seq_len / 2,    m = 8 for Parallax, 4 for softmax.

The tied embedding counts once, for the logits; m is 2 FLOPs for each product with keys or values of the forward pass,
and causality halves the keys. Neither what the backward pass recomputes nor the optimizer counts.

`--variants` times other settings as well, each a list of fields of the configuration: `--variants batch_size=8
model.remat=attention,batch_size=16 flags=--xla_gpu_enable_triton_gemm=false`. Every case runs in a process of its own.
"""

import argparse
import ast
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "4090": 165e12}  # bfloat16, dense
FLA = "fla"
SHAPES = {"parallax": "parallax", "softmax": "softmax", "parallax-fla": "parallax"}


def peak_flops(device: str) -> float | None:
    """The device's bfloat16 peak, None where it is not known."""
    return next((flops for name, flops in PEAKS.items() if name in device), None)


def median_seconds(step, warmup: int, steps: int) -> tuple[float, list]:
    """Median seconds of a step while the next one is already dispatched, as in training, and the losses of all steps.

    `step()` dispatches one and returns a function that waits for its loss.
    """
    losses, times, pending = [], [], step()
    for _ in range(warmup + steps):
        following = step()
        losses.append(pending())
        times.append(time.perf_counter())
        pending = following
    losses.append(pending())
    intervals = [b - a for a, b in zip(times[warmup - 1 :], times[warmup:], strict=False)]
    return statistics.median(intervals), losses


def check_losses(losses: list, vocab_size: int):
    """Raises RuntimeError unless a fresh model starts near the uniform loss and learns the batch that it is shown."""
    start = math.log(vocab_size)
    if not (abs(losses[0] - start) < 0.1 * start and min(losses) < losses[0] and math.isfinite(losses[-1])):
        raise RuntimeError(f"losses {losses}; a fresh model starts near {start:.4f} and learns")


def with_fields(config, fields: dict):
    """The configuration with fields such as "model.remat" replaced."""
    for name, value in fields.items():
        first, _, rest = name.partition(".")
        if rest:
            value = with_fields(getattr(config, first), {rest: value})
        config = dataclasses.replace(config, **{first: value})
    return config


def make_config(preset: str, case: str, fields: dict):
    """The preset as `case` wants it: with its attention, and for "parallax-fla" in the shape of the peer's layer."""
    from train.config import load_preset

    config = load_preset(preset)
    model = dataclasses.replace(config.model, attention=SHAPES[case])
    if case == "parallax-fla":
        heads = model.width // model.head_dim
        model = dataclasses.replace(model, num_heads=heads, num_kv_heads=heads)
    config = dataclasses.replace(config, model=model, accumulation_steps=1)
    return with_fields(config, fields)


def time_jax(preset: str, case: str, fields: dict, options: dict) -> dict:
    """Times one of our cases."""
    import functools

    import jax
    import jax.numpy as jnp
    import optax

    from parallax_jax.model import TransformerLM
    from train.optimizer import learning_rate_schedule, make_optimizer
    from train.plan import flops_per_token
    from train.state import abstract_state, batch_sharding, init_state, make_mesh, make_train_step

    config = make_config(preset, case, fields)
    mesh = make_mesh(config)
    shape = config.accumulation_steps, config.batch_size // config.accumulation_steps, config.seq_len
    with jax.set_mesh(mesh):
        model = TransformerLM(config.resolved_model(jax.default_backend()))
        optimizer = make_optimizer(config.optimizer, config.steps)
        abstract = abstract_state(model, optimizer, mesh)
        state = init_state(model, optimizer, abstract, config.seed)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

        @functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
        def draw(key):
            tokens = jax.random.randint(key, (2, *shape), 0, config.model.vocab_size, jnp.int32)
            batch = {"inputs": tokens[0], "targets": tokens[1]}
            return batch | ({"segment_ids": jnp.ones(shape, jnp.int32)} if options["packed"] else {})

        batch = draw(jax.random.key(1))
        schedule = learning_rate_schedule(config.optimizer, config.steps)
        fields = {name: getattr(config, name) for name in ("loss_chunk", "gradient_dtype")}
        train_step = make_train_step(model, optimizer, schedule, abstract, **fields)
        start = time.perf_counter()
        compiled = train_step.lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()

        def step():
            nonlocal state
            state, metrics = compiled(state, batch)
            return metrics["loss"].item

        seconds, losses = median_seconds(step, options["warmup"], options["steps"])
        check_losses(losses, config.model.vocab_size)
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if options["profile"]:
            with jax.profiler.trace(str(Path(options["profile"]) / case)):
                for _ in range(2):
                    step()()

        @functools.partial(jax.jit, donate_argnums=0)
        def update(state, gradients):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return state._replace(params=params, opt_state=opt_state), params["final_norm"]["scale"][0]

        gradients = jax.jit(functools.partial(jax.tree.map, lambda leaf: 1e-3 * leaf))(state.params)

        def optimizer_step():
            nonlocal state
            state, scalar = update(state, gradients)
            return scalar.item

        optimizer_seconds, _ = median_seconds(optimizer_step, options["warmup"], options["steps"])
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "parameters": parameters,
        "flops_per_token": flops_per_token(parameters, config.model, config.seq_len),
        "tokens": math.prod(shape),
        "seconds": seconds,
        "optimizer_seconds": optimizer_seconds,
        "compile_seconds": compile_seconds,
        "planned_bytes": kept + memory.temp_size_in_bytes,
        "peak_bytes": peak,
        "losses": [losses[0], losses[-1]],
        "versions": {"jax": jax.__version__},
    }


def time_fla(preset: str, fields: dict, options: dict) -> dict:
    """Times flash-linear-attention's model in torch, bfloat16 throughout, with its fused parts and a fused AdamW."""
    import importlib.metadata

    import torch
    from fla.models import ParallaxConfig, ParallaxForCausalLM

    from train.plan import flops_per_token

    ours = make_config(preset, "parallax-fla", fields)
    m = ours.model
    torch.manual_seed(ours.seed)
    with torch.device("cuda"):
        model = ParallaxForCausalLM(
            ParallaxConfig(
                vocab_size=m.vocab_size,
                num_hidden_layers=m.num_layers,
                hidden_size=m.width,
                num_heads=m.num_heads,
                num_kv_heads=m.num_kv_heads,
                intermediate_size=m.mlp_width,
                qk_norm=m.qk_norm,
                rope_theta=m.rope_theta,
                norm_eps=m.norm_eps,
                tie_word_embeddings=m.tie_embeddings,
                max_position_embeddings=ours.seq_len,
                fuse_linear_cross_entropy=True,
                fuse_cross_entropy=False,
                use_cache=False,
            )
        )
    model = model.to(torch.bfloat16).train()
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, m.vocab_size, (ours.batch_size, ours.seq_len), device="cuda")

    def step():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach().item

    seconds, losses = median_seconds(step, options["warmup"], options["steps"])
    check_losses(losses, m.vocab_size)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "flash-linear-attention")}
    return {
        "device": torch.cuda.get_device_name(0),
        "devices": 1,
        "parameters": parameters,
        "flops_per_token": flops_per_token(parameters, m, ours.seq_len),
        "tokens": tokens.numel(),
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "losses": [losses[0], losses[-1]],
        "versions": versions,
    }


def run_case(preset: str, case: str, fields: dict, options: dict) -> dict:
    """Times a case in a process of its own; the row says what went wrong if something did."""
    fields = dict(fields)
    flags = f"{os.environ.get('XLA_FLAGS', '')} {fields.pop('flags', '')}".strip()
    # The cases share what XLA finds out about matrix products, which is most of the time that a compilation takes.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "benchmarks.train_step")}
    environment = cache | os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    if case == FLA:
        environment["JAX_PLATFORMS"] = "cpu"  # the GPU is torch's
    job = json.dumps([preset, case, fields, options])
    row = {"case": case, "fields": fields, "flags": flags, "seq_len": options["seq_len"]}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", "--job", job], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        return row | {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}
    row |= json.loads(done.stdout.splitlines()[-1])
    row["tokens_per_second"] = row["tokens"] / row["seconds"]
    if peak := peak_flops(row["device"]):
        row["mfu"] = row["tokens_per_second"] * row["flops_per_token"] / row["devices"] / peak
    return row


def describe(row: dict) -> str:
    """A line of the table."""
    settings = " ".join([*(f"{name}={value}" for name, value in row["fields"].items()), row["flags"]])
    if "error" in row:
        return f"{row['case']:13} failed: {row['error']}  {settings}"
    share = f"{row['optimizer_seconds'] / row['seconds']:5.1%}" if "optimizer_seconds" in row else "    -"
    mfu = f"{row['mfu']:5.1%}" if "mfu" in row else "    -"
    memory = row["peak_bytes"] or row["planned_bytes"]
    return (
        f"{row['case']:13} {1e3 * row['seconds']:9.1f} {row['tokens_per_second']:10,.0f} {mfu:>6} {share:>9} "
        f"{memory / 2**30:6.1f} {row['parameters'] / 1e6:8.1f}  {settings}"
    )


def parse_fields(text: str) -> dict:
    """Fields of a variant: "model.remat=attention,batch_size=8" as a dictionary."""
    fields = {}
    for item in filter(None, text.split(",")):
        name, value = item.split("=", 1)
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value
    return fields


def main():
    """Runs the cases one after another, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="parallax_0p6b")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--attention", nargs="+", choices=(*SHAPES, FLA), default=["parallax", "softmax", FLA])
    parser.add_argument(
        "--variants", nargs="+", default=[""], help="FIELD=VALUE,... of the configuration, of each case"
    )
    parser.add_argument("--packed", action="store_true", help="pass segment ids, as packed rows do")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=12, help="steps that are timed")
    parser.add_argument("--profile", help="folder for a trace of two steps of each case")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        preset, case, fields, options = json.loads(args.job)
        times = time_fla(preset, fields, options) if case == FLA else time_jax(preset, case, fields, options)
        print(json.dumps(times))
        return
    options = {name: getattr(args, name) for name in ("seq_len", "packed", "warmup", "steps", "profile")}
    # The peer forces a shape of its own, so ours is timed in that shape too.
    cases = [case for name in args.attention for case in ([FLA, "parallax-fla"] if name == FLA else [name])]
    rows = []
    print(f"{'':13} {'ms/step':>9} {'tokens/s':>10} {'MFU':>6} {'optimizer':>9} {'GiB':>6} {'M params':>8}")
    for variant in args.variants:
        for case in dict.fromkeys(cases):
            if case == FLA and any(row["case"] == FLA for row in rows):
                continue
            fields = {"batch_size": args.batch, "seq_len": args.seq_len} | parse_fields(variant)
            rows.append(run_case(args.preset, case, fields, options))
            print(describe(rows[-1]), flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(rows, indent=1))
    speed = {row["case"]: row["tokens_per_second"] for row in reversed(rows) if "error" not in row}
    for name, a, b in (("softmax", "softmax", "parallax"), ("fla", "parallax-fla", FLA)):
        if a in speed and b in speed:
            text = (
                "step time of Parallax over softmax's"
                if name == "softmax"
                else "tokens/s over flash-linear-attention's"
            )
            print(f"{text}: {speed[a] / speed[b]:.3f}")
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
