"""The README's code runs as written."""

import pathlib
import re

import jax
import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[2].split()[-1])
def test_code_runs(block):
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        exec(block, {})


def test_every_named_file_exists():
    root = README.parent
    picture = README.read_text().split("```\nparallax_jax/")[1].split("```")[0]
    folder = "parallax_jax"
    for line in picture.splitlines()[1:]:
        if not line.startswith(" "):
            folder = line.split("/")[0]
        missing = [name for name in re.findall(r"\b\w+\.py\b", line) if not (root / folder / name).exists()]
        assert not missing, f"{folder}: {missing}"
