"""The kernels in the Triton language compiled for GPUs that are not there, within their registers and shared memory."""

import re
import subprocess
import sys
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import block_sizes, triton_routes
from parallax_jax import parallax_attention, parallax_decode
from parallax_jax.workloads import Workload

pytestmark = pytest.mark.triton_lang
triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pallas_kernels.triton_lang import launch  # noqa: E402

CARDS = {"A100": 80, "H100": 90, "B200": 100}
TRITON_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
WORKLOADS = {
    "causal": Workload("causal", 1, 1024, 4, 128, kv_heads=2),
    "full": Workload("full", 1, 1024, 2, 128, is_causal=False),
    "window": Workload("window", 1, 1024, 2, 128, window=200),
    "packed": Workload("packed", 1, 1024, 2, 128, segments=4),
    "ragged": Workload("ragged", 2, 1000, 2, 128, ragged=True),
}
SPILLED = 64  # bytes of a thread's registers that a plain kernel may spill; they lie outside the unmasked loops


def device(card: str):
    return AbstractMesh((), (), abstract_device=AbstractDevice(f"NVIDIA {card}", num_cores=None, platform="gpu"))


@pytest.fixture
def only_triton_lang(monkeypatch):
    monkeypatch.delitem(triton_routes.ROUTES, "triton")


def compiled(monkeypatch, card: str, function, *operands) -> dict[str, tuple]:
    """Name -> (compiled kernel, `assembled`) of every kernel that `function` launches."""
    kernels = {}

    def compile_instead(kernel, arrays, outputs, *, programs, config, **constants):
        types = [TRITON_TYPES[str(x.dtype)] for x in (*arrays, *outputs)]
        signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
        options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
        result = triton.compile(source, target=GPUTarget("cuda", CARDS[card], 32), options=options)
        kernels[kernel.__name__] = result, assembled(result, CARDS[card])
        return tuple(jnp.zeros(x.shape, x.dtype) for x in outputs)

    monkeypatch.setattr(launch, "launch", compile_instead)
    with jax.sharding.use_abstract_mesh(device(card)):
        jax.eval_shape(function, *operands)
    return kernels


class Assembled(NamedTuple):
    """What ptxas says: bytes stored for want of registers, and whether products on tensor cores wait for each other."""

    spilled: int
    serialized: bool


def assembled(kernel, capability: int) -> Assembled:
    ptxas = triton.knobs.nvidia.ptxas_blackwell if capability >= 100 else triton.knobs.nvidia.ptxas
    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    command = [ptxas.path, "-v", f"-arch={arch}", "-o", "/dev/null", "/dev/stdin"]
    log = subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True).stderr
    return Assembled(int(re.search(r"(\d+) bytes spill stores", log)[1]), "instructions are serialized" in log)


def gradients(workload: Workload, head_dim: int, dtype):
    """Forward and backward, and its operands."""
    options = workload.options()
    fixed = {name: x for name, x in options.items() if not isinstance(x, jax.Array)}
    arrays = {name: x for name, x in options.items() if name not in fixed}

    def loss(arrays, *operands):
        return jnp.sum(parallax_attention(*operands, implementation="triton", **arrays, **fixed).astype(jnp.float32))

    shapes = [jax.ShapeDtypeStruct((*s[:3], head_dim), jnp.dtype(dtype)) for s in workload.shapes]
    return jax.grad(loss, argnums=(1, 2, 3, 4)), arrays, *shapes


@pytest.mark.usefixtures("only_triton_lang")
@pytest.mark.parametrize(
    ("card", "head_dim", "dtype"),
    [(card, head_dim, "bfloat16") for card in CARDS for head_dim in (64, 128, 256)]
    + [("H100", 128, "float16"), ("H100", 128, "float32"), ("H100", 256, "float32")],
)
def test_attention_fits(monkeypatch, card, head_dim, dtype):
    kernels = compiled(monkeypatch, card, *gradients(WORKLOADS["causal"], head_dim, dtype))
    assert set(kernels) == {"parallax_forward", "parallax_backward_rows", "parallax_backward_columns"}
    for name, (kernel, machine) in kernels.items():
        assert kernel.metadata.shared <= block_sizes.shared_memory_limit(card), name
        if (card, dtype) == ("H100", "bfloat16") and head_dim <= 128:
            assert machine.spilled <= SPILLED, name
            assert not machine.serialized, name


@pytest.mark.usefixtures("only_triton_lang")
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim", "is_causal"),
    [(832, 4, 2, 128, True), (1000, 4, 2, 128, False), (1536, 8, 2, 64, True), (6144, 20, 4, 128, True)],
)
def test_products_overlap_at_any_length(monkeypatch, length, heads, kv_heads, head_dim, is_causal):
    """LLVM likes to move arithmetic between accumulators and a wait where a loop has no trip, at some shapes only."""
    workload = Workload("any", 1, length, heads, head_dim, kv_heads=kv_heads, is_causal=is_causal)
    kernels = compiled(monkeypatch, "H100", *gradients(workload, head_dim, "bfloat16"))
    assert not {name for name, (_, machine) in kernels.items() if machine.serialized}


@pytest.mark.usefixtures("only_triton_lang")
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "causal"])
def test_every_mask_fits(monkeypatch, name):
    for kernel, _ in compiled(monkeypatch, "H100", *gradients(WORKLOADS[name], 128, "bfloat16")).values():
        assert kernel.metadata.shared <= block_sizes.shared_memory_limit("H100")


@pytest.mark.usefixtures("only_triton_lang")
def test_a_spill_is_seen(monkeypatch):
    """The check can fail: accumulators that no register file holds are spilled."""
    greedy = block_sizes.TritonPass(128, 64, 4, 2)
    sizes = block_sizes.TritonLangBlockSizes(greedy, greedy, greedy)
    monkeypatch.setattr("pallas_kernels.triton_lang.triton_lang_block_sizes", lambda *_: sizes)
    kernels = compiled(monkeypatch, "H100", *gradients(WORKLOADS["causal"], 128, "bfloat16"))
    assert kernels["parallax_forward"][1].spilled > SPILLED


@pytest.mark.usefixtures("only_triton_lang")
@pytest.mark.parametrize(("batch", "new", "dtype"), [(1, 1, "bfloat16"), (64, 16, "bfloat16"), (1, 16, "float32")])
def test_decode_fits(monkeypatch, batch, new, dtype):
    shape = jax.ShapeDtypeStruct
    rows, cache = (batch, new, 12, 128), (2 * batch, 64, 4, 128)
    operands = [shape(x, jnp.dtype(dtype)) for x in (rows, rows, cache, cache)]
    decode = lambda table, *x: parallax_decode(*x, page_table=table, local_window_size=900, implementation="triton")
    integers = shape((batch, 16), jnp.int32), shape((batch,), jnp.int32)
    kernels = compiled(monkeypatch, "H100", decode, integers[0], *operands, integers[1])
    assert len(kernels) == (1 if batch == 64 else 2)
    for kernel, machine in kernels.values():
        assert kernel.metadata.shared <= block_sizes.shared_memory_limit("H100")
        assert machine.spilled <= SPILLED or dtype == "float32"


@pytest.mark.usefixtures("only_triton_lang")
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    ("batch", "keys", "head_dim"),
    [(1, 512, 128), (1, 16384, 128), (32, 1024, 128), (32, 4096, 128), (16, 512, 64), (128, 4096, 64)],
)
def test_decode_of_one_token_spills_nothing(monkeypatch, card, batch, keys, head_dim):
    shape = jax.ShapeDtypeStruct
    rows, cache = shape((batch, 1, 8, head_dim), jnp.bfloat16), shape((batch, keys, 8, head_dim), jnp.bfloat16)
    decode = lambda *x: parallax_decode(*x, implementation="triton")
    kernels = compiled(monkeypatch, card, decode, rows, rows, cache, cache, shape((batch,), jnp.int32))
    assert len(kernels) == (2 if batch == 1 else 1)
    for name, (kernel, machine) in kernels.items():
        assert kernel.metadata.shared <= block_sizes.shared_memory_limit(card), name
        assert machine.spilled == 0, name


@pytest.mark.usefixtures("only_triton_lang")
@pytest.mark.parametrize("page_size", [None, 16, 64])
@pytest.mark.parametrize(("batch", "keys"), [(1, 16384), (32, 4096)])
def test_decode_reads_tiles_ahead(monkeypatch, batch, keys, page_size):
    """A loop that waits for all its copies, for want of the next page's number, takes twice as long."""
    shape, pages = jax.ShapeDtypeStruct, batch * keys // (page_size or keys)
    rows, cache = shape((batch, 1, 8, 128), jnp.bfloat16), shape((pages, page_size or keys, 8, 128), jnp.bfloat16)
    table = None if page_size is None else shape((batch, pages // batch), jnp.int32)
    decode = lambda table, *x: parallax_decode(*x, page_table=table, implementation="triton")
    kernels = compiled(monkeypatch, "H100", decode, table, rows, rows, cache, cache, shape((batch,), jnp.int32))
    kernel, machine = next(x for name, x in kernels.items() if "merge" not in name)
    waits = {int(count) for count in re.findall(r"cp\.async\.wait_group\s+(\d+)", kernel.asm["ptx"])}
    assert max(waits) == {1: 2, 32: 4}[batch]  # keys and values of all stages but two
    assert machine.spilled == 0


def lower(function, *operands) -> str:
    with jax.sharding.use_abstract_mesh(device("H100")), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def no_pallas_triton(monkeypatch):
    """A JAX that has dropped Pallas' Triton module."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr("jax.experimental.pallas.triton", raising=False)
    for name in [x for x in sys.modules if re.match(r"pallas_kernels\.triton(\.|$)", x)]:
        monkeypatch.delitem(sys.modules, name)
    triton_routes.load.cache_clear()
    yield
    triton_routes.load.cache_clear()


@pytest.mark.usefixtures("no_pallas_triton")
def test_triton_lowers_without_pallas():
    """Training through "triton" is then three kernels through jax-triton."""
    assert "pallas" in triton_routes.load("pallas_kernels.triton")  # the reason why it cannot be imported
    text = lower(*gradients(WORKLOADS["causal"], 128, "bfloat16"))
    assert text.count("triton_kernel_call") == 3
    assert "__gpu$xla.gpu.triton" not in text


@pytest.mark.usefixtures("only_triton_lang")
@pytest.mark.parametrize(("batch", "kernels"), [(64, 1), (2, 2)])
def test_a_decode_step_is_nothing_but_kernels(batch, kernels):
    shape = jax.ShapeDtypeStruct
    rows, cache = shape((batch, 2, 12, 100), jnp.bfloat16), shape((batch, 1000, 4, 100), jnp.bfloat16)
    decode = lambda *x: parallax_decode(*x, local_window_size=300, implementation="triton")
    text = lower(decode, rows, rows, cache, cache, shape((batch,), jnp.int32))
    assert set(re.findall(r"= stablehlo\.(\w+)", text)) - {"constant"} == {"custom_call"}
    assert text.count("triton_kernel_call") == kernels
