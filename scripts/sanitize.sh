#!/bin/sh
# usage: scripts/sanitize.sh memcheck|racecheck IMPLEMENTATION ...
# Runs the kernels of implementations on small workloads under compute-sanitizer: out-of-bounds accesses or races in
# shared memory. Every array is its own allocation, so that a step outside one is seen. PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
tool=$1 && shift
XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kns=parallax \
    "${PYTHON:-python3}" -m parallax_jax.compare --implementations "$@" --dtypes bfloat16 \
    --workloads gqa_wide_head window_77 packed ragged_full
