"""GPUs that are not there: devices to compile for with CUDA's compilers, without a GPU."""

import jax
from jax.experimental import topologies

# Name -> (compute capability, its extension, shared memory of a block and of a core, cores).
_CARDS = {
    "NVIDIA H100 80GB HBM3": ("major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES", 232448, 233472, 132),
    "NVIDIA A100-SXM4-80GB": ("major: 8 minor: 0", 166912, 167936, 108),
    "NVIDIA GeForce RTX 4090": ("major: 8 minor: 9", 101376, 102400, 128),
}

_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ {capability} }}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {block} shared_memory_per_core: {core}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def gpu_devices(count: int, card: str = "H100") -> list[jax.Device]:
    """Descriptions of `count` GPUs of one host, for a mesh to lower and compile under; nothing runs on them."""
    name = next(name for name in _CARDS if card in name)
    capability, block, core, cores = _CARDS[name]
    threads = 1536 if "minor: 9" in capability else 2048
    target = _TARGET.format(capability=capability, block=block, core=core, cores=cores, threads=threads, name=name)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=target, topology=f"1x1x{count}"
    )
    return topology.devices
