#!/usr/bin/env bash
# One command on a machine with a GPU: is everything right there, and how fast is it? Nothing is installed; the
# checkout runs with that machine's own python3, torch and triton, and csrc is built with its nvcc.
#
#   bash bench/gpu.sh              tests on the device, then whole models against their rivals; 9 minutes at most
#   bash bench/gpu.sh --quick      the same in 3 minutes, without torch.compile
#   bash bench/gpu.sh tests        every test, and compute-sanitizer
#   bash bench/gpu.sh bench        the models alone, all 9 minutes for them
#   bash bench/gpu.sh compiled     torch.compile's max-autotune on more shapes; adds to the results that are there
#   bash bench/gpu.sh ops          each op against its rivals (bench_<op>.py)
#   bash bench/gpu.sh --tiny       a rehearsal on any CPU: small models, times that mean nothing
#   … --only REGEX                 only the models' steps whose kind/case matches, added to the results that are there
#
# Writes results.json, README.md, charts, tuning.json and log.txt into $OUT, else bench/results/<gpu>. Ended early, it
# leaves what it had. Exits with 1 if a test failed or radio_fast was wrong. RADIO_FAST_COMMIT names the commit where
# there is no git; TOTAL replaces the seconds it may take.
set -uo pipefail
cd "$(dirname "$0")/.."
usage=$(sed -n '2,/^set/p' "bench/${0##*/}" | sed '$d; s/^# \{0,1\}//')
mode=all tiny=() only=()
while [ $# -gt 0 ]; do
    case $1 in
    all | tests | bench | compiled | ops) mode=$1 ;;
    --quick) mode=quick ;;
    --tiny) tiny=(--tiny) ;;
    --only) only=(--only "${2?REGEX}") && shift ;;
    *) echo "$usage" >&2 && exit 2 ;;
    esac
    shift
done
total=${TOTAL:-$([ $mode = quick ] && echo 175 || echo 540)}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MPLBACKEND=Agg KINETO_LOG_LEVEL=5
if [ ${#tiny[@]} -gt 0 ]; then
    out=${OUT:-out/tiny}
    test_files=(tests/ops/test_blend.py) more_tests=(tests/test_bench_targets.py)
else
    unset TRITON_INTERPRET
    read -r gpu sm <<<"$("$python" -c '
import torch
from bench.record import slug
if torch.cuda.is_available():
    print(slug(torch.cuda.get_device_name()), "%d%d" % torch.cuda.get_device_capability())')"
    [ -n "${gpu:-}" ] || { echo "gpu.sh: torch finds no GPU here; --tiny rehearses on the CPU" >&2; exit 2; }
    out=${OUT:-bench/results/$gpu}
    test_files=(tests) more_tests=(tests/ops tests/models)
    archs=${RADIO_FAST_CUDA_ARCHS:-$sm} # the others' code would not run here
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
export RADIO_FAST_CACHE=${RADIO_FAST_CACHE:-$work/cache}
log=$out/log.txt failed=0 child=
: >"$log"

left() { echo $((total - SECONDS)); }
out_of_time() { [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; }
at_most() { echo $(($1 < $2 ? $1 : $2)); }

# stage NAME SECONDS COMMAND…: its output goes to the log, its stderr also here; $status is its exit status, 124 or 137
# when it ran out of time. In the background, because bash would handle a signal only after it.
stage() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    echo "== $name" | tee -a "$log"
    if [ "$limit" -lt 1 ]; then
        status=124
        echo "   no time left" | tee -a "$log"
        return
    fi
    timeout --kill-after=15 "$limit" "$@" >>"$log" 2> >(tee -a "$log" >&2) &
    child=$!
    wait $child
    status=$?
    while kill -0 $child 2>/dev/null; do # the trap cut the wait short
        wait $child
        status=$?
    done
    child=
    echo "   $((SECONDS - began)) s, exit status $status" | tee -a "$log"
}
# Ended from outside: end what runs, leave out what is to come, but still write the report.
trap 'total=0 failed=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT

tests() { # NAME SECONDS ARGUMENTS…: that there are none (5) is no failure
    local name=$1 limit=$2 parallel=()
    shift 2
    if [ ${#tiny[@]} -eq 0 ] && "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n 8 --dist loadgroup); fi
    stage "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider "${parallel[@]}" "$@"
    sed -n "/^== $name\$/,\$p" "$log" | grep -E ' in [0-9.]+s' | tail -1
}

engine() { # MODE SECONDS
    local before=bench/results/${gpu:-}/results.json
    if [ -f "$before" ] && [ ! -f "$out/results.json" ]; then
        [ "$1" != compiled ] && [ ${#only[@]} -eq 0 ] || cp "$before" "$out/"
    fi
    # Its own limit ends it with everything in place; timeout's, later, is for when it can't.
    stage "engine, $1" $(($2 < 1 ? 0 : $2 + 25)) \
        "$python" -m bench.engine --mode "$1" --budget "$2" --out "$out" "${tiny[@]}" "${only[@]}"
    [ $status -eq 0 ] || failed=1
}

report() {
    [ -f "$out/results.json" ] || return
    total=$((SECONDS + 60)) # also when everything else was cut short
    stage charts 45 "$python" -m bench.charts "$out"
    stage report 20 "$python" -m bench.report "$out"
    [ $status -eq 0 ] || failed=1
    local tuned
    tuned=$(ls -t "$RADIO_FAST_CACHE"/tuning/*.json 2>/dev/null | head -1)
    [ -z "$tuned" ] || cp "$tuned" "$out/tuning.json"
}

stage doctor "$(at_most 30 "$(left)")" "$python" -m radio_fast.cli doctor
if [ ${#tiny[@]} -eq 0 ]; then
    stage build "$(at_most 120 "$(left)")" env RADIO_FAST_CUDA_ARCHS="$archs" "$python" csrc/build.py
    [ $status -eq 0 ] || failed=1
fi
case $mode in
all | quick)
    # -x: those that the clock ends had no failure so far. That is enough in a quick run, and of the many small tests.
    tests "tests marked gpu" "$(at_most $((total / 4)) "$(left)")" -x -m gpu "${test_files[@]}"
    [ $status -eq 0 ] || [ $status -eq 5 ] || { [ $mode = quick ] && out_of_time; } || failed=1
    if [ $mode = all ]; then
        tests "kernels and models" "$(at_most 60 $(($(left) / 4)))" -x -m "not gpu" "${more_tests[@]}"
        [ $status -eq 0 ] || [ $status -eq 5 ] || out_of_time || failed=1
    fi
    engine "$([ $mode = all ] && echo default || echo quick)" $(($(left) - 40))
    ;;
bench) engine default $(($(left) - 40)) ;;
compiled) engine compiled $(($(left) - 40)) ;;
tests)
    tests "all tests" $(($(left) * 6 / 10)) "${test_files[@]}"
    [ $status -eq 0 ] || failed=1
    if command -v compute-sanitizer >/dev/null; then # the extension's kernels again, for addresses and for races
        for tool in memcheck racecheck; do
            stage $tool "$(at_most 100 "$(left)")" compute-sanitizer --tool $tool --error-exitcode 9 \
                "$python" -m pytest -q -x tests/ops/test_cuda_attention.py -k "test_head_dims or packed or test_strides"
            [ $status -eq 0 ] || failed=1
        done
    fi
    ;;
ops)
    # A file of results each: one that runs out of time loses only its own.
    for op in attention linear norm patch_embed window_attention; do
        stage "bench_$op" "$(at_most 120 $(($(left) - 20)))" "$python" -m pytest "bench/bench_$op.py" -q \
            -p no:cacheprovider -o python_files='bench_*.py' --benchmark-json="$work/$op.json"
        [ $status -eq 0 ] || out_of_time || failed=1
    done
    found=("$work"/*.json)
    [ ! -s "${found[0]}" ] || "$python" -m bench.table --merge "$out/ops.json" "${found[@]}" >>"$log" || failed=1
    ;;
esac
trap '' TERM INT
case $mode in all | quick | bench | compiled) report ;; esac
if grep -q -e --ops radio_fast/cli.py; then
    stage "tuned choices" 20 "$python" -m radio_fast.cli doctor --ops
fi

# No path and no host name leaves the machine.
sed -i "s#$out#OUT#g; s#$RADIO_FAST_CACHE#CACHE#g; s#$work#TMP#g; s#$PWD#.#g; s#/[^ :\"']*/site-packages/#…/#g; s#${HOME:-/nonexistent}#~#g" "$log"
host=$(hostname 2>/dev/null) && sed -i "s#\b$host\b#HOST#g" "$log"
rm -rf "$work"
[ ! -f "$out/results.json" ] || [ $mode = tests ] || [ $mode = ops ] || "$python" -m bench.report --summary "$out"
[ $failed -eq 0 ] && echo "gpu.sh: all is well" || echo "gpu.sh: FAILED; see log.txt" >&2
exit $failed
