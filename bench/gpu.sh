#!/usr/bin/env bash
# One command on a machine with a GPU: correctness of every kernel on the device, then the benchmarks.
# Writes into $OUT (or bench/results/gpu): environment, test log, benchmark JSON and tables. Nothing is installed.
#   bash bench/gpu.sh              everything
#   bash bench/gpu.sh tests        correctness only
#   bash bench/gpu.sh bench        benchmarks only
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results/gpu}
what=${1:-all}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
failed=0

python3 -m radio_fast.cli doctor >"$out/doctor.txt" 2>&1 || python3 - >"$out/doctor.txt" <<'PY'
from radio_fast.doctor import examine  # without the cli extra
for finding in examine():
    print(*finding, sep="\t")
PY
cat "$out/doctor.txt"
git rev-parse HEAD >"$out/commit.txt" 2>/dev/null || true

python3 csrc/build.py >"$out/build.txt" 2>&1 || { tail -20 "$out/build.txt"; failed=1; } # the CUDA extension
if [ "$what" != bench ]; then
    timeout 240 python3 -m pytest tests/ops tests/models/test_{triton,golden,eradio}.py -q 2>&1 | tee "$out/tests.txt" || failed=1
    if command -v compute-sanitizer >/dev/null; then # the extension's kernels again, for addresses and for races
        for tool in memcheck racecheck; do
            timeout 90 compute-sanitizer --tool $tool --error-exitcode 9 python3 -m pytest -q -x \
                tests/ops/test_cuda_attention.py -k "test_head_dims or packed or test_strides" \
                2>&1 | tee "$out/$tool.txt" | tail -3 || failed=1
        done
    fi
fi
if [ "$what" != tests ]; then
    # A file of results each: one that runs out of time loses only its own.
    for op in attention linear norm patch_embed window_attention eradio; do
        timeout 150 python3 -m pytest "bench/bench_$op.py" -o python_files='bench_*.py' -q \
            --benchmark-json="$out/$op.json" 2>&1 | tee "$out/bench_$op.txt" || failed=1
        [ ! -s "$out/$op.json" ] || python3 -m bench.table "$out/$op.json" || failed=1
    done
fi
exit $failed
