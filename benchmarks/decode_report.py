"""The paper's figure of decode ratios from timings: `python -m benchmarks.decode_report ROWS.json... FIGURE.png`.

ROWS.json is what `python -m benchmarks.decode paper --json ROWS.json` wrote, or one of paper64 and one of paper128.
Ratios are the time of the faster of the softmax peers over the time of Parallax, at equal head_dim and for Parallax
with 64 against softmax with 128. Shapes below 1 are listed, and those of more than 256 MB that read more slowly than
0.95 of a pass over as many bytes.
"""

import argparse
import json
import math
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

SOFTMAX = ("cudnn", "fa3")
COMPARISONS = {
    "head_dim 64": (64, 64),
    "head_dim 128": (128, 128),
    "Parallax 64, softmax 128": (64, 128),
}


def ratios(rows: list[dict]) -> dict[str, dict[tuple[int, int], float]]:
    """Comparison -> (batch x heads, length) -> softmax's time over Parallax's."""
    key = lambda row: (row["batch"] * row["kv_heads"], row["length"])
    ours = {(row["head_dim"], *key(row)): row["us"] for row in rows}
    softmax = {
        (row["head_dim"], *key(row)): min(row[name] for name in SOFTMAX if name in row)
        for row in rows
        if any(name in row for name in SOFTMAX)
    }
    return {
        name: {
            (heads, length): softmax[theirs, heads, length] / us
            for (width, heads, length), us in ours.items()
            if width == mine and (theirs, heads, length) in softmax
        }
        for name, (mine, theirs) in COMPARISONS.items()
    }


def of_read_bandwidth(rows: list[dict]) -> dict[tuple[int, int, int], float]:
    """(head_dim, batch x heads, length) above 256 MB -> share of the speed of a pass that reads as many bytes."""
    return {
        (row["head_dim"], row["batch"] * row["kv_heads"], row["length"]): row["bandwidth_share_of_same_size"]
        for row in rows
        if 4 * row["batch"] * row["kv_heads"] * row["length"] * row["head_dim"] > 256e6
    }


def draw(tables: dict, title: str, path: pathlib.Path) -> None:
    """One heat map a comparison; white is 1, blue faster, red slower; blank where no peer ran."""
    size = (5 * len(tables), 4.6)
    figure, (axes,) = plt.subplots(1, len(tables), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        heads, lengths = (sorted({shape[i] for shape in table}) for i in (0, 1))
        grid = np.full((len(lengths), len(heads)), np.nan)
        for (head, length), ratio in table.items():
            grid[lengths.index(length), heads.index(head)] = ratio
        image = axis.imshow(np.log2(grid), cmap="RdBu", vmin=-1, vmax=1, origin="lower", aspect="auto")
        for (y, x), ratio in np.ndenumerate(grid):
            if not math.isnan(ratio):
                color = "white" if abs(math.log2(ratio)) > 0.6 else "black"
                axis.text(x, y, f"{ratio:.2f}", ha="center", va="center", fontsize=6, color=color)
        axis.set_xticks(range(len(heads)), heads, rotation=90)
        axis.set_yticks(range(len(lengths)), lengths)
        axis.set(title=f"{name}: {mean(table):.2f}x", xlabel="batch x heads")
    axes[0].set_ylabel("keys")
    bar = figure.colorbar(image, ax=axes, pad=0.01, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.ax.set_yticklabels(["0.5", "0.7", "1", "1.4", "2"])
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def mean(table: dict) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, table.values())) / len(table))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_report", description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", type=pathlib.Path, nargs="+")
    parser.add_argument("figure", type=pathlib.Path)
    options = parser.parse_args()
    records = [json.loads(path.read_text()) for path in options.rows]
    if len({record["device"] for record in records}) > 1:
        parser.error(f"rows: of different devices, {', '.join(record['device'] for record in records)}")
    rows = [row for record in records for row in record["rows"]]
    tables = {name: table for name, table in ratios(rows).items() if table}
    for name, table in tables.items():
        below = {shape: ratio for shape, ratio in sorted(table.items()) if ratio < 1}
        print(f"{name}: geometric mean {mean(table):.2f}x, {len(table) - len(below)} of {len(table)} at 1.0 or more")
        for (heads, length), ratio in below.items():
            print(f"  below: batch x heads {heads}, {length} keys: {ratio:.3f}")
    for width in sorted({row["head_dim"] for row in rows}):
        shares = {shape: share for shape, share in sorted(of_read_bandwidth(rows).items()) if shape[0] == width}
        slow = {shape: share for shape, share in shares.items() if share < 0.95}
        if shares:
            print(f"head_dim {width}: 0.95 of the read bandwidth in {len(shares) - len(slow)} of {len(shares)}")
        for (_, heads, length), share in slow.items():
            print(f"  below: batch x heads {heads}, {length} keys: {share:.3f}")
    draw(tables, f"Softmax's time / Parallax's, one new token, {records[0]['device']}", options.figure)


if __name__ == "__main__":
    main()
