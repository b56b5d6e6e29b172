"""Hugging Face folders in and out: config.json and safetensors, read tensor by tensor onto the devices they belong to.

Three kinds of folder are read and written, told apart by the architecture that config.json names:
  Qwen3ForCausalLM      transformers' Qwen3: softmax attention.
  ParallaxForCausalLM   flash-linear-attention's Parallax.
  TransformerLM         what neither of those can express; its config.json holds the fields of `ModelConfig`.
"""

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from parallax_jax.layers import INIT_STD
from parallax_jax.model import ModelConfig, TransformerLM

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PROBE = {"probe", "probe_norm"}

# Names of our modules in a tensor's name, by architecture.
_COMMON = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
_COMMON |= {"query_norm": "q_norm", "key_norm": "k_norm", "probe": "r_proj", "probe_norm": "r_norm"}
_COMMON |= {"mlp": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_COMMON |= {"final_norm": "model.norm", "lm_head": "lm_head"}
_FLA = _COMMON | {
    "embed": "model.embeddings",
    "attention": "attn",
    "attention_norm": "attn_norm",
    "mlp_norm": "mlp_norm",
}
_QWEN3 = _COMMON | {"embed": "model.embed_tokens", "attention": "self_attn"}
_QWEN3 |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_MODULES = {"Qwen3ForCausalLM": _QWEN3, "ParallaxForCausalLM": _FLA, "TransformerLM": _FLA}

# Fields that leave the maths of the model alone.
_HARMLESS = {"architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "fuse_cross_entropy"}
_HARMLESS |= {"fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu", "initializer_range", "max_position_embeddings"}
_HARMLESS |= {"model_type", "name_or_path", "pad_token_id", "return_dict", "tokenizer_class", "torch_dtype"}
_HARMLESS |= {"transformers_version", "use_cache", "use_l2warp"}
# flash-linear-attention norms query, key and probe with this, whatever its config.json says.
_FLA_QK_NORM_EPS = 1e-5
_REQUIRED = object()


def load_pretrained(
    path: str | Path,
    *,
    attention: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    shardings: Any = None,
) -> tuple[ModelConfig, dict]:
    """Reads a model from a Hugging Face folder, one tensor at a time.

    A softmax model loaded with `attention="parallax"` computes what it did before and can leave that smoothly: its
    probe projection W_R is random as in pretraining and the gain of the norm behind it is 0, so the probe is exactly 0.
    The other way round, W_R = 0 under a norm with gain 1, would jump: the norm makes of any W_R but 0 itself a probe of
    full length. Here the gain has a gradient from the first step, and W_R from the second, when the gain is no longer
    0. The probe's length is the gain's, which grows at the learning rate that the optimizer gives it.

    Args:
      path: folder with config.json and model.safetensors, or the index and the shards of one.
      attention: "parallax" or "softmax"; None for what the folder holds. Parallax is not read as softmax.
      dtype: dtype of parameters and computation: "float32", "bfloat16" or "float16". None keeps the parameters as they
        are stored (in the widest dtype of theirs) and computes in float32.
      seed: of the probe's projection, where the folder has none.
      shardings: where the parameters belong: a tree of `jax.sharding.Sharding` like theirs, or one for all; None for
        the default device. `pretrained_config` says beforehand what model comes.

    Returns:
      The configuration and the parameters of a `TransformerLM`, its layers stacked unless their windows differ.

    Raises:
      FileNotFoundError: the folder, its config.json, or a file with tensors is missing.
      ValueError: the folder cannot be read as what it says it is; the message names the file and the field or tensor.
        Pickle files are never opened.
    """
    folder = _Folder(path)
    config = folder.config(attention, dtype)
    leaves = _leaves(config)
    names = {path: _names(path, config, folder.modules) for path in leaves}
    missing = set() if folder.stored.attention == config.attention else {p for p in leaves if _PROBE & set(p)}
    folder.check({n: _stored_shape(p, leaves[p]) for p in leaves.keys() - missing for n in names[p]})

    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        default = shardings or jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
        shardings = dict.fromkeys(leaves, default)
    else:
        shardings = flatten_dict(shardings)
    params = {}
    # The largest first: what is held twice for a moment is then small when memory is fullest.
    for path in sorted(leaves, key=lambda path: -leaves[path].size):
        if path in missing:
            params[path] = _new_probe(path, leaves[path], shardings[path], seed)
        else:
            params[path] = folder.read(names[path], path, leaves[path], shardings[path])
    return config, unflatten_dict(params)


def pretrained_config(path: str | Path, *, attention: str | None = None, dtype: str | None = None) -> ModelConfig:
    """The configuration that `load_pretrained` would return; arguments and errors as there. Reads no tensor."""
    return _Folder(path).config(attention, dtype)


def save_pretrained(
    path: str | Path,
    config: ModelConfig,
    params: Mapping,
    *,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 << 30,
):
    """Writes a model as a Hugging Face folder, which appears whole: config.json and safetensors, sharded if large.

    A softmax model that is a Qwen3 becomes a `Qwen3ForCausalLM`, a Parallax model that flash-linear-attention can build
    (heads as wide as width / num_heads, norms on query, key and probe or on none, a rotated probe) its
    `ParallaxForCausalLM`; any other a `TransformerLM`, which only `load_pretrained` reads. flash-linear-attention norms
    heads with epsilon 1e-5 in any case: with a smaller one its logits differ in the fourth digit.

    Args:
      path: folder to make; it may exist if it is empty.
      config: the model.
      params: its parameters, on any devices of this process; they are stored in their own dtypes.
      extra: more fields for config.json, such as eos_token_id.
      max_shard_bytes: size of a file of tensors, above which another is begun.

    Raises:
      FileExistsError: the folder holds something.
      ValueError: the parameters are not those of the model.
    """
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty: choose another folder")
    leaves, flat = _leaves(config), flatten_dict(params)
    for key in sorted(leaves.keys() | flat.keys()):
        shapes = [tree[key].shape if key in tree else None for tree in (flat, leaves)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"params: {'/'.join(key)} is {shapes[0]}, the configuration needs {shapes[1]}")
    fields = _fields(config)
    modules = _MODULES[fields["architectures"][0]]
    fields |= {"dtype": jnp.dtype(flat["embed", "embedding"].dtype).name, **(extra or {})}

    tensors = [(name, key, i) for key in leaves for i, name in enumerate(_names(key, config, modules))]
    shards: list[list] = [[]]
    size = 0
    for name, key, i in tensors:
        stacked = key[0] == "layers"
        nbytes = flat[key].nbytes // (config.num_layers if stacked else 1)
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, key, i if stacked else None))
        size += nbytes

    path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=path.parent, prefix=".making-"))
    try:
        made.chmod(0o755)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            arrays = {name: _to_stored(key, flat[key] if i is None else flat[key][i]) for name, key, i in shard}
            save_file(arrays, made / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(arrays, file)
        if len(shards) > 1:
            total = sum(leaf.nbytes for leaf in flat.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (made / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (made / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        made.rename(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _leaves(config: ModelConfig) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Parameters of a model by path."""
    init = lambda: TransformerLM(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return flatten_dict(nn.meta.unbox(jax.eval_shape(init))["params"])


def _names(path: tuple[str, ...], config: ModelConfig, modules: Mapping[str, str]) -> list[str]:
    """Names of the tensors that make up the parameter at a path: one, or one per layer where layers are stacked."""
    *parents, leaf = path
    leaf = "bias" if leaf == "bias" else "weight"
    if not parents[0].startswith("layers"):
        return [f"{modules[parents[0]]}.{leaf}"]
    inner = ".".join([*(modules[module] for module in parents[1:]), leaf])
    layers = range(config.num_layers) if parents[0] == "layers" else [int(parents[0].removeprefix("layers_"))]
    return [f"model.layers.{i}.{inner}" for i in layers]


def _stored_shape(path: tuple[str, ...], leaf) -> tuple[int, ...]:
    """Shape of the stored tensor, or of each where layers are stacked: kernels are matrices (out, in)."""
    shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
    match path[-2:]:
        case "out", "kernel":
            return shape[-1], math.prod(shape[:-1])
        case _, "kernel":
            return math.prod(shape[1:]), shape[0]
        case "embed", _:
            return shape
    return (math.prod(shape),)


def _to_stored(path: tuple[str, ...], array) -> np.ndarray:
    array = np.asarray(array)
    shape = _stored_shape(path[-2:], array)
    return np.ascontiguousarray(array.reshape(shape[::-1]).T if path[-1] == "kernel" else array.reshape(shape))


def _new_probe(path, leaf, sharding, seed: int) -> jax.Array:
    """The probe of a converted model: a random projection and, behind it, a gain of 0."""
    if path[-1] != "kernel":
        return jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
    key = jax.random.fold_in(jax.random.key(seed), sum(map(ord, "/".join(path))))
    std = jnp.asarray(INIT_STD, leaf.dtype)
    make = lambda key: std * jax.random.normal(key, leaf.shape, leaf.dtype)
    return jax.jit(make, out_shardings=sharding)(key)


class _Folder:
    """A folder with a model: its configuration, and its tensors by name.

    Attributes:
      stored: the model that it holds.
      modules: our modules' names in its tensors' names.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            reason = "is not a folder" if self.path.exists() else "does not exist"
            raise FileNotFoundError(f"{path} {reason}: a folder with config.json and safetensors is needed")
        fields = _read_json(self.path / "config.json")
        architecture = (fields.get("architectures") or [None])[0]
        if architecture not in _MODULES:
            allowed = ", ".join(_MODULES)
            raise ValueError(f"{self.path / 'config.json'}: architecture {architecture!r} is none of {allowed}")
        self.modules = _MODULES[architecture]
        reader = _Fields(fields, self.path / "config.json")
        try:
            self.stored = {"Qwen3ForCausalLM": _qwen3, "ParallaxForCausalLM": _parallax, "TransformerLM": _own}[
                architecture
            ](reader)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path / 'config.json'}: {error}") from None
        reader.refuse_the_rest()
        self._tensors = dict(self._find())

    def config(self, attention: str | None, dtype: str | None) -> ModelConfig:
        """The model as it is asked for."""
        if attention == "softmax" and self.stored.attention == "parallax":
            raise ValueError(
                f"attention='softmax': {self.path} holds a Parallax model; without its probe it is another"
            )
        stored = {tensor_dtype for _, _, tensor_dtype in self._tensors.values()}
        widest = stored.pop() if len(stored) == 1 else "float32"
        config = dataclasses.replace(self.stored, dtype=dtype or "float32", param_dtype=dtype or widest)
        if attention in (None, self.stored.attention):
            return config
        return dataclasses.replace(config, attention=attention, probe_norm=True, probe_norm_init=0.0)

    def _find(self) -> Iterator[tuple[str, tuple[str, tuple[int, ...], str]]]:
        """Yields (name, (file, shape, dtype)) of every tensor, from the files' headers."""
        index = self.path / _INDEX
        if index.exists():
            where = _read_json(index).get("weight_map")
            if not isinstance(where, dict):
                raise ValueError(f"{index}: has no weight_map")
        elif (self.path / "model.safetensors").exists():
            where = None
        else:
            pickles = sorted(
                p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")
            )
            reason = f"{pickles[0]} is a pickle, which can run code and is not opened" if pickles else "there is none"
            raise FileNotFoundError(f"{self.path}: model.safetensors or {_INDEX} is needed; {reason}")
        for file in ["model.safetensors"] if where is None else sorted(set(where.values())):
            listed = None if where is None else {name for name, at in where.items() if at == file}
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{index}: {min(listed)} is in {file!r}, which is no safetensors file of this folder")
            if not (self.path / file).exists():
                raise FileNotFoundError(
                    f"{self.path / file} is missing: it holds {min(listed)} and {len(listed) - 1} more"
                )
            with _open(self.path / file) as opened:
                names = set(opened.keys())
                if listed is not None and names != listed:
                    name = min(names ^ listed)
                    fault = "which the index does not list" if name in names else "which the index lists, is not there"
                    raise ValueError(f"{self.path / file}: {name}, {fault}")
                for name in names:
                    tensor = opened.get_slice(name)
                    if tensor.get_dtype() not in _DTYPES:
                        allowed = ", ".join(_DTYPES)
                        raise ValueError(f"{self.path / file}: {name} is {tensor.get_dtype()}, not one of {allowed}")
                    yield name, (file, tuple(tensor.get_shape()), _DTYPES[tensor.get_dtype()])

    def check(self, wanted: Mapping[str, tuple[int, ...]]):
        """Refuses tensors that are missing, too many, or of other shapes than `wanted` has by name."""
        have = dict(self._tensors)
        if self.stored.tie_embeddings and "lm_head.weight" in have:
            self._check_tied(have.pop("lm_head.weight")[0])
        for name, shape in wanted.items():
            if name not in have:
                files = ", ".join(sorted({file for file, _, _ in have.values()})[:3])
                raise ValueError(f"{self.path}: the tensor {name} is missing (looked in {files or 'an empty file'})")
            file, found, _ = have[name]
            if found != shape:
                raise ValueError(f"{self.path / file}: {name} is {found}, config.json asks for {shape}")
        if extra := have.keys() - wanted.keys():
            name = min(extra)
            raise ValueError(f"{self.path / have[name][0]}: {name} is no part of the model ({len(extra)} such tensors)")

    def _check_tied(self, file: str):
        """A tied model's own output projection, which some programs write, must be the embedding."""
        name = f"{self.modules['embed']}.weight"
        if name not in self._tensors:
            return
        with _open(self.path / file) as a, _open(self.path / self._tensors[name][0]) as b:
            head, embedding = a.get_slice("lm_head.weight"), b.get_slice(name)
            rows, width = head.get_shape()
            same = [rows, width] == embedding.get_shape() and all(
                np.array_equal(head[i : min(i + 4096, rows)], embedding[i : min(i + 4096, rows)])
                for i in range(0, rows, 4096)
            )
        if not same:
            raise ValueError(f"{self.path / file}: lm_head.weight is not {name}, though config.json ties the two")

    def read(self, names: list[str], path: tuple[str, ...], leaf, sharding: jax.sharding.Sharding) -> jax.Array:
        """A parameter on its devices, from its tensors, each read once."""
        shape, stacked = leaf.shape, path[0] == "layers"
        devices = sharding.addressable_devices_indices_map(shape)
        spans = {
            device: tuple(s.indices(n)[:2] for s, n in zip(at, shape, strict=True)) for device, at in devices.items()
        }
        parts = {span: np.empty([stop - start for start, stop in span], leaf.dtype) for span in set(spans.values())}
        for i, name in enumerate(names):
            file = self.path / self._tensors[name][0]
            with _open(file) as opened:  # opened anew each time, so that what was read leaves the process's memory
                tensor = opened.get_tensor(name)
            tensor = (tensor.T if path[-1] == "kernel" else tensor).reshape(shape[1:] if stacked else shape)
            for span, part in parts.items():
                inner = tuple(slice(*bounds) for bounds in span[stacked:])
                if not stacked:
                    part[...] = tensor[inner]
                elif span[0][0] <= i < span[0][1]:
                    part[i - span[0][0]] = tensor[inner]
            del tensor
        arrays = [jax.device_put(parts[span], device) for device, span in spans.items()]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _open(file: Path):
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        cut = _first_cut(file)
        raise ValueError(f"{file}: not a whole safetensors file ({cut or error})") from None


def _first_cut(file: Path) -> str | None:
    """The first tensor whose data a truncated file no longer holds, as text; None where the header is broken too."""
    with file.open("rb") as opened:
        start = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(start, file.stat().st_size)))
            ends = {tensor["data_offsets"][1]: name for name, tensor in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    beyond = [end for end in ends if 8 + start + end > file.stat().st_size]
    return f"it ends inside {ends[min(beyond)]}" if beyond else None


def _read_json(file: Path) -> dict:
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: not a JSON object")
    return fields


class _Fields:
    """The fields of a config.json, each taken once; what is left over must be known to be harmless."""

    def __init__(self, fields: dict, file: Path):
        self._left, self._file = dict(fields), file

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """A field's value, the default where it is absent or null."""
        value = self._left.pop(name, None)
        if value is None and default is _REQUIRED:
            raise ValueError(f"{name} is missing")
        return default if value is None else value

    def expect(self, name: str, *allowed: Any):
        """Refuses a field with another value than those; absent or null is fine."""
        value = self.take(name, None)
        if value is not None and value not in allowed:
            raise ValueError(f"{name}={value!r} is not supported, only {' or '.join(map(repr, allowed)) or 'null'}")

    def rope_theta(self) -> float:
        """Base of the rotary frequencies, as transformers 5 and 4 write it; any scaling is refused."""
        theta = self.take("rope_theta", None)
        for name in ("rope_parameters", "rope_scaling"):
            parameters = dict(self.take(name, {}))
            kind = parameters.pop("rope_type", parameters.pop("type", "default"))
            parameters.pop("type", None)
            theta = parameters.pop("rope_theta", theta)
            odd = {key: value for key, value in parameters.items() if value is not None}
            if odd.get("partial_rotary_factor") == 1:
                del odd["partial_rotary_factor"]
            if kind != "default" or odd:
                raise ValueError(f"{name} of type {kind!r} with {odd or 'no more'} is not supported, only 'default'")
        self.expect("partial_rotary_factor", 1.0)
        return 10_000.0 if theta is None else float(theta)

    def refuse_the_rest(self):
        """Refuses fields that were not taken, unless they are harmless or say nothing."""
        for name, value in sorted(self._left.items()):
            if name not in _HARMLESS and not name.startswith("_") and value not in (None, False, {}, []):
                raise ValueError(
                    f"{self._file}: {name}={value!r} is not supported; remove it if it does not change the maths"
                )


def _qwen3(fields: _Fields) -> ModelConfig:
    num_layers, num_heads = fields.take("num_hidden_layers"), fields.take("num_attention_heads")
    fields.expect("model_type", "qwen3")
    fields.expect("hidden_act", "silu", "swish")
    fields.expect("attention_dropout", 0)
    window = fields.take("sliding_window", None) if fields.take("use_sliding_window", False) else None
    fields.take("sliding_window", None)
    first = fields.take("max_window_layers", 28)
    kinds = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(num_layers)]
    kinds = fields.take("layer_types", kinds)
    windows = {"full_attention": None, "sliding_attention": window}
    for kind in kinds:
        if kind not in windows or (kind == "sliding_attention" and window is None):
            raise ValueError(f"layer_types has {kind!r} with sliding_window={window!r}, which is not supported")
    return ModelConfig(
        vocab_size=fields.take("vocab_size"),
        num_layers=num_layers,
        width=fields.take("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=fields.take("num_key_value_heads", num_heads),
        head_dim=fields.take("head_dim", 128),
        mlp_width=fields.take("intermediate_size"),
        attention="softmax",
        use_bias="attention" if fields.take("attention_bias", False) else False,
        rope_theta=fields.rope_theta(),
        norm_eps=fields.take("rms_norm_eps", 1e-6),
        tie_embeddings=fields.take("tie_word_embeddings", False),
        **_windows([windows[kind] for kind in kinds]),
    )


def _parallax(fields: _Fields) -> ModelConfig:
    num_heads, width = fields.take("num_heads"), fields.take("hidden_size")
    fields.expect("model_type", "parallax")
    fields.expect("hidden_act", "swish", "silu")
    fields.expect("attnres_block_size")
    if width % num_heads:
        raise ValueError(f"hidden_size={width} is not a multiple of num_heads={num_heads}")
    # flash-linear-attention's rule where no width is given: two thirds of the ratio, up to a multiple of 256.
    ratio = fields.take("hidden_ratio", 4)
    mlp_width = fields.take("intermediate_size", -(-int(width * ratio * 2 / 3) // 256) * 256)
    qk_norm = fields.take("qk_norm", False)
    return ModelConfig(
        vocab_size=fields.take("vocab_size"),
        num_layers=fields.take("num_hidden_layers"),
        width=width,
        num_heads=num_heads,
        num_kv_heads=fields.take("num_kv_heads", num_heads),
        head_dim=width // num_heads,
        mlp_width=mlp_width,
        probe_norm=qk_norm,
        qk_norm=qk_norm,
        use_bias="qkv" if fields.take("qkv_bias", False) else False,
        local_window_size=fields.take("window_size", None),
        rope_theta=fields.rope_theta(),
        norm_eps=fields.take("norm_eps", 1e-6),
        qk_norm_eps=fields.take("qk_norm_eps", _FLA_QK_NORM_EPS),
        tie_embeddings=fields.take("tie_word_embeddings", False),
    )


def _own(fields: _Fields) -> ModelConfig:
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    values = {name: fields.take(name, None) for name in names if name not in ("dtype", "remat", "implementation")}
    return ModelConfig(**{name: value for name, value in values.items() if value is not None})


def _windows(windows: list[int | None]) -> dict[str, Any]:
    """The fields of `ModelConfig` for the windows of the layers: one for all if they are alike."""
    if len(set(windows)) == 1:
        return {"local_window_size": windows[0]}
    return {"local_window_size": tuple(windows), "scan_layers": False}


def _fields(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model, of the first kind of folder that can express it."""
    c = config
    shared = {"hidden_size": c.width, "intermediate_size": c.mlp_width, "num_hidden_layers": c.num_layers}
    shared |= {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_embeddings, "rope_theta": c.rope_theta}
    windows = set(c.windows) - {None}
    if (
        c.attention == "softmax"
        and c.qk_norm
        and c.qk_norm_eps in (None, c.norm_eps)
        and c.use_bias in (False, "attention")
        and len(windows) <= 1
    ):
        window = max(windows, default=None)
        return shared | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "hidden_act": "silu",
            "attention_bias": c.use_bias == "attention",
            "rms_norm_eps": c.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in c.windows],
        }
    plain = c.head_dim * c.num_heads == c.width and c.probe_rope and c.probe_norm == c.qk_norm and not c.probe_gate
    qk_norm_eps = c.norm_eps if c.qk_norm_eps is None else c.qk_norm_eps
    plain &= not c.qk_norm or qk_norm_eps <= _FLA_QK_NORM_EPS
    if c.attention == "parallax" and plain and c.use_bias in (False, "qkv") and len(set(c.windows)) == 1:
        return shared | {
            "architectures": ["ParallaxForCausalLM"],
            "model_type": "parallax",
            "num_heads": c.num_heads,
            "num_kv_heads": c.num_kv_heads,
            "hidden_act": "swish",
            "qkv_bias": c.use_bias == "qkv",
            "qk_norm": c.qk_norm,
            "window_size": c.windows[0],
            "norm_eps": c.norm_eps,
            "qk_norm_eps": qk_norm_eps,
        }
    kept = {key: value for key, value in dataclasses.asdict(c).items() if key not in ("remat", "implementation")}
    return {"architectures": ["TransformerLM"], "model_type": "parallax_jax", **kept}
