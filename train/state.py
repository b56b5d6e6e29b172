"""What a run updates, where it lies on the devices, and the jitted step that updates it."""

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
from train.config import Config, ConfigError

Batch = dict[str, Int[Array, "parts rows seq_len"]]
# Logical axes of the parameters to axes of the mesh; those not named are replicated.
_RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
_UNSHARDED = ("vocab", "head_dim", "norm", "layers")


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
    """The device mesh (data, fsdp, tensor) of a run, over the first devices if it needs fewer than there are.

    Raises:
      ConfigError: too few devices, or the batch or the model does not divide.
    """
    sizes, have = config.mesh, jax.device_count()
    data = sizes.data or max(1, have // (sizes.fsdp * sizes.tensor))
    shape = (data, sizes.fsdp, sizes.tensor)
    need, named = int(np.prod(shape)), f"mesh data={data} fsdp={sizes.fsdp} tensor={sizes.tensor}"
    if need > have:
        raise ConfigError(f"{named} needs {need} devices and there are {have}: make the mesh smaller")
    rows = config.batch_size // config.accumulation_steps
    model = config.model
    for name, value, by in (
        ("batch_size / accumulation_steps", rows, data * sizes.fsdp),
        ("model.width", model.width, sizes.fsdp),
        ("model.num_kv_heads", model.num_kv_heads, sizes.tensor),
        ("model.mlp_width", model.mlp_width, sizes.tensor),
    ):
        if value % by:
            raise ConfigError(f"{named}: {name}={value} must be a multiple of {by}")
    devices = np.array(jax.devices()[:need]).reshape(shape)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def abstract_state(model: TransformerLM, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, as `jax.ShapeDtypeStruct`s."""

    def init_params():
        return model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    boxed = jax.eval_shape(init_params)
    rules = [*_RULES.items(), *((name, None) for name in _UNSHARDED)]
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
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
        init = lambda key: nn.meta.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
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


def _shardings(abstract):
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def token_losses(model: TransformerLM, params, rows) -> Float[Array, "rows seq_len"]:
    """Cross-entropy in nats of each target, float32; 0 where the row is padding."""
    logits = model.apply({"params": params}, rows["inputs"], segment_ids=rows["segment_ids"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
    return jnp.where(rows["segment_ids"] > 0, losses, 0.0)


def make_train_step(
    model: TransformerLM,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    abstract: TrainState,
    trainable: Callable[[Any], Any] = lambda params: params,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The jitted update `(state, batch) -> (state, metrics)`; the state's memory is reused.

    The loss is the mean over all real tokens of the batch, whatever the parts in which it is computed. The metrics are
    scalars: "loss" in nats per token and "grad_norm" before the update and before clipping, "param_norm" after it,
    "learning_rate", and "tokens", the real ones. `trainable` returns the parameters with those that are frozen cut off
    from differentiation.
    """

    def step(state: TrainState, batch: Batch):
        tokens = jnp.sum(batch["segment_ids"] > 0)

        def part_loss(params, part):
            return jnp.sum(token_losses(model, trainable(params), part)) / tokens.astype(jnp.float32)

        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(part_loss)(state.params, part)), None

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

    return jax.jit(step, donate_argnums=0, out_shardings=(_shardings(abstract), None))


def device_batch(mesh: Mesh, rows: dict[str, np.ndarray], parts: int) -> Batch:
    """Puts this process's rows (rows, seq_len) on its devices as (parts, rows, seq_len), rows split over the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    return {
        name: jax.make_array_from_process_local_data(sharding, value.reshape(parts, -1, value.shape[-1]))
        for name, value in rows.items()
    }
