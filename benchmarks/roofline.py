"""Decode's arithmetic intensity by hardware counters: `python -m benchmarks.roofline --json ROWS.json --figure X.png`.

Starts itself under Nsight Compute (`ncu`), which counts what each kernel of one call reads from memory and computes:
Parallax, the same kernel's softmax mode, and cuDNN's softmax. Caches are flushed before each kernel, clocks left alone.
"""

import argparse
import csv
import functools
import io
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile

TENSOR, BYTES, TIME = "sm__ops_path_tensor_src_bf16_dst_fp32.sum", "dram__bytes_read.sum", "gpu__time_duration.sum"
FP32 = {f"smsp__sass_thread_inst_executed_op_{op}_pred_on.sum": n for op, n in (("fadd", 1), ("fmul", 1), ("ffma", 2))}
NAMES = ("Parallax", "softmax", "cuDNN")
OURS, THEIRS = "parallax_decode", "cudnn|sdpa|fmha"  # in the names of kernels


def shapes() -> list:
    """What is measured."""
    from benchmarks.decode import Shape

    return [Shape(32, 4096), Shape(1, 16384)]


def run() -> None:
    """One call of each, in the order of `NAMES`, shape by shape."""
    import jax

    from benchmarks import decode

    drawn = [(shape, jax.jit(functools.partial(decode.draw, shape))()) for shape in shapes()]
    calls = [
        (jax.jit(call).lower(*args).compile(), args)
        for shape, args in drawn
        for call in (decode.ours(None), *decode.softmax(shape), *decode.cudnn(shape))
    ]
    for executable, args in calls:  # once all are compiled: to compile may run kernels, too
        jax.block_until_ready(executable(*args))


def rows(log: str, shapes: list) -> list[dict]:
    """Counters of each shape and name from ncu's CSV, summed over a call's kernels."""
    start = log.index('"ID"')
    _, *kernels = csv.DictReader(io.StringIO(log[start:]))  # first the units
    calls = []
    for kernel in kernels:
        name, is_ours = kernel["Kernel Name"], OURS in kernel["Kernel Name"]
        # A merge belongs to the call before; so does what follows cuDNN's first kernel.
        if (is_ours and "merge" not in name) or (not is_ours and calls and calls[-1]["ours"]):
            calls.append({"ours": is_ours, "kernels": []})
        if calls:  # else cuDNN was tried out when it was compiled
            calls[-1]["kernels"].append(kernel)
    labels = [(shape, name) for shape in shapes for name in NAMES]
    if [call["ours"] for call in calls] != [name != "cuDNN" for _, name in labels]:
        raise RuntimeError(f"ncu: {len(calls)} calls of {len(labels)}, kernels {[x['Kernel Name'] for x in kernels]}")
    found = []
    for (shape, name), call in zip(labels, calls, strict=True):
        total = {x: sum(float(k[x].replace(",", "")) for k in call["kernels"]) for x in (TENSOR, BYTES, TIME, *FP32)}
        flop = total[TENSOR] + sum(n * total[x] for x, n in FP32.items())
        # Scores and values, and those of the probe. Tensor cores multiply rows of zeros, too: a tile has 16.
        needed = (8 if name == "Parallax" else 4) * shape.bytes // 4 * shape.heads // shape.kv_heads
        row = {"shape": str(shape), "name": name, "bytes": total[BYTES], "needed_flop": needed}
        row |= {"tensor_flop": total[TENSOR], "flop": flop}
        found.append(row | {"ns": total[TIME], "kernels": [k["Kernel Name"] for k in call["kernels"]]})
    return found


def draw(found: list[dict], bandwidth: float, peak: float | None, path: pathlib.Path) -> None:
    """The roofline, bytes/s and, where it is known, FLOP/s, with two points for each row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    intensity = [0.5, peak / bandwidth if peak else 1000, 1000]
    axis.loglog(intensity, [min(x * bandwidth, peak or math.inf) / 1e12 for x in intensity], color="black")
    sizes = list(dict.fromkeys(row["shape"] for row in found))
    for row in found:
        color, marker = f"C{NAMES.index(row['name'])}", "os"[sizes.index(row["shape"])]
        label = f"{row['name']}, {row['shape'].split(' heads')[0]}"
        for kind, style in (("needed_flop", dict(label=label)), ("flop", dict(markerfacecolor="none"))):
            axis.plot(row[kind] / row["bytes"], row[kind] / row["ns"] / 1e3, marker, color=color, **style)
    axis.set(xlabel="FLOP per byte read from memory", ylabel="TFLOP/s")
    axis.set_title("Decode by hardware counters: needed FLOP (filled), and with the tiles' empty rows", fontsize=9)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Counts, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--figure", type=pathlib.Path, required=True)
    options = parser.parse_args()
    if shutil.which("ncu") is None:
        parser.error("needs Nsight Compute's ncu on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder, "log.csv")
        command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
        command += ["--log-file", str(log), "--kernel-name", f"regex:{OURS}|{THEIRS}"]
        command += ["--metrics", ",".join((TENSOR, BYTES, TIME, *FP32))]
        code = "from benchmarks import roofline; roofline.run()"
        status = subprocess.run([*command, sys.executable, "-c", code]).returncode
        text = log.read_text() if log.exists() else ""
    if status or '"ID"' not in text:
        parser.error(f"ncu ended with {status}: {text[-2000:]}")
    found = rows(text, shapes())
    for row in found:
        each = [f"{row[x] / row['bytes']:7.2f} {x}" for x in ("needed_flop", "tensor_flop", "flop")]
        print(f"{row['shape']} {row['name']:8} {row['bytes'] / 1e6:8.1f} MB {row['ns'] / 1e3:8.2f} us  a byte:", *each)
    import jax  # not before: the GPU was the other process's

    from benchmarks import decode, train_step

    device, bandwidth = jax.devices()[0].device_kind, decode.read_bandwidth()
    record = {"device": device, "jax": jax.__version__, "read_bandwidth": bandwidth, "rows": found}
    options.json.write_text(json.dumps(record, indent=1))
    draw(found, bandwidth, train_step.peak_flops(device), options.figure)


if __name__ == "__main__":
    main()
