"""`python -m train [PRESET] [--flags]`."""

import time
from pathlib import Path

import jax

from train.config import parse_command_line, run_command
from train.distributed import failing_together, gather_text, initialize
from train.loop import train


def main(argv: list[str]) -> int:
    """Trains the preset that the command line names; returns the exit code."""
    preset, config = parse_command_line(argv)
    initialize(config.launch)
    if jax.default_backend() != "cpu" and jax.config.jax_compilation_cache_dir is None:
        # Programs for CPUs compile in seconds, and do not run on other ones.
        jax.config.update("jax_compilation_cache_dir", str(Path(".cache/xla").resolve()))
    with failing_together():
        folder = config.run_dir or f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        return train(config, Path(gather_text(folder)[0]), preset)


if __name__ == "__main__":
    run_command(main)
