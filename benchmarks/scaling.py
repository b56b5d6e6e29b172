"""Scaling over the GPUs of one host: `python -m benchmarks.scaling fsdp tensor --json OUT`, in parts of some minutes.

- fsdp: the 0.6B preset on 1, 2, 4, ... GPUs, parameters split over all of them; rows per GPU are constant, so that
  the efficiency is tokens per second and GPU over that of one.
- tensor: the same with heads and hidden units over pairs of GPUs.
- large: the 1.7B preset on all GPUs.
- context: a call of attention on one long sequence, split over 1, 2, 4, ... GPUs.
- resume: a run of one process per GPU, of which one is killed; the others must end, and the same command must continue
  the run on all GPUs, and on half of them, to the losses of a run that was not broken.

`--toy` tries them on emulated CPU devices: `JAX_NUM_CPU_DEVICES=8 python -m benchmarks.scaling fsdp large --toy`.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("fsdp", "tensor", "large", "context", "resume")
_PATIENCE = 240  # seconds for one start of a run
_LATE = 60  # seconds in which the others must end when one was killed: --launch.timeout and a margin


def weak_scaling(tensor: int, preset: str, gpus: int, rows: int, flags: list[str]) -> list[dict]:
    """Steps of a preset on 1, 2, 4, ... GPUs; with `tensor` of 2, fsdp over pairs of them from 2 on."""
    counts = [2**i for i in range(tensor - 1, gpus.bit_length()) if 2**i <= gpus]
    counts = counts if tensor == 1 else [1, *counts]
    variants = []
    for count in counts:
        split = min(tensor, count)
        mesh = f"mesh.data=1,mesh.fsdp={count // split},mesh.tensor={split}"
        variants.append(f"{mesh},batch_size={rows * count}")
    results = steps(preset, variants, flags)
    alone = results[0].get("tokens_per_second")
    for row in results:
        if alone and "tokens_per_second" in row:
            row["efficiency"] = row["tokens_per_second"] / row["devices"] / alone
            share = row["optimizer_seconds"] / row["seconds"]
            print(f"{row['devices']} GPUs: efficiency {row['efficiency']:.1%}, optimizer {share:.1%} of the step")
    return results


def steps(preset: str, variants: list[str], flags: list[str]) -> list[dict]:
    """Rows of benchmarks.train_step for Parallax alone; one that failed says so itself."""
    return report("train_step", preset, "--attention", "parallax", *flags, "--variants", *variants)


def report(benchmark: str, *flags: str):
    """The JSON that another benchmark writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{benchmark}", *flags, "--json", str(path)])
        if not path.exists():
            raise RuntimeError(f"benchmarks.{benchmark} failed with exit code {done.returncode}")
        return json.loads(path.read_text())


class Run:
    """A training run of one process per GPU; on CPUs of one device per process."""

    def __init__(self, folder: Path, count: int, flags: list[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-u", "-m", "train", *flags, "--run-dir", str(folder), "--log-interval", "1"]
        command += ["--mesh.fsdp", str(count), "--launch.timeout", "30"]
        command += ["--launch.coordinator", f"127.0.0.1:{port}", "--launch.num-processes", str(count)]
        self.logs = [folder.with_name(f"{folder.name}-{i}.log") for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            env = os.environ | {"JAX_LOCAL_DEVICE_IDS": str(i), "JAX_NUM_CPU_DEVICES": "1"}
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen([*command, "--launch.process-id", str(i)], env=env, stdout=file, stderr=file)
                )

    def text(self, process: int = 0) -> str:
        """What a process has printed."""
        return self.logs[process].read_text(errors="replace")

    def wait_for(self, text: str):
        """Waits until process 0 has printed `text`."""
        end = time.monotonic() + _PATIENCE
        while text not in self.text():
            if time.monotonic() > end or any(process.poll() for process in self.processes):
                self.stop()
                raise RuntimeError(f"no {text!r} in\n{self.text()}")
            time.sleep(0.02)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes of all processes.

        Raises:
          RuntimeError: some did not end in time.
        """
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not all processes ended within {seconds} s\n{self.text()}") from None
        finally:
            self.stop()

    def stop(self):
        """Kills what still runs."""
        for process in self.processes:
            process.kill()


def kill_and_resume(gpus: int, flags: list[str]) -> dict:
    """Kills one process of a run and continues it; returns what it took.

    Raises:
      RuntimeError: the others went on, or a continued run is not the unbroken one.
    """
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        place = Path(temporary)
        complete(place / "unbroken", gpus, flags)
        run = Run(place / "all", gpus, flags)
        run.wait_for("step 25/")
        killed, began = gpus - 1, time.monotonic()
        run.processes[killed].kill()
        codes = run.wait(_LATE)
        seconds = time.monotonic() - began
        if codes[killed] != -signal.SIGKILL or any(code == 0 for code in codes):
            raise RuntimeError(f"exit codes {codes} after process {killed} was killed\n{run.text()}")
        print(f"process {killed} of {gpus} killed: all ended within {seconds:.1f} s, exit codes {codes}")
        print("\n".join(f"  {line[:200]}" for line in run.text().splitlines()[-3:]))
        result = {"gpus": gpus, "seconds_to_end": seconds, "exit_codes": codes}
        shutil.copytree(place / "all", place / "half")
        for name, count in (("all", gpus), ("half", max(1, gpus // 2))):
            began = time.monotonic()
            complete(place / name, count, flags)
            difference = largest_difference(place / name, place / "unbroken")
            result[name] = {"gpus": count, "seconds": time.monotonic() - began, "largest_loss_difference": difference}
            print(f"continued on {count}: losses differ from the unbroken run's by {difference:.1e} at most")
            if difference > 0.02:
                raise RuntimeError(f"the run continued on {count} GPUs is another one: {difference}")
    return result


def complete(folder: Path, count: int, flags: list[str]):
    """Trains to the end."""
    run = Run(folder, count, flags)
    if any(run.wait(_PATIENCE)):
        raise RuntimeError("\n".join(run.text(i)[-3000:] for i in range(count)))


def largest_difference(a: Path, b: Path) -> float:
    """Of the losses of two runs, relative."""
    texts = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (a, b)]
    one, other = ({r["step"]: r["loss"] for r in map(json.loads, text) if "loss" in r} for text in texts)
    if one.keys() != other.keys():
        raise RuntimeError(f"{a} has losses of {len(one)} updates, {b} of {len(other)}")
    return max(abs(one[step] - other[step]) / other[step] for step in one)


def main():
    """Runs the parts named, one after another, and writes JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--gpus", type=int, help="all of the host by default")
    parser.add_argument("--rows", type=int, default=8, help="rows of 4096 tokens for each GPU, 0.6B preset")
    parser.add_argument("--large-rows", type=int, default=4, help="the same, 1.7B preset")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072], help="of sequences, part context")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--toy", action="store_true", help="small shapes, for CPUs")
    args = parser.parse_args()
    gpus = args.gpus or device_count()
    small, large = ("tiny", "tiny") if args.toy else ("parallax_0p6b", "parallax_1p7b")
    flags = ["--seq-len", "64" if args.toy else "4096", "--steps", "10"]
    run_flags = ["tiny" if args.toy else "laptop", "--batch-size", str(16 * gpus)]
    run_flags += ["--steps", "60", "--checkpoint-interval", "20", "--eval-interval", "50"]
    lengths = ["512"] if args.toy else map(str, args.lengths)
    work = {
        "fsdp": lambda: weak_scaling(1, small, gpus, args.rows, flags),
        "tensor": lambda: weak_scaling(2, small, gpus, args.rows, flags),
        "large": lambda: steps(large, [f"mesh.data=1,mesh.fsdp={gpus},batch_size={args.large_rows * gpus}"], flags),
        "context": lambda: report("context", "--devices", str(gpus), "--lengths", *lengths),
        "resume": lambda: kill_and_resume(gpus, run_flags),
    }
    results = {}
    for part in args.parts:
        print(f"== {part}, {gpus} devices", flush=True)
        began = time.monotonic()
        results[part] = work[part]()
        print(f"== {part}: {time.monotonic() - began:.0f} s", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))


def device_count() -> int:
    """Devices of this host, counted by another process: this one must leave them to those that it starts."""
    command = [sys.executable, "-c", "import jax; print(jax.local_device_count())"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
