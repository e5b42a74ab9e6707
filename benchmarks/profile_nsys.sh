#!/usr/bin/env bash
# profile_nsys.sh CALL OUT: a timeline (OUT.nsys-rep) and tables of kernels and NVTX ranges, for a call saved by
# capture.py. The ranges are named by the operations' stems (sign_step, meta_accumulate, mlp_meta_step, conv_meta_step).
set -euo pipefail
call=${1:?usage: profile_nsys.sh CALL OUT} out=${2:?usage: profile_nsys.sh CALL OUT}
command -v nsys >/dev/null || { echo "nsys (Nsight Systems) is not on PATH" >&2; exit 3; }
here=$(cd "$(dirname "$0")" && pwd)
nsys profile --force-overwrite=true --trace=cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop \
  --cuda-graph-trace=node --output "$out" "${PYTHON:-python3}" "$here/capture.py" replay "$call"
nsys stats --force-export=true --report cuda_gpu_kern_sum --report nvtx_sum "$out.nsys-rep" | tee "$out.txt"
