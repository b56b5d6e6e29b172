"""The tables and the figure of docs/results/attention.md: `python -m benchmarks.attention_report ROWS.json FIGURE.png`.

ROWS.json is what `python -m benchmarks.attention --json ROWS.json` wrote.
"""

import argparse
import json
import pathlib

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.attention import BASELINE

# Name in the rows -> name in the report, color (of Okabe and Ito's palette, apart in any vision), hatch.
SHOWN = {
    "mosaic_gpu": ("`mosaic_gpu`", "#0072B2", None),
    "triton_lang": ("`triton_lang`", "#56B4E9", None),
    "triton_pallas": ("`triton_pallas`", "#009E73", None),
    BASELINE: ("published Triton", "#E69F00", None),
    "softmax: FlashAttention-3": ("softmax: FlashAttention-3", "#666666", "//"),
    "softmax: cuDNN (jax.nn)": ("softmax: cuDNN", "#BBBBBB", "//"),
}


def table(times: dict, names: list[str], cell) -> str:
    """A table in Markdown, a line a workload; `cell` makes the text of one of its rows and all of them by name."""
    lines = [["workload", *(SHOWN[name][0] for name in names)]]
    lines += [[w, *(cell(rows[name], rows) if name in rows else "" for name in names)] for w, rows in times.items()]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def draw(times: dict, title: str, path: pathlib.Path) -> None:
    """TFLOP/s of forward + backward as bars, in groups of a workload."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    for x, rows in enumerate(times.values()):
        here = [name for name in SHOWN if name in rows]
        _, colors, hatches = zip(*map(SHOWN.get, here), strict=True)
        places = [x + (i - (len(here) - 1) / 2) * 0.14 for i in range(len(here))]
        rates = [rows[name]["total_tflops"] for name in here]
        bars = axes.bar(places, rates, 0.14, color=colors, hatch=hatches, edgecolor="white")
        axes.bar_label(bars, fmt="%.0f", fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(times)), times)
    axes.set(ylabel="TFLOP/s, forward + backward", title=title)
    axes.margins(x=0.02, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    patches = [
        Patch(label=x.strip("`"), facecolor=color, hatch=hatch, edgecolor="white") for x, color, hatch in SHOWN.values()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(SHOWN), frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_report", description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", type=pathlib.Path)
    parser.add_argument("figure", type=pathlib.Path)
    options = parser.parse_args()
    record, times = json.loads(options.rows.read_text()), {}
    for row in record["rows"]:
        if "forward_ms" in row:
            times.setdefault(row["workload"], {})[row["implementation"]] = row
    numbers = "{forward_ms:.3f}, {forward_tflops:.0f} / {total_ms:.3f}, {total_tflops:.0f}"
    print(table(times, list(SHOWN), lambda row, _: numbers.format(**row)), end="\n\n")
    parts = lambda row, base: " / ".join(f"{row[key] / base[key]:.2f}" for key in ("forward_ms", "total_ms"))
    compared = {workload: rows for workload, rows in times.items() if BASELINE in rows}
    print(table(compared, [name for name in SHOWN if name != BASELINE], lambda row, rows: parts(row, rows[BASELINE])))
    draw(times, f"{record['device']}, {record['dtype']}", options.figure)


if __name__ == "__main__":
    main()
