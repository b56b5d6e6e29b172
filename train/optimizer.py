"""Muon for weight matrices, Adam for embeddings, norms and biases; AdamW for all as the alternative.

Every parameter is routed by its path. optax's own rule, by rank, would orthogonalise the embedding and hand the
attention projections, which have a head axis, to Adam.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from parallax_jax.sharding import parameter_sharding
from train.config import OptimizerConfig

# Logical axes of the matrices, which say how a mesh splits them; those of layers come before.
MATRIX_AXES = {
    **dict.fromkeys(("query", "probe"), ("embed", "heads", "head_dim")),
    **dict.fromkeys(("key", "value"), ("embed", "kv_heads", "head_dim")),
    "out": ("heads", "head_dim", "embed"),
    **dict.fromkeys(("gate", "up"), ("embed", "mlp")),
    "down": ("mlp", "embed"),
}


def _names(path) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def group_of(names: tuple[str, ...]) -> str:
    """Group of the parameter at a path: "matrix", "embedding" or "norm" (norms, biases and gates).

    Raises:
      ValueError: the path is not known; say here how it is to be trained.
    """
    match names:
        case (*_, "scale" | "bias") | (*_, "probe_gate", "kernel"):
            return "norm"
        case ("embed", "embedding") | ("lm_head", "kernel"):
            return "embedding"
        case (*_, "attention", "query" | "probe" | "key" | "value" | "out", "kernel"):
            return "matrix"
        case (*_, "mlp", "gate" | "up" | "down", "kernel"):
            return "matrix"
    raise ValueError(f"no optimizer group for the parameter {'/'.join(names)}")


def is_matrix(path) -> bool:
    """Whether the parameter at a key path is one of the group "matrix"."""
    return group_of(_names(path)) == "matrix"


def muon_dimensions(names: tuple[str, ...], per_head: bool = False) -> MuonDimensionNumbers:
    """Input and output axes of the matrix at a path, counted from the end: a leading axis of layers is a batch axis.

    Args:
      names: path of a parameter of group "matrix".
      per_head: take each head for a matrix of its own; else (width, heads * head_dim) is one, as in the paper's code.
    """
    match names[-2]:
        case "query" | "probe" | "key" | "value":  # (width, heads, head_dim)
            return MuonDimensionNumbers(-3, -1 if per_head else (-2, -1))
        case "out":  # (heads, head_dim, width)
            return MuonDimensionNumbers(-2 if per_head else (-3, -2), -1)
    return MuonDimensionNumbers(-2, -1)


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by update: warm-up, then "wsd" (constant, linear to 0) or "cosine" (to 0 at `steps`)."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
    decay = round(config.decay_fraction * steps)
    parts = [optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, 0.0, decay)]
    return optax.join_schedules([parts[0], optax.constant_schedule(peak), parts[1]], [warmup, steps - decay])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates, clipping included, for the parameters of `TransformerLM`."""
    schedule = learning_rate_schedule(config, steps)

    def adam(rate: float, weight_decay: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda count: rate * schedule(count),
            config.adam_b1,
            config.adam_b2,
            config.adam_eps,
            weight_decay=weight_decay,
        )

    probe_norm_rate = config.norm_rate if config.probe_norm_rate is None else config.probe_norm_rate
    transforms = {
        "matrix": _muon(config, schedule) if config.name == "muon" else adam(1.0, config.weight_decay),
        "embedding": adam(config.embedding_rate, config.adam_weight_decay),
        "norm": adam(config.norm_rate, config.adam_weight_decay),
        "probe_norm": adam(probe_norm_rate, config.adam_weight_decay),
        "frozen": optax.set_to_zero(),
    }

    def group(path, _) -> str:
        names = _names(path)
        if _frozen(config, names):
            return "frozen"
        return "probe_norm" if "probe_norm" in names else group_of(names)

    def relative_rate(path, update):
        names = _names(path)
        if "probe_norm" in names:
            return update
        return update * (config.probe_rate if "probe" in names else config.base_rate)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(transforms, lambda params: jax.tree.map_with_path(group, params)),
        optax.stateless(lambda updates, _: jax.tree.map_with_path(relative_rate, updates)),
    )


def _frozen(config: OptimizerConfig, names: tuple[str, ...]) -> bool:
    return config.base_rate == 0 and "probe" not in names and "probe_norm" not in names


def stop_frozen(config: OptimizerConfig, params):
    """The parameters, those that the optimizer leaves alone cut off from differentiation."""
    return jax.tree.map_with_path(
        lambda path, param: jax.lax.stop_gradient(param) if _frozen(config, _names(path)) else param, params
    )


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """`optax.contrib.muon`'s matrix half, its iterations run by all devices at once, with a choice of scaling."""

    def dimensions(params):
        return jax.tree.map_with_path(lambda path, _: muon_dimensions(_names(path), config.per_head), params)

    def scale(path, update):
        axes = muon_dimensions(_names(path), config.per_head)
        fan_in, fan_out = (math.prod(update.shape[i] for i in _tuple(axis)) for axis in axes)
        factor = {
            "spectral": math.sqrt(fan_out / fan_in),
            "width": math.sqrt(max(1.0, fan_out / fan_in)),
            "consistent_rms": 0.2 * math.sqrt(max(fan_in, fan_out)),
        }
        return factor[config.scaling] * update

    return optax.chain(
        # Without iterations this is the momentum over its Frobenius norm, with which they begin.
        optax.contrib.scale_by_muon(ns_steps=0, beta=config.momentum, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: _orthogonalise(updates, config)),
        optax.stateless(lambda updates, _: jax.tree.map_with_path(scale, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _tuple(axes):
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def _split(mesh, specs) -> tuple[str, ...]:
    """The mesh axes in entries of a spec, those of one device left out."""
    return tuple(name for names in specs for name in _tuple(names) if mesh.shape[name] > 1)


def _orthogonalise(updates, config: OptimizerConfig):
    """Newton-Schulz iterations of every matrix, all those of a shape as one batch, of which each device has a share.

    Matrices that are split over the mesh are made whole by all-to-all, and split again by another.
    """
    leaves, tree = jax.tree.flatten_with_path(updates)
    mesh = jax.sharding.get_abstract_mesh()
    groups = {}
    for index, (path, leaf) in enumerate(leaves):
        names = _names(path)
        axes = muon_dimensions(names, config.per_head)
        rows, columns = ([i % leaf.ndim for i in _tuple(axis)] for axis in axes)
        if math.prod(leaf.shape[i] for i in rows) > math.prod(leaf.shape[i] for i in columns):
            rows, columns = columns, rows  # the orthogonal factor of the transpose is the transpose, and costs less
        batch = [i for i in range(leaf.ndim) if i not in rows + columns]
        logical = [None] * (leaf.ndim - len(MATRIX_AXES[names[-2]])) + list(MATRIX_AXES[names[-2]])
        spec = parameter_sharding(mesh, logical, leaf.shape).spec if mesh.size > 1 else P(*[None] * leaf.ndim)
        split = tuple(_split(mesh, [spec[i] for i in axes]) for axes in (batch, rows, columns))
        sides = tuple(math.prod(leaf.shape[i] for i in side) for side in (rows, columns))
        groups.setdefault((sides, split), []).append((index, spec, (batch, rows, columns)))
    results = [None] * len(leaves)
    for (_, split), members in groups.items():
        layouts = [layout for _, _, layout in members]
        run = functools.partial(_orthogonalise_group, layouts, split, config)
        specs = [spec for _, spec, _ in members]
        if mesh.size > 1:
            run = jax.shard_map(run, in_specs=(specs,), out_specs=specs, check_vma=False)
        indices = [index for index, _, _ in members]
        for index, result in zip(indices, run([leaves[i][1] for i in indices]), strict=True):
            results[index] = result
    return tree.unflatten(results)


def _orthogonalise_group(layouts, split, config: OptimizerConfig, leaves):
    """What one device does for matrices of one shape, of which it is given its parts.

    Args:
      layouts: of each leaf, its axes that count matrices, that make their rows, and that make their columns.
      split: mesh axes that split the number of matrices, their rows and their columns.
      config: the optimizer's configuration.
      leaves: this device's parts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    _, rows, columns = split
    copies = tuple(name for name in _split(mesh, mesh.axis_names) if not any(name in names for names in split))
    matrices = []
    for x, layout in zip(leaves, layouts, strict=True):
        sizes = [math.prod(x.shape[i] for i in side) for side in layout]
        matrices.append(x.transpose(*itertools.chain(*layout)).reshape(sizes).astype(config.newton_schulz_dtype))
    x = jnp.concatenate(matrices)
    count, shares = len(x), math.prod(mesh.shape[name] for name in rows + columns + copies)
    # As one array: XLA for CPUs may hand its pieces to the all-to-all in different layouts, which it then refuses.
    x = lax.optimization_barrier(jnp.pad(x, ((0, -count % shares), (0, 0), (0, 0))))
    for axis, names in ((1, rows), (2, columns)):
        if names:
            x = lax.all_to_all(x, names, 0, axis, tiled=True)
    if copies:
        size = len(x) // math.prod(mesh.shape[name] for name in copies)
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(copies) * size, size)
    x = newton_schulz(x, config.newton_schulz_steps)
    if copies:
        x = lax.all_gather(x, copies, tiled=True)
    for axis, names in ((2, columns), (1, rows)):
        if names:
            x = lax.all_to_all(x, names, axis, 0, tiled=True)
    results, first = [], 0
    for leaf, layout, matrix in zip(leaves, layouts, matrices, strict=True):
        order = list(itertools.chain(*layout))
        part = x[first : first + len(matrix)].reshape([leaf.shape[i] for i in order])
        results.append(part.transpose([order.index(i) for i in range(leaf.ndim)]).astype(leaf.dtype))
        first += len(matrix)
    return results


def newton_schulz(x: Float[Array, "B M N"], steps: int) -> Float[Array, "B M N"]:
    """Brings the singular values of matrices of norm 1 at most near 1, with M <= N, by Muon's quintic iteration.

    Computed in the dtype of `x`. In bfloat16 the result differs from float32's by 3 to 6 % in Frobenius norm, for an
    iteration multiplies small singular values and their errors by up to 3.4.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    identity = jnp.eye(x.shape[1], dtype=x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = (a * identity + b * gram + c * (gram @ gram)) @ x
    return x
