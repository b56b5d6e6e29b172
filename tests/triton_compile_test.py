"""XLA's own GPU compiler on every Triton kernel, for GPUs that are not there: no spill, no shared-memory overflow."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from parallax_jax import parallax_attention
from parallax_jax.workloads import Workload
from train.gpus import gpu_devices

pytestmark = pytest.mark.compile

WORKLOADS = {
    "causal": Workload("causal", 1, 1024, 4, 128, kv_heads=2),
    "full": Workload("full", 1, 1024, 2, 128, is_causal=False),
    "window": Workload("window", 1, 1024, 2, 128, window=200),
    "packed": Workload("packed", 1, 1024, 2, 128, segments=4),
    "ragged": Workload("ragged", 2, 1000, 2, 128, ragged=True),
}


def compile_gradients(devices, workload: Workload, dtype, head_dim: int, spills: bool = False) -> None:
    """Compiles forward and backward for the first device; raises where a kernel does not fit it, or spills."""
    mesh = jax.sharding.Mesh(devices[:1], ("x",))
    loss = lambda options, *x: jnp.sum(
        parallax_attention(*x, implementation="triton", **options, **fixed).astype(jnp.float32)
    )
    options = workload.options()
    fixed = {name: x for name, x in options.items() if not isinstance(x, jax.Array)}
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)
    arrays = {name: abstract(x) for name, x in options.items() if name not in fixed}
    shapes = [jax.ShapeDtypeStruct((*s[:3], head_dim), dtype, sharding=replicated) for s in workload.shapes]
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3, 4)))
        lowered = step.trace(arrays, *shapes).lower(lowering_platforms=("cuda",))
        lowered.compile(compiler_options={"xla_gpu_fail_ptx_compilation_on_register_spilling": not spills})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["causal", "full"])
def test_hopper_without_a_spill(name, head_dim, dtype):
    compile_gradients(gpu_devices(1), WORKLOADS[name], jnp.dtype(dtype), head_dim)


MASKS = [(name, width, "bfloat16") for name in ("window", "packed", "ragged") for width in (64, 128, 256)]


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [*MASKS, ("ragged", 64, "float32"), ("window", 128, "float32"), ("packed", 256, "float32")],
)
def test_hopper_masks(name, head_dim, dtype):
    """Masks take registers of their own: at head_dim 128 some spill, and no one has timed smaller tiles against it."""
    compile_gradients(gpu_devices(1), WORKLOADS[name], jnp.dtype(dtype), head_dim, spills=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("card", ["A100", "RTX 4090"])
def test_smaller_cards_have_room(card, head_dim):
    """Shared memory only: their launches come from the heuristic, and no one has timed them."""
    compile_gradients(gpu_devices(1, card), WORKLOADS["causal"], jnp.bfloat16, head_dim, spills=True)


def test_a_spill_fails():
    """The check can fail: a launch whose accumulators cannot fit the registers is refused."""
    from pallas_kernels.block_sizes import TritonBlockSizes, TritonPass

    greedy = TritonPass(128, 128, 4, 2)
    workload = WORKLOADS["causal"]
    attention = functools.partial(parallax_attention, block_sizes=TritonBlockSizes(greedy, greedy, greedy))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(jax.errors.JaxRuntimeError, match=r"spill|[Ss]hared mem"):
        patch.setitem(globals(), "parallax_attention", attention)
        compile_gradients(gpu_devices(1), workload, jnp.bfloat16, 128)
