#!/usr/bin/env bash
# gpu_check.sh OUT [--call 1|2|3] [--part PART]... [--dry-run]: builds, tests and measures this tree on a machine with
# a GPU, without network or git, using the installed interpreter (PYTHON, default python3). There are three calls,
# because a machine may be rented for minutes at a time. Each ends within 9 minutes (GPU_CHECK_SECONDS, default 530).
#
#   --call 1   build platform conv meta_step graphs ops sanitizer: is it right, and how fast is a meta-step (default)
#   --call 2   kernels meta_step_others sanitizer_rest training: the other figures, initcheck and synccheck
#   --call 3   run: 60,000 iterations of training, which stop when the call's time is over; a further call continues
#   --part     only these parts of the call, in its order
#   --dry-run  continues without a GPU: parts that need one say so, the others run small cases on the CPU;
#              the build includes CUDA if nvcc is installed (unless SIGNMAML_NO_CUDA=1)
#
# Copies and installs the tree below OUT, unless OUT holds it from an earlier call, and writes nothing elsewhere. If a
# part fails, this is reported and the others still run. OUT/summary.txt has what is printed; OUT/gpu_check_CALL.tar has
# all that is worth keeping: summary, report, results, the tests' junit files, one log for each part.
# Exit code: 0 if all parts succeeded, 1 if one failed, 2 for bad arguments, 3 without a GPU (and no --dry-run).
set -uo pipefail

usage() { sed -n '2,18s/^# \{0,1\}//p' "$0"; }

declare -A parts_of=(
  [1]="build platform conv meta_step graphs ops sanitizer"
  [2]="kernels meta_step_others sanitizer_rest training"
  [3]="run"
)
# The seconds that earlier parts leave to each. The build leaves nothing, because nothing runs without it.
declare -A kept_for=(
  [build]=150 [platform]=45 [conv]=75 [meta_step]=80 [graphs]=80 [ops]=40 [sanitizer]=60
  [kernels]=90 [meta_step_others]=130 [sanitizer_rest]=70 [training]=90 [run]=300
)

call=1 out="" dry_run=0 chosen=()
while [ $# -gt 0 ]; do
  case $1 in
    --call | --part)
      [ $# -ge 2 ] || { echo "$1: expected a value" >&2; usage >&2; exit 2; }
      if [ "$1" = --part ]; then
        chosen+=("$2")
      elif [[ $2 =~ ^[123]$ ]]; then
        call=$2
      else
        echo "--call: expected 1, 2 or 3, found $2" >&2
        exit 2
      fi
      shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
    *) [ -z "$out" ] || { usage >&2; exit 2; }; out=$1; shift ;;
  esac
done
[ -n "$out" ] || { usage >&2; exit 2; }
limit=${GPU_CHECK_SECONDS:-530} # of all parts together
[[ $limit =~ ^[1-9][0-9]*$ ]] || { echo "GPU_CHECK_SECONDS: expected whole seconds, found $limit" >&2; exit 2; }
for part in ${chosen[@]+"${chosen[@]}"}; do
  case " ${parts_of[$call]} " in
    *" $part "*) ;;
    *) echo "--part: expected one of ${parts_of[$call]} (call $call), found $part" >&2; exit 2 ;;
  esac
done
parts=()
for part in ${parts_of[$call]}; do
  case " ${chosen[*]-} " in
    "  " | *" $part "*) parts+=("$part") ;;
  esac
done

tree=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out/logs" "$out/results" "$out/junit" || exit 2
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
source_copy=$out/source site=$out/site
results=$out/results
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

kept=0 # seconds for the parts after this one
left() { echo $((limit - SECONDS - kept)); }

# run NAME SECONDS COMMAND...: runs with a time limit, with output to the part's log.
run() {
  local name=$1 seconds=$2 room
  shift 2
  room=$(left)
  [ "$room" -gt 0 ] || { echo "no time left for: $*" >>"$out/logs/$name.log"; return 124; }
  [ "$seconds" -le "$room" ] || seconds=$room
  echo "\$ $*" >>"$out/logs/$name.log"
  timeout --signal="${signal:-TERM}" --kill-after=10 "$seconds" "$@" >>"$out/logs/$name.log" 2>&1
}

# Runs in the copy, with the installed package.
in_copy() {
  local name=$1 seconds=$2
  shift 2
  (cd "$source_copy" && export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONNOUSERSITE=1 PYTHONUNBUFFERED=1 &&
    run "$name" "$seconds" "$@")
}

# test_file NAME SECONDS FILE [OPTION]...: one pytest process. It prints a failure as it happens, and SIGINT makes it
# write what it has, so a time limit loses little.
tested=()
test_file() {
  local name=$1 seconds=$2 file=$3 junit code
  shift 3
  junit=$out/junit/$(basename "$file" .py).xml
  rm -f "$junit"
  tested+=("$junit")
  signal=INT in_copy "$name" "$seconds" env "PYTHONPATH=$site:$source_copy/tests${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" -m pytest -p helpers.programs.failures_at_once -p no:cacheprovider -v -rfE --tb=short \
    --junitxml="$junit" "$@" "$file"
  code=$?
  [ "$code" -ne 5 ] || [ "$gpu" -eq 1 ] || code=0 # 5: no tests collected, which is an error only with a GPU
  return "$code"
}

# note CODE: remembers a part's first failure; not the last, so that one success does not hide it.
worst=0
note() { [ "$1" -eq 0 ] || [ "$worst" -ne 0 ] || worst=$1; }

needs_gpu() {
  [ "$gpu" -eq 0 ] || return 0
  echo "no CUDA device" >>"$out/logs/$1.log"
  return 1
}

copy_tree() {
  rm -rf "$source_copy"
  mkdir -p "$source_copy" || return 1
  # Copy only the project's own folders and files, without results of other builds.
  (cd "$tree" && tar --exclude='__pycache__' --exclude='*.so' --exclude=build --exclude=runs -cf - \
    CMakeLists.txt setup.py pyproject.toml README.md LICENSE MANIFEST.in csrc signmaml_ext python tests benchmarks \
    examples) | tar -C "$source_copy" -xf -
}

# Installs the copy below OUT, unless what is there was built from the same sources in the same way.
install_tree() {
  local switches=() capability state
  if [ "$gpu" -eq 1 ]; then
    capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return 1
    switches=(FORCE_CUDA=1 "TORCH_CUDA_ARCH_LIST=$capability")
  elif [ -z "${SIGNMAML_NO_CUDA:-}" ] && { command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; }; then
    switches=(FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0) # the build that a machine with a GPU would make
  else
    switches=(SIGNMAML_NO_CUDA=1)
  fi
  copy_tree || return 1
  state=$(cd "$source_copy" && {
    echo "${switches[*]}"
    find CMakeLists.txt setup.py pyproject.toml csrc signmaml_ext python -type f | LC_ALL=C sort |
      xargs -d '\n' sha256sum
  } | sha256sum) || return 1
  if [ "$state" = "$(cat "$out/installed" 2>/dev/null)" ]; then
    echo "$site holds this tree" >>"$out/logs/build.log"
  else
    rm -rf "$site" "$out/installed"
    in_copy build 300 env "${switches[@]}" "$python" -m pip install --no-build-isolation --no-deps --no-index \
      --target "$site" . || return
    echo "$state" >"$out/installed"
  fi
  # Rename the source folders, which would be imported instead of the installed package.
  mv "$source_copy/signmaml_ext" "$source_copy/signmaml_ext.source" && mv "$source_copy/python" \
    "$source_copy/python.source"
}

part_build() {
  install_tree || return
  in_copy build 60 "$python" -m signmaml_ext.info || return 1
  [ "$gpu" -eq 0 ] || in_copy build 60 "$python" -c \
    'import signmaml_ext as s; r = s.dispatch.backend_status()["cuda"]; assert r is None, r'
}

part_platform() {
  if [ "$gpu" -eq 0 ]; then
    test_file platform 60 tests/gpu/test_sanitizers_on_gpu.py -m "not gpu and not slow"
    return
  fi
  test_file platform 40 tests/gpu/test_platform_on_gpu.py -m gpu
  note $?
  # Launches wait for each other, so that an error names its kernel.
  in_copy platform 40 env CUDA_LAUNCH_BLOCKING=1 "$python" tests/gpu/gpu_cases.py
  note $?
}

part_conv() {
  needs_gpu conv || return 77
  local cores
  cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # it would count these variables too
  # All cores compute the references; nothing else runs now.
  OMP_NUM_THREADS=$cores SIGNMAML_TEST_THREADS=$cores test_file conv 150 tests/gpu/test_conv_on_gpu.py -m gpu
}

meta_step() {
  local name=$1 seconds=$2
  shift 2
  in_copy "$name" "$seconds" "$python" benchmarks/bench_meta_step.py --device "$device" --out "$results" "$@"
}

part_meta_step() {
  if [ "$gpu" -eq 0 ]; then
    meta_step meta_step 170 --workload D --quick --tasks 20 --only sequential signmaml_ext
    return
  fi
  local workload
  for workload in A B; do
    meta_step meta_step 40 --workload "$workload" --seconds 3 --no-memory --only "sequential loop" vmap signmaml_ext
    note $?
  done
}

part_graphs() {
  needs_gpu graphs || return 77
  local name
  for name in streams_and_graphs graphs_on_gpu meta_step_on_gpu training_on_gpu; do
    test_file graphs 40 "tests/gpu/test_$name.py" -m gpu
    note $?
  done
  test_file graphs 20 tests/training/test_episodes.py -m gpu
  note $?
}

part_ops() {
  if [ "$gpu" -eq 0 ]; then
    test_file ops 60 tests/ops/test_torch_contract.py -k cpu -m "not gpu"
    return
  fi
  local file files
  # Only files that have tests for a GPU: each process takes seconds to start.
  files=$(cd "$source_copy" && PYTHONPATH=$site "$python" -m pytest -p no:cacheprovider --collect-only -q -m gpu \
    tests/ops 2>>"$out/logs/ops.log" | sed -n 's/::.*//p' | sort -u)
  [ -n "$files" ] || { echo "tests/ops: no tests for a GPU found" >>"$out/logs/ops.log"; return 1; }
  for file in $files; do
    test_file ops 30 "$file" -m gpu
    note $?
  done
}

sanitize() {
  local name=$1
  shift
  needs_gpu "$name" || return 77
  while [ $# -gt 0 ]; do
    in_copy "$name" $(($(left) / $# + 1)) "$python" tests/gpu/sanitizer.py "$1" # an equal share of the time
    note $?
    shift
  done
}

part_kernels() {
  local amount=(--seconds 1)
  [ "$gpu" -eq 1 ] || amount=(--quick --seconds 0.2)
  in_copy kernels 90 "$python" benchmarks/bench_kernels.py --device "$device" "${amount[@]}" --out "$results"
}

part_meta_step_others() {
  if [ "$gpu" -eq 0 ]; then
    needs_gpu meta_step_others
    return 77
  fi
  local workload
  for workload in C D; do
    meta_step meta_step_others 50 --workload "$workload" --seconds 3 --no-memory \
      --only "sequential loop" vmap signmaml_ext
    note $?
  done
  meta_step meta_step_others 60 --workload A --growth --seconds 1 --only "sequential loop" signmaml_ext
  note $?
  in_copy meta_step_others 60 "$python" benchmarks/bench_rates.py --device "$device" --seconds 1 --out "$results"
  note $?
  # The other peers are slow to prepare, so they run only if enough time is left.
  if [ "$(left)" -gt 90 ]; then
    meta_step meta_step_others 120 --workload A --seconds 3 --no-memory ||
      echo "not all peers in time; the result without the slow ones stays" >>"$out/logs/meta_step_others.log"
  fi
}

part_training() {
  # Time per iteration at the official sizes, with sampling and Adam. Images of noise need no download or drawing.
  local amount=(--iterations 3000 --set) small=()
  [ "$gpu" -eq 1 ] || { amount=(--iterations 3 --set); small=(image_size=16 filters=8); }
  in_copy training 90 "$python" benchmarks/bench_training.py --images random --validations 2 --out "$results" \
    "${amount[@]}" "device=$device" test_tasks=20 validate_tasks=20 tensorboard=false ${small[@]+"${small[@]}"}
}

part_run() {
  local folder=$out/run seconds code words=(--preset official --data glyphs --image-size 84) from=()
  seconds=$(($(left) - 10)) # for saving the state and for the report
  # The same number of iterations, which a CPU does not reach: the dry run stops in the middle too.
  [ "$gpu" -eq 1 ] || { seconds=20; words=(--preset sinusoid --iterations 60000 --device cpu); }
  if [ -f "$folder/last.safetensors" ] && [ ! -f "$folder/result.json" ]; then
    from=(--resume "$folder")
  else
    from=("${words[@]}" --out "$folder" --overwrite)
  fi
  in_copy run "$seconds" env "SIGNMAML_CACHE=$out/cache" "$python" -m signmaml train "${from[@]}"
  code=$?
  [ -s "$folder/metrics.jsonl" ] || return "$code"
  said="ok: iteration $(tail -n 1 "$folder/metrics.jsonl" | sed 's/.*"iteration": *\([0-9]*\).*/\1/') of 60000"
  if [ "$code" -eq 124 ] && grep -q "everything is saved" "$out/logs/run.log"; then
    said+=", stopped at the call's end"
    code=0
  fi
  return "$code"
}

part() {
  case $1 in
    sanitizer) sanitize sanitizer memcheck racecheck ;;
    sanitizer_rest) sanitize sanitizer_rest initcheck synccheck ;;
    *) "part_$1" ;;
  esac
}

failed=0
# report_part NAME BEGAN CODE: its line, and what its tests say.
report_part() {
  case $3 in
    0) ;;
    77) said="not here: $(tail -n 1 "$out/logs/$1.log")" ;;
    124 | 137) said="FAILED: out of time"; failed=1 ;;
    *) said="FAILED (exit $3): $(tail -n 1 "$out/logs/$1.log" | cut -c1-120)"; failed=1 ;;
  esac
  printf '%-16s %5d s  %s\n' "$1" $((SECONDS - $2)) "$said" | tee -a "$summary"
  [ ${#tested[@]} -eq 0 ] || "$python" "$tree/benchmarks/junit_counts.py" "${tested[@]}" | tee -a "$summary"
}

installed=0
if [ "${parts[0]}" != build ]; then
  began=$SECONDS said=ok
  : >"$out/logs/build.log"
  install_tree
  code=$?
  [ "$code" -ne 0 ] || installed=1
  report_part build "$began" "$code"
fi
for ((i = 0; i < ${#parts[@]}; i++)); do
  part=${parts[i]} began=$SECONDS said=ok worst=0 tested=() kept=0
  : >"$out/logs/$part.log"
  if [ "$part" = build ]; then
    part_build
    code=$?
    [ "$code" -ne 0 ] || installed=1
  elif [ "$installed" -eq 0 ]; then
    echo "the package could not be installed" >>"$out/logs/$part.log"
    code=1
  else
    for later in "${parts[@]:i+1}"; do kept=$((kept + ${kept_for[$later]})); done
    part "$part"
    code=$?
    [ "$code" -ne 0 ] || code=$worst
  fi
  report_part "$part" "$began" "$code"
done

if "$python" "$tree/benchmarks/report.py" --results "$results" >"$out/report.md" 2>"$out/logs/report.log"; then
  tee -a "$summary" <"$out/report.md"
else
  echo "FAILED: report.py: $(tail -n 1 "$out/logs/report.log")" | tee -a "$summary"
  failed=1
fi

# What is worth keeping, in one file.
kept_files=(summary.txt report.md)
for file in results/*.json junit/*.xml logs/*.log run/metrics.jsonl run/result.json; do
  for found in "$out"/$file; do
    [ ! -f "$found" ] || kept_files+=("${found#"$out"/}")
  done
done
tar -C "$out" -cf "$out/gpu_check_$call.tar" "${kept_files[@]}" || failed=1
echo
echo "all of it: $out/gpu_check_$call.tar   this table: $summary"
exit $failed
