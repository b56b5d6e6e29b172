#!/bin/sh
# usage: scripts/sanitize.sh memcheck|racecheck IMPLEMENTATION [WORKLOAD ...]
# Runs an implementation's kernels on small workloads under compute-sanitizer: steps outside an array, races in shared
# memory. Every array is its own allocation, so that a step outside one is seen. PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
tool=$1 implementation=$2
shift 2
[ $# -gt 0 ] || set -- gqa_wide_head window_77 packed ragged_full
XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "${PYTHON:-python3}" -m parallax_jax.compare --implementations "$implementation" --dtypes bfloat16 \
    --workloads "$@"
