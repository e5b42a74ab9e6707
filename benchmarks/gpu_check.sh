#!/usr/bin/env bash
# gpu_check.sh OUT [--part PART]... [--dry-run]: builds, tests and measures this tree on a machine with a GPU, without
# network or git, using the installed interpreter (PYTHON, default python3). Ends within 9 minutes.
#
#   parts      build tests sanitizer kernels meta_step training (all, in this order, unless --part selects some)
#   --dry-run  continues without a GPU: parts that need one are reported as such, the others run small cases on the CPU;
#              the build includes CUDA if nvcc is installed
#
# Copies and installs the tree below OUT and writes nothing elsewhere. OUT/results has the JSON files, OUT/logs one log
# per part, OUT/summary.txt the table that is printed last. If a part fails, this is reported and the others still run.
# Exit code: 0 if all parts succeeded, 1 if one failed, 2 for bad arguments, 3 without a GPU (and no --dry-run).
set -uo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; }

all_parts=(build tests sanitizer kernels meta_step training)
out="" dry_run=0 parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --part)
      [ $# -ge 2 ] || { usage >&2; exit 2; }
      case " ${all_parts[*]} " in
        *" $2 "*) parts+=("$2") ;;
        *) echo "--part: expected one of ${all_parts[*]}, found $2" >&2; exit 2 ;;
      esac
      shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
    *) [ -z "$out" ] || { usage >&2; exit 2; }; out=$1; shift ;;
  esac
done
[ -n "$out" ] || { usage >&2; exit 2; }
[ ${#parts[@]} -gt 0 ] || parts=("${all_parts[@]}")

tree=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out/logs" "$out/results" || exit 2
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
source_copy=$out/source site=$out/site
results=$out/results
limit=${GPU_CHECK_SECONDS:-530} # of all parts together
summary=$out/summary.txt
: >"$summary"

has_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }
gpu=0
has_gpu && gpu=1
if [ "$gpu" -eq 0 ]; then
  echo "no CUDA device: torch of $python sees none" | tee -a "$summary"
  [ "$dry_run" -eq 1 ] || exit 3
fi
device=$([ "$gpu" -eq 1 ] && echo cuda || echo cpu)

left() { echo $((limit - SECONDS)); }

# run NAME SECONDS COMMAND...: runs with a time limit, with output to the part's log.
run() {
  local name=$1 seconds=$2 room
  shift 2
  room=$(left)
  [ "$room" -gt 0 ] || { echo "no time left for: $*" >>"$out/logs/$name.log"; return 124; }
  [ "$seconds" -le "$room" ] || seconds=$room
  echo "\$ $*" >>"$out/logs/$name.log"
  timeout --kill-after=10 "$seconds" "$@" >>"$out/logs/$name.log" 2>&1
}

# Runs in the copy, with the installed package.
in_copy() {
  local name=$1 seconds=$2
  shift 2
  (cd "$source_copy" && PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONNOUSERSITE=1 run "$name" "$seconds" "$@")
}

part_build() {
  rm -rf "$source_copy" "$site"
  mkdir -p "$source_copy" "$site" || return 1
  # Copy only the project's own folders and files, without results of other builds.
  (cd "$tree" && tar --exclude='__pycache__' --exclude='*.so' --exclude=build --exclude=runs -cf - \
    CMakeLists.txt setup.py pyproject.toml README.md LICENSE MANIFEST.in csrc signmaml_ext python tests benchmarks \
    examples) | tar -C "$source_copy" -xf - || return 1
  local switches=()
  if [ "$gpu" -eq 1 ]; then
    local capability
    capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return 1
    switches=(FORCE_CUDA=1 "TORCH_CUDA_ARCH_LIST=$capability")
  elif command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
    switches=(FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0) # the build that a machine with a GPU would make
  else
    switches=(SIGNMAML_NO_CUDA=1)
  fi
  in_copy build 300 env "${switches[@]}" "$python" -m pip install --no-build-isolation --no-deps --no-index \
    --target "$site" . || return 1
  # Rename the source folders, which would be imported instead of the installed package.
  mv "$source_copy/signmaml_ext" "$source_copy/signmaml_ext.source" && mv "$source_copy/python" \
    "$source_copy/python.source" || return 1
  in_copy build 60 "$python" -m signmaml_ext.info || return 1
  [ "$gpu" -eq 0 ] || in_copy build 60 "$python" -c \
    'import signmaml_ext as s; r = s.dispatch.backend_status()["cuda"]; assert r is None, r'
}

part_tests() {
  in_copy tests 170 "$python" -m pytest -q -m gpu tests/gpu tests/ops
  local code=$?
  # 5: no tests collected, which is an error only on a machine with a GPU.
  [ "$code" -eq 0 ] || { [ "$code" -eq 5 ] && [ "$gpu" -eq 0 ]; }
}

part_sanitizer() {
  if [ "$gpu" -eq 0 ]; then
    echo "no CUDA device: compute-sanitizer has nothing to watch" >>"$out/logs/sanitizer.log"
    return 77
  fi
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || find /usr/local/cuda*/bin -name compute-sanitizer 2>/dev/null | head -n 1)
  [ -n "$sanitizer" ] || { echo "compute-sanitizer is not installed" >>"$out/logs/sanitizer.log"; return 77; }
  local code=0 tool
  for tool in memcheck racecheck initcheck synccheck; do
    in_copy sanitizer 45 "$sanitizer" --tool "$tool" --error-exitcode 9 --kernel-name-exclude regex='.*(at::|cub::).*' \
      "$python" benchmarks/sanitizer_cases.py || { echo "$tool failed" >>"$out/logs/sanitizer.log"; code=1; }
  done
  return "$code"
}

part_kernels() {
  local quick=(--seconds 1)
  [ "$gpu" -eq 1 ] || quick=(--quick)
  in_copy kernels 90 "$python" benchmarks/bench_kernels.py --device "$device" "${quick[@]}" --out "$results"
}

part_meta_step() {
  local code=0 workload
  if [ "$gpu" -eq 0 ]; then
    in_copy meta_step 170 "$python" benchmarks/bench_meta_step.py --device cpu --workload A --quick --tasks 2 \
      --only sequential signmaml_ext --out "$results"
    return
  fi
  for workload in A B C D; do
    in_copy meta_step 60 "$python" benchmarks/bench_meta_step.py --device cuda --workload "$workload" --seconds 3 \
      --no-memory --only "sequential loop" vmap signmaml_ext --out "$results" || code=1
  done
  in_copy meta_step 60 "$python" benchmarks/bench_meta_step.py --device cuda --workload A --growth --seconds 1 \
    --only "sequential loop" signmaml_ext --out "$results" || code=1
  # The other peers are slow to prepare, so they run only if enough time is left.
  if [ "$(left)" -gt 150 ]; then
    in_copy meta_step 80 "$python" benchmarks/bench_meta_step.py --device cuda --workload A --seconds 3 --no-memory \
      --out "$results" || echo "not all peers in time; the result without the slow ones stays" >>"$out/logs/meta_step.log"
  fi
  return "$code"
}

part_training() {
  local iterations=1000
  [ "$gpu" -eq 1 ] || iterations=3
  # The official sizes on images that need no download: time per iteration, including sampling and Adam.
  in_copy training 90 "$python" benchmarks/bench_training.py --iterations "$iterations" --validations 2 --out "$results" \
    --set data=glyphs image_size=84 rotations=false "device=$device" test_tasks=20 validate_tasks=20
}

part() {
  case $1 in
    build) part_build ;;
    tests) part_tests ;;
    sanitizer) part_sanitizer ;;
    kernels) part_kernels ;;
    meta_step) part_meta_step ;;
    training) part_training ;;
  esac
}

failed=0
for part in "${parts[@]}"; do
  began=$SECONDS
  : >"$out/logs/$part.log"
  if [ "$part" != build ] && [ ! -d "$site/signmaml_ext" ]; then
    code=1
    echo "the package is not installed in $site: run the part build first" >>"$out/logs/$part.log"
  else
    part "$part"
    code=$?
  fi
  case $code in
    0) said=ok ;;
    77) said="not here: $(tail -n 1 "$out/logs/$part.log")" ;;
    124) said="FAILED: out of time"; failed=1 ;;
    *) said="FAILED (exit $code): $(tail -n 1 "$out/logs/$part.log" | cut -c1-120)"; failed=1 ;;
  esac
  printf '%-10s %5d s  %s\n' "$part" $((SECONDS - began)) "$said" | tee -a "$summary"
done

if "$python" "$tree/benchmarks/report.py" --results "$results" >"$out/report.md" 2>"$out/logs/report.log"; then
  tee -a "$summary" <"$out/report.md"
else
  echo "FAILED: report.py: $(tail -n 1 "$out/logs/report.log")" | tee -a "$summary"
  failed=1
fi
echo
echo "results: $results   logs: $out/logs   this table: $summary"
exit $failed
