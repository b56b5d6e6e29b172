"""`python -m train.plan PRESET [--flags]`: compiles a run's update without running it, and says what it will take.

Compiles for as many devices as the mesh has: for H100s where CUDA's compilers are installed (the extra "compile"; no
GPU is needed), else for emulated CPU devices, whose compiler places shards and collectives alike but keeps other
temporaries. `--target cpu` and `--target h100` choose. No array is made.
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import math
import os
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from parallax_jax.model import ModelConfig, TransformerLM
from train.config import Config, ConfigError, parse_command_line, run_command
from train.gpus import gpu_devices
from train.optimizer import learning_rate_schedule, make_optimizer
from train.state import AXES, abstract_state, batch_sharding, make_train_step

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def flops_per_token(parameters: int, model: ModelConfig, seq_len: int) -> float:
    """FLOPs that a token of a training step costs, forward and backward.

    6 x parameters + 3 x layers x m x heads x head_dim x seq_len / 2, with m = 8 for Parallax and 4 for softmax: 2 for
    each product with keys or values. Causality halves the keys. What the backward pass recomputes does not count.
    """
    products = {"parallax": 8, "softmax": 4}[model.attention]
    return 6 * parameters + 3 * model.num_layers * products * model.num_heads * model.head_dim * seq_len / 2


def plan(config: Config, target: str) -> dict:
    """Compiles the update of a run for devices that need not be here.

    Args:
      config: the run; `mesh.data` None counts as 1.
      target: "cpu" for emulated devices, of which there must be enough, or "h100".

    Returns:
      "devices", "parameters", "flops" of an update, and of each device "state_bytes", "batch_bytes",
      "temporary_bytes" and "collectives": {kind: {"count", "bytes"}}, bytes as received by the device.
    """
    sizes = config.mesh
    shape = (sizes.data or 1, sizes.fsdp, sizes.context, sizes.tensor)
    count = math.prod(shape)
    devices = gpu_devices(count) if target == "h100" else jax.devices("cpu")[:count]
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    shape = config.resolved_model("gpu")
    if target == "cpu":  # its compiler takes minutes for what GPUs run fastest
        shape = dataclasses.replace(shape, scan_unroll=1, implementation="xla")
    elif shape.attention == "softmax":  # cuDNN cannot be asked without a GPU; its residuals are as large
        shape = dataclasses.replace(shape, implementation="triton")
    model, optimizer = TransformerLM(shape), make_optimizer(config.optimizer, config.steps)
    state = abstract_state(model, optimizer, mesh)
    parts = config.accumulation_steps
    rows = (parts, config.batch_size // parts, config.seq_len)
    batch = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=batch_sharding(mesh))
    batch = dict.fromkeys(("inputs", "targets", "segment_ids"), batch)
    schedule = learning_rate_schedule(config.optimizer, config.steps)
    options = {name: getattr(config, name) for name in ("loss_chunk", "gradient_dtype")}
    step = make_train_step(model, optimizer, schedule, state, **options)
    compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    share = lambda tree: sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
    return {
        "devices": count,
        "parameters": parameters,
        "flops": flops_per_token(parameters, config.model, config.seq_len) * math.prod(rows),
        "state_bytes": share(state),
        "batch_bytes": share(batch),
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": collectives(compiled.as_text()) if count > 1 else {},
    }


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Collectives that a device takes part in when it runs a compiled module: {kind: {"count", "bytes"}}.

    Bytes are those of the results. A loop's count as often as it is known to run.
    """
    bodies, entry = {}, None
    for text in re.split(r"\n(?=(?:ENTRY )?%\S+ \()", hlo):
        name = re.match(r"(ENTRY )?%(\S+) \(", text)
        if name:
            bodies[name[2]] = text
            entry = name[2] if name[1] else entry
    totals = collections.defaultdict(lambda: {"count": 0, "bytes": 0})

    def visit(name: str, times: int):
        for line in bodies[name].splitlines()[1:]:
            found = re.match(r"\s*(?:ROOT )?%\S+ = (.*?) ([a-z\-]+)\(", line)
            if not found:
                continue
            result, operation = found.groups()
            kind = operation.removesuffix("-start")
            if kind in _COLLECTIVES:
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
                shapes = shapes[len(shapes) // 2 :] if operation != kind and kind != "all-reduce" else shapes
                totals[kind]["count"] += times
                totals[kind]["bytes"] += times * sum(
                    _BYTES.get(dtype, 0) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in shapes
                )
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            for called in re.findall(r"(?:body|to_apply|calls|true_computation|false_computation)=%([\w.\-]+)", line):
                visit(called, times * (int(trips[1]) if operation == "while" and trips else 1))

    visit(entry, 1)
    return dict(totals)


def describe(result: dict) -> str:
    """What `plan` found, as lines of text."""
    gib = lambda name: f"{result[name] / 2**30:8.2f} GiB"
    lines = [
        f"parameters        {result['parameters']:,}",
        f"FLOPs per update  {result['flops']:.4g}, {result['flops'] / result['devices']:.4g} per device",
        f"memory per device {(result['state_bytes'] + result['temporary_bytes']) / 2**30:8.2f} GiB",
        f"  state           {gib('state_bytes')}",
        f"  temporaries     {gib('temporary_bytes')}",
        "collectives per device and update",
    ]
    for kind, total in sorted(result["collectives"].items()):
        lines.append(f"  {kind:18} {total['count']:6} x, {total['bytes'] / 2**30:8.2f} GiB")
    return "\n".join(lines if result["collectives"] else [*lines[:-1], "no collectives"])


def main(argv: list[str]):
    """Plans the run that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m train.plan", add_help=False, allow_abbrev=False)
    compilers = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")
    parser.add_argument("--target", choices=("cpu", "h100"), default="h100" if compilers else "cpu")
    parser.add_argument("--json")
    options, flags = parser.parse_known_args(argv)
    preset, config = parse_command_line(flags)
    count = (config.mesh.data or 1) * config.mesh.fsdp * config.mesh.context * config.mesh.tensor
    rows = config.batch_size // config.accumulation_steps
    if rows % ((config.mesh.data or 1) * config.mesh.fsdp):
        raise ConfigError(f"batch_size / accumulation_steps={rows}: the mesh's rows do not divide it")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    named = {"cpu": "emulated CPU devices", "h100": "H100s, ahead of time"}[options.target]
    print(f"{preset}: {count} {named}, {rows} rows of {config.seq_len} in each of {config.accumulation_steps} parts")
    result = plan(config, options.target)
    print(describe(result))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"preset": preset, "target": options.target, **result}, file, indent=1)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run_command(main)
