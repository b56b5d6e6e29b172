"""What a run updates, where it lies on the devices, and the jitted step that updates it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from parallax_jax.model import TransformerLM
from parallax_jax.pretrained import load_pretrained
from parallax_jax.sharding import on_mesh, parameter_sharding
from train.config import Config, ConfigError
from train.loss import cross_entropy
from train.optimizer import is_matrix

Batch = dict[str, Int[Array, "parts rows seq_len"]]
# Outermost first: devices of a host are next to each other, and "tensor" has the most to say.
AXES = ("data", "fsdp", "context", "tensor")


class TrainState(NamedTuple):
    """Everything that an update changes.

    Attributes:
      step: int32 scalar, updates applied.
      params: float32 parameters of the model.
      opt_state: state of the optimizer.
    """

    step: Any
    params: Any
    opt_state: Any


def make_mesh(config: Config) -> Mesh:
    """The device mesh of a run, of axes `AXES`, over the first devices if it needs fewer than there are.

    Raises:
      ConfigError: too few devices, or the batch or the model does not divide.
    """
    sizes, have = config.mesh, jax.device_count()
    data = sizes.data or max(1, have // (sizes.fsdp * sizes.context * sizes.tensor))
    shape = (data, sizes.fsdp, sizes.context, sizes.tensor)
    need = math.prod(shape)
    named = "mesh " + " ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True))
    if need > have:
        raise ConfigError(f"{named} needs {need} devices and there are {have}: make the mesh smaller")
    rows = config.batch_size // config.accumulation_steps
    model = config.model
    for name, value, by in (
        ("batch_size / accumulation_steps", rows, data * sizes.fsdp),
        ("seq_len", config.seq_len, 2 * sizes.context if sizes.context > 1 else 1),
        ("model.width", model.width, sizes.fsdp),
        ("model.num_heads", model.num_heads, sizes.tensor),
        ("model.mlp_width", model.mlp_width, sizes.tensor),
    ):
        if value % by:
            raise ConfigError(f"{named}: {name}={value} must be a multiple of {by}")
    if model.num_kv_heads % sizes.tensor and sizes.tensor % model.num_kv_heads:
        raise ConfigError(f"{named}: model.num_kv_heads={model.num_kv_heads} must divide tensor or be a multiple of it")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:need])


def abstract_state(model: TransformerLM, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, as `jax.ShapeDtypeStruct`s."""
    boxed = jax.eval_shape(functools.partial(_init_params, model), jax.random.key(0))
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    shardings = jax.tree.map(lambda box: parameter_sharding(mesh, box.names, box.value.shape), boxed, is_leaf=is_box)
    replicated = NamedSharding(mesh, PartitionSpec())

    def masked(leaf):
        return isinstance(leaf, optax.MaskedNode)  # a parameter of another group

    def place(leaf, sharding=replicated):
        return leaf if masked(leaf) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(place, nn.meta.unbox(boxed), shardings)
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_state = optax.tree.map_params(
        optimizer, place, opt_state, shardings, transform_non_params=place, is_leaf=masked
    )
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated), params, opt_state)


def init_state(
    model: TransformerLM,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    seed: int,
    init_from: str | None = None,
) -> TrainState:
    """A fresh state, made on the devices where `abstract` places it.

    Raises:
      ConfigError: the pretrained folder `init_from` cannot be read.
    """
    shardings = _shardings(abstract)
    if init_from is None:
        init = lambda key: nn.meta.unbox(_init_params(model, key))
        params = jax.jit(init, out_shardings=shardings.params)(jax.random.key(seed))
    else:
        options = {"attention": model.config.attention, "dtype": "float32", "seed": seed}
        try:
            _, params = load_pretrained(init_from, shardings=shardings.params, **options)
        except (OSError, ValueError) as error:
            raise ConfigError(f"init_from={init_from!r}: {error}") from None
    begin = lambda params: (jnp.int32(0), optimizer.init(params))
    step, opt_state = jax.jit(begin, out_shardings=(shardings.step, shardings.opt_state))(params)
    return TrainState(step, params, opt_state)


def _init_params(model: TransformerLM, key):
    # No parameter depends on the attention kernel, which may be one for devices that are not here.
    model = TransformerLM(dataclasses.replace(model.config, implementation="xla"))
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def _shardings(abstract):
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def sum_of_losses(
    model: TransformerLM, params, rows, chunk: int, factor: Float[Array, ""] | float = 1.0
) -> Float[Array, ""]:
    """Sum over the real tokens of rows of the cross-entropy of their targets, in nats, float32, times a factor.

    Args:
      model: the model.
      params: its parameters.
      rows: "inputs", "targets" and "segment_ids", int32 (rows, seq_len); ids of 0 are padding. Without "segment_ids"
        every row is one document.
      chunk: tokens whose logits exist at once, on each device.
      factor: of every token's loss.
    """
    segment_ids = rows.get("segment_ids")
    hidden = model.apply({"params": params}, rows["inputs"], segment_ids=segment_ids, method="hidden")
    real = jnp.ones(hidden.shape[:2], bool) if segment_ids is None else segment_ids > 0
    weights = jnp.where(real, jnp.asarray(factor, jnp.float32), 0.0)
    head = params["embed"]["embedding"] if model.config.tie_embeddings else params["lm_head"]["kernel"].T
    return cross_entropy(hidden, head, rows["targets"], weights, chunk)


def real_tokens(rows) -> Int[Array, ""]:
    """Number of tokens that `sum_of_losses` sums over."""
    return jnp.sum(rows["segment_ids"] > 0) if "segment_ids" in rows else jnp.int32(rows["inputs"].size)


def make_train_step(
    model: TransformerLM,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    abstract: TrainState,
    trainable: Callable[[Any], Any] = lambda params: params,
    loss_chunk: int = 4096,
    gradient_dtype: str = "float32",
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The jitted update `(state, batch) -> (state, metrics)`; the state's memory is reused.

    The loss is the mean over all real tokens of the batch, whatever the parts in which it is computed. The metrics are
    scalars: "loss" in nats per token and "grad_norm" before the update and before clipping, "param_norm" after it,
    "learning_rate", and "tokens", the real ones. `trainable` returns the parameters with those that are frozen cut off
    from differentiation; `loss_chunk` is as in `train.loss`, `gradient_dtype` as in `Config`.
    """

    def rounded(path, param):
        return param.astype(gradient_dtype) if is_matrix(path) else param

    def step(state: TrainState, batch: Batch):
        tokens = real_tokens(batch)

        def part_loss(params, part):
            return sum_of_losses(model, trainable(params), part, loss_chunk, 1 / tokens.astype(jnp.float32))

        def part_gradients(part):
            # A projection's gradient has the dtype of its kernel.
            loss, grads = jax.value_and_grad(part_loss)(jax.tree.map_with_path(rounded, state.params), part)
            return loss, jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, state.params)

        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, part_gradients(part)), None

        parts = jax.tree.leaves(batch)[0].shape[0]
        if parts == 1:
            loss, grads = part_gradients(jax.tree.map(lambda leaf: leaf[0], batch))
        else:
            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
            (loss, grads), _ = jax.lax.scan(accumulate, zero, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(state.step),
            "tokens": tokens,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    step = on_mesh(abstract.step.sharding.mesh, step)
    return jax.jit(step, donate_argnums=0, out_shardings=(_shardings(abstract), None))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch (parts, rows, seq_len) lies: each part's rows are split over the mesh."""
    return NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))


def device_batch(mesh: Mesh, rows: dict[str, np.ndarray], parts: int) -> Batch:
    """Puts this process's rows (rows, seq_len) on its devices, as its share of a batch (parts, rows, seq_len)."""
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh), value.reshape(parts, -1, value.shape[-1]))
        for name, value in rows.items()
    }
