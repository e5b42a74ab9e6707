#!/usr/bin/env bash
# reproduce.sh [RESULTS] [OMNIGLOT]: measures everything in docs/benchmarks.md on this machine and prints the tables.
# RESULTS is a new folder (default: build/results). OMNIGLOT, the folder with its images, adds the training figures.
# To fill the tables of this clone from benchmarks/results: python benchmarks/report.py --write
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-build/results} omniglot=${2:-}
python=${PYTHON:-python3}
"$python" benchmarks/bench_kernels.py --out "$results"
for workload in A B C D; do
  "$python" benchmarks/bench_meta_step.py --workload "$workload" --out "$results"
  "$python" benchmarks/bench_meta_step.py --workload "$workload" --growth --seconds 5 --out "$results"
  "$python" benchmarks/bench_meta_step.py --workload "$workload" --method maml --seconds 20 --out "$results"
done
"$python" benchmarks/bench_meta_step.py --workload A --growth --method maml --seconds 1 \
  --only 'sequential loop' 'signmaml_ext, cpu' --out "$results"
"$python" benchmarks/bench_rates.py --out "$results"
if [ -n "$omniglot" ]; then
  "$python" benchmarks/record_run.py --out "$results/omniglot_5w1s.json" --curves "$results/omniglot_curves.png" \
    --shown "signmaml train --preset omniglot --data-root DIR" -- --preset omniglot --data-root "$omniglot"
  "$python" benchmarks/bench_training.py --preset omniglot --data-root "$omniglot" \
    --methods sign-maml sharp-sign-maml fo-maml maml alpha-maml --seconds 60 --out "$results"
fi
"$python" benchmarks/report.py --results "$results" --plots "$results"
"$python" benchmarks/report.py --results "$results"
