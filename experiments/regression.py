"""Integrated error of the family's members against the number of keys (arXiv 2605.29157, theorem 2.1).

    python -m experiments.regression            # measures what docs/results/regression.jsonl lacks, in CPU minutes
    python -m experiments.regression --report   # docs/results/regression.md and regression.png from it

A task is a random function on [-1, 1]^d and n noisy values of it at uniform places: the keys. Queries are uniform too
and answered by `local_estimator`, all of it in float64. The places lie on a sphere so large that it is flat, so that
query and key have one norm, as under QK-norm, and softmax weights are a Gaussian kernel of width sqrt(bandwidth) in d
dimensions. The bandwidth of each estimator and n is the best on other tasks than those that are reported.
"""

import argparse
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from parallax_jax import local_estimator
from parallax_jax.estimators import Estimator, Solver

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RADIUS, NOISE, QUERIES, TASKS = 300.0, 0.3, 64, 32
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
WIDTHS = tuple(2.0 ** (i / 2) for i in range(-17, 3))  # of the kernel: 0.0028 to 2
SOLVER = Solver(ridge=1e-3, method="exact")
DATA = ("smooth", "kinks", "jumps")
# Estimator -> exponents of n in the integrated error of smooth functions, from the dimension.
RATES = {
    "global linear": lambda d: 0.0,
    "local constant: softmax": lambda d: -3 / (d + 3),
    "local linear: LLA": lambda d: -4 / (d + 4),
}
NAMES = (*RATES, "Parallax, oracle probe", "Parallax, learned probe W x", "Parallax, learned probe W g(x)")


def functions(rng: np.random.Generator, tasks: int, d: int, x: np.ndarray) -> np.ndarray:
    """Values (tasks, places, 3) of a smooth, a kinked and a discontinuous random function of each task at x."""
    direction = rng.normal(size=(tasks, 6, d))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    along = np.einsum("npd,nkd->npk", x, direction)
    phase, weight = rng.uniform(0, 2 * np.pi, (tasks, 1, 6)), rng.normal(size=(tasks, 1, 6)) / 6**0.5
    smooth = (weight * np.sin(along * np.linspace(0.5, 4, 6) + phase)).sum(-1)
    at = rng.uniform(-0.7, 0.7, (tasks, 1, 3))
    kinks = (rng.normal(size=(tasks, 1, 3)) * np.abs(along[..., :3] - at)).sum(-1)
    jumps = smooth + (0.5 * np.sign(along[..., :3] - at)).sum(-1)
    return np.stack([smooth, kinks, jumps], -1)


def draw(rng: np.random.Generator, tasks: int, d: int, n: int):
    """Queries and keys (tasks, places, 1, d + 1), noisy values (tasks, n, 1, 3), true answers (tasks, queries, 3)."""
    x = rng.uniform(-1, 1, (tasks, QUERIES + n, d))
    true = functions(rng, tasks, d, x)
    on_sphere = np.concatenate([x, np.sqrt(RADIUS**2 - (x**2).sum(-1, keepdims=True))], -1)[:, :, None]
    noisy = true[:, QUERIES:] + NOISE * rng.normal(size=(tasks, n, 3))
    return on_sphere[:, :QUERIES], on_sphere[:, QUERIES:], noisy[:, :, None], true[:, :QUERIES]


@jax.jit
def _predict(query, key, value):
    """Answers (tasks, queries, 3) of the members at bandwidth 1, and the covariances with the keys."""
    estimate = functools.partial(local_estimator, is_causal=False, solver=SOLVER)
    mean = estimate(query, None, key, value, estimator=Estimator("zero", 1.0))
    answers = {
        "global linear": estimate(query, None, key, value, estimator="affine_mesa"),
        "local constant: softmax": mean,
        "local linear: LLA": estimate(query, None, key, value, estimator=Estimator("solved", 1.0, boundary=True)),
        "Parallax, oracle probe": estimate(query, None, key, value, estimator=Estimator("solved", 1.0)),
    }
    basis = jnp.eye(query.shape[-1], dtype=query.dtype)[:-1]  # the last axis is normal to the places
    learned = lambda probe: estimate(query, probe, key, value, estimator=Estimator("learned", 1.0))
    covariance = [mean - learned(jnp.broadcast_to(e, query.shape)) for e in basis]
    return {name: x[:, :, 0] for name, x in answers.items()}, jnp.stack(covariance, -1)[:, :, 0]


def _features(x: np.ndarray, kind: str) -> np.ndarray:
    """What a layer sees of a query: itself and a constant, or also bumps on a grid as other layers might compute."""
    ones = np.ones((*x.shape[:-1], 1))
    if kind == "W x":
        return np.concatenate([x, ones], -1)
    centres = np.linspace(-1, 1, 9)
    bumps = np.exp(-((x[..., None] - centres) ** 2) / 0.1)
    if x.shape[-1] == 1:
        return np.concatenate([x, bumps[..., 0, :], ones], -1)
    return np.concatenate([x, (bumps[..., 0, :, None] * bumps[..., 1, None, :]).reshape(*x.shape[:-1], -1), ones], -1)


def _learned(x, true, mean, covariance, kind, training):
    """Answers of Parallax with the probe W g(x), W fitted to the true answers of the training tasks.

    The answer mean - covariance . W g(x) is linear in W, so training is least squares.
    """
    g = _features(x, kind)
    answers = np.empty_like(true)
    for i in range(true.shape[-1]):
        design = -(covariance[:, :, i, :, None] * g[..., None, :]).reshape(*true.shape[:2], -1)
        wanted = (true - mean)[training, :, i].ravel()
        w, *_ = np.linalg.lstsq(design[training].reshape(len(wanted), -1), wanted, rcond=1e-8)
        answers[..., i] = mean[..., i] + design @ w
    return answers


def measure(d: int, n: int, seed: int = 0) -> list[dict]:
    """Integrated squared error of every estimator and kind of function."""
    rng = np.random.default_rng([seed, d, n])
    # A third of the tasks trains the probe, a third chooses the bandwidth, a third is reported.
    query, key, value, true = draw(rng, 3 * TASKS, d, n)
    training, choice, test = (slice(i * TASKS, (i + 1) * TASKS) for i in range(3))
    errors: dict[str, dict] = {name: {} for name in NAMES}  # name -> width -> (tasks, 3)
    for width in WIDTHS:
        # In units of the width, so that one compiled function serves all; the ridge has these units too.
        answers, covariance = _predict(jnp.asarray(query / width), jnp.asarray(key / width), jnp.asarray(value))
        answers = {name: np.asarray(x) for name, x in answers.items()}
        x, mean = query[:, :, 0, :-1], answers["local constant: softmax"]
        for kind in ("W x", "W g(x)"):
            given = (x, true, mean, np.asarray(covariance), kind, training)
            answers[f"Parallax, learned probe {kind}"] = _learned(*given)
        if width != 1:  # in smaller units the sphere's bend would give the global fit a quadratic term
            del answers["global linear"]
        for name, x in answers.items():
            errors[name][width] = ((x - true) ** 2).mean(1)
    rows = []
    for name in NAMES:
        for i, data in enumerate(DATA):
            width = min(errors[name], key=lambda w: errors[name][w][choice, i].mean())
            found = errors[name][width][test, i]
            row = {"d": d, "n": n, "data": data, "estimator": name, "width": width, "error": float(found.mean())}
            rows.append(row | {"standard_error": float(found.std(ddof=1) / TASKS**0.5), "seed": seed})
    return rows


def slope(rows: list[dict], least: int = 128) -> tuple[float, float]:
    """Slope of log error over log n from `least` keys on, and its standard error, by weighted least squares.

    Points whose best bandwidth is the narrowest tried are left out.
    """
    rows = [row for row in rows if row["n"] >= least and not _at_the_edge(row)]
    if len(rows) < 3:
        return math.nan, math.nan
    x, y = (np.log([row[name] for row in rows]) for name in ("n", "error"))
    w = np.array([(row["error"] / row["standard_error"]) ** 2 for row in rows])
    centred = x - np.average(x, weights=w)
    return float((w * centred * y).sum() / (w * centred**2).sum()), float((w * centred**2).sum() ** -0.5)


def _at_the_edge(row: dict) -> bool:
    return row["width"] == WIDTHS[0] and row["estimator"] != NAMES[0]


def write_report(log: Path):
    """Writes the page and the figure beside the log."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    about, most = rows[-1], max(row["n"] for row in rows)
    dimensions = sorted({row["d"] for row in rows})
    commits = "commits " + ", ".join(sorted({str(row["commit"]) for row in rows}))
    softmax, lla = NAMES[1:3]
    pick = lambda d, data, name: [r for r in rows if (r["d"], r["data"], r["estimator"]) == (d, data, name)]
    last = lambda d, data, name: next(r["error"] for r in pick(d, data, name) if r["n"] == most)
    figure = Figure(figsize=(13, 4.2 * len(dimensions)), layout="constrained")
    for line, d in zip(figure.subplots(len(dimensions), len(DATA), squeeze=False), dimensions, strict=True):
        for axes, data in zip(line, DATA, strict=True):
            for name in NAMES:
                found = pick(d, data, name)
                n, error, spread = (np.array([r[x] for r in found]) for x in ("n", "error", "standard_error"))
                axes.errorbar(n, error, spread, marker=".", label=f"{name} ({slope(found)[0]:.2f})")
            axes.set(xscale="log", yscale="log", xlabel="keys", title=f"{data}, d = {d}")
            axes.set_ylim(axes.get_ylim()[0] / 8, axes.get_ylim()[1])
            axes.legend(fontsize=7, title="slope from 128 keys on", title_fontsize=7, loc="lower left")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("integrated squared error")
    figure.savefig(log.with_suffix(".png"), dpi=120)

    lines = []
    for d in dimensions:
        share = f"error at {most} keys over softmax attention's: " + ", ".join(DATA)
        head = ["estimator", "slope in theory, smooth", *(f"slope, {data}" for data in DATA), share]
        lines += [f"## d = {d}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name in NAMES:
            slopes = ["{:.2f} ± {:.2f}".format(*slope(pick(d, data, name))) for data in DATA]
            shares = (last(d, data, name) / last(d, data, softmax) for data in DATA)
            shares = ", ".join(f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in shares)
            theory = f"{RATES[name](d):.2f}" if name in RATES else "none given"
            lines.append(f"| {name} | {theory} | {' | '.join(slopes)} | {shares} |")
        (one, its), (other, error) = (slope(pick(d, "smooth", name)) for name in (lla, softmax))
        gap, error = one - other, math.hypot(its, error)
        verdict = "they are told apart" if abs(gap) > 2 * error else "they are not told apart at this number of tasks"
        theory = RATES[lla](d) - RATES[softmax](d)
        lines += [
            "",
            f"LLA's slope less softmax attention's, smooth functions: {gap:+.2f} ± {error:.2f}; theory {theory:+.2f}:",
        ]
        lines += [f"{verdict}."]
        edge = [r for r in rows if r["d"] == d and _at_the_edge(r)]
        if edge:
            where = sorted({(r["data"], r["n"]) for r in edge})
            text = ", ".join(f"{data} with {n} keys" for data, n in where)
            lines.append(f"Left out of the slopes, for their best bandwidth is the narrowest tried: {text}.")
        lines.append("")
    page = f"""# Regression: integrated error against the number of keys

`python -m experiments.regression` ({commits}; {about["device"]}, jax {about["jax"]}, float64) made the log
`regression.jsonl`, `python -m experiments.regression --report` this page. Random functions on [-1, 1]^d, noise of
standard deviation {NOISE}, {TASKS} tasks of {QUERIES} queries for every number; the bandwidth is chosen for each
estimator, n and kind of function on {TASKS} other tasks, learned probes are fitted to {TASKS} more. Slopes of log error
over log n from 128 keys on, with standard errors.

![error against keys](regression.png)

{chr(10).join(lines)}
"Oracle probe" is LLA's solved probe without its factor 1 + eta; with the factor Parallax is LLA, to rounding. "W x" is
what one Parallax layer can do, a probe linear in the query's place; "W g(x)" adds bumps on a grid, as an earlier layer
could compute them. The paper states the theory; it has no such measurement of Parallax.
"""
    log.with_suffix(".md").write_text(page)
    print(page)


def main():
    """Measures, or writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--log", type=Path, default=RESULTS / "regression.jsonl")
    parser.add_argument("--dimensions", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--commit", help="recorded in the log")
    args = parser.parse_args()
    if args.report:
        return write_report(args.log)
    jax.config.update("jax_enable_x64", True)
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": args.commit}
    done = (
        {(row["d"], row["n"]) for row in map(json.loads, args.log.read_text().splitlines())}
        if args.log.exists()
        else ()
    )
    with args.log.open("a", buffering=1) as log:
        for d, n in ((d, n) for d in args.dimensions for n in args.sizes if (d, n) not in done):
            rows = measure(d, n)
            log.writelines(json.dumps(row | about) + "\n" for row in rows)
            print(d, n, *(f"{row['error']:.2e}" for row in rows[:: len(DATA)]), flush=True)


if __name__ == "__main__":
    main()
