#!/usr/bin/env bash
# profile_ncu.sh CALL OUT [ARGUMENTS OF ncu]: the limits of each kernel (roofline, occupancy, memory) in a call saved by
# capture.py, as OUT.ncu-rep and a table. Needs permission to read the GPU's counters.
set -euo pipefail
usage="usage: profile_ncu.sh CALL OUT [ARGUMENTS OF ncu]"
call=${1:?$usage} out=${2:?$usage}
shift 2
command -v ncu >/dev/null || { echo "ncu (Nsight Compute) is not on PATH" >&2; exit 3; }
here=$(cd "$(dirname "$0")" && pwd)
ncu --force-overwrite --set full --profile-from-start off --nvtx "$@" --export "$out" \
  "${PYTHON:-python3}" "$here/capture.py" replay "$call" --calls 1
ncu --import "$out.ncu-rep" --page details --print-summary per-kernel | tee "$out.txt"
