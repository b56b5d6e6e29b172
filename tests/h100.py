"""H100s that are not there: devices to compile for with CUDA's compilers, without a GPU."""

import jax
from jax.experimental import topologies

_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100_devices(count: int) -> list[jax.Device]:
    """Descriptions of `count` H100s of one host, for a mesh to lower and compile under; nothing runs on them."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=_H100, topology=f"1x1x{count}"
    )
    return topology.devices
