#!/usr/bin/env bash
# The Conv-N kernels under compute-sanitizer: out-of-bounds and misaligned accesses, races in shared memory, barriers
# that not all threads reach, uninitialised reads. Small cases, because a sanitizer slows a kernel down 10 to 100 times.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v compute-sanitizer >/dev/null || { echo "sanitize.sh: no compute-sanitizer on PATH (it comes with CUDA)"; exit 1; }
for tool in memcheck racecheck synccheck initcheck; do
  echo "=== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    python -m pytest -q -p no:cacheprovider tests/gpu/test_conv_on_gpu.py -k "small_cases or faults"
done
