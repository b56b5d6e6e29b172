"""Muon for weight matrices, Adam for embeddings, norms and biases; AdamW for all as the alternative.

Every parameter is routed by its path. optax's own rule, by rank, would orthogonalise the embedding and hand the
attention projections, which have a head axis, to Adam.
"""

import math

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from train.config import OptimizerConfig


def _names(path) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def group_of(names: tuple[str, ...]) -> str:
    """Group of the parameter at a path: "matrix", "embedding" or "norm" (norms and biases).

    Raises:
      ValueError: the path is not known; say here how it is to be trained.
    """
    match names:
        case (*_, "scale" | "bias"):
            return "norm"
        case ("embed", "embedding") | ("lm_head", "kernel"):
            return "embedding"
        case (*_, "attention", "query" | "probe" | "key" | "value" | "out", "kernel"):
            return "matrix"
        case (*_, "mlp", "gate" | "up" | "down", "kernel"):
            return "matrix"
    raise ValueError(f"no optimizer group for the parameter {'/'.join(names)}")


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
    """`optax.contrib.muon`'s matrix half from its own parts, with a choice of scaling that it lacks."""

    def dimensions(params):
        return jax.tree.map_with_path(lambda path, _: muon_dimensions(_names(path), config.per_head), params)

    def scale(path, update):
        axes = muon_dimensions(_names(path), config.per_head)
        fan_in, fan_out = (
            math.prod(update.shape[i] for i in (axis if isinstance(axis, tuple) else (axis,))) for axis in axes
        )
        factor = {
            "spectral": math.sqrt(fan_out / fan_in),
            "width": math.sqrt(max(1.0, fan_out / fan_in)),
            "consistent_rms": 0.2 * math.sqrt(max(fan_in, fan_out)),
        }
        return factor[config.scaling] * update

    return optax.chain(
        optax.contrib.scale_by_muon(
            ns_steps=config.newton_schulz_steps, beta=config.momentum, weight_dimension_numbers=dimensions
        ),
        optax.stateless(lambda updates, _: jax.tree.map_with_path(scale, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
