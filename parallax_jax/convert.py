"""`python -m parallax_jax.convert IN OUT --attention parallax`: a pretrained folder as a Parallax one."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from parallax_jax.pretrained import load_pretrained, save_pretrained

# What a folder holds beside the model, and what config.json says beside its maths.
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
_FILES += ("generation_config.json", "LICENSE")
_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


def convert(source: Path, target: Path, *, attention: str | None = None, dtype: str | None = None, seed: int = 0):
    """Reads a folder and writes it as another, its tokenizer included. Arguments and errors as in `load_pretrained`."""
    config, params = load_pretrained(source, attention=attention, dtype=dtype, seed=seed)
    fields = json.loads((source / "config.json").read_text())
    save_pretrained(target, config, params, extra={name: fields[name] for name in _FIELDS if name in fields})
    for name in _FILES:
        if (source / name).exists():
            shutil.copy(source / name, target)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser("python -m parallax_jax.convert", description=__doc__.split(": ", 1)[1])
    parser.add_argument("source", type=Path, metavar="IN", help="folder with config.json and safetensors")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--attention", choices=("parallax", "softmax"), help="default: what IN holds")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--seed", type=int, default=0, help="of the new probe's projection (default: 0)")
    args = parser.parse_args(argv)
    try:
        config = convert(args.source, args.target, attention=args.attention, dtype=args.dtype, seed=args.seed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.target}: {config.num_layers} layers of {config.attention} attention, width {config.width}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
