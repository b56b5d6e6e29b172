#!/bin/sh
# usage: scripts/sanitize.sh IMPLEMENTATION [PYTHON]
# Runs the kernels of an implementation on small workloads under compute-sanitizer: out-of-bounds accesses and races in
# shared memory. Every array is its own allocation, so that a step outside one is seen.
set -eu
cd "$(dirname "$0")/.."
implementation=$1 python=${2:-python3}
for tool in memcheck racecheck; do
    echo "$tool:"
    XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=parallax \
        "$python" -m parallax_jax.compare --implementations "$implementation" --dtypes bfloat16 \
        --workloads gqa_wide_head window_77 packed ragged_full
done
