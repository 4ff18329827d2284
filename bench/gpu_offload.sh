#!/usr/bin/env bash
# Offload beside one GPU, in one go: its tests, the rate at 7 B, the largest model, DeepSpeed where it is installed.
#   bench/gpu_offload.sh OUT_DIR        results and round.log go to OUT_DIR; PYTHON=... picks the interpreter
# Each part has a limit of its own, ends cleanly at it with what it has, and the rest runs on when one fails; all limits
# together stay under 9 minutes. DEVICE=cpu TOY=--toy runs every part in small on a machine without a GPU.
set -u -o pipefail
out=${1:?usage: bench/gpu_offload.sh OUT_DIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
toy=${TOY:-}
failed=()

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name" | tee -a "$out/round.log"
    timeout "$limit" "$@" 2>&1 | tee -a "$out/round.log" || failed+=("$name")
}

bench() { # bench NAME SECONDS: the bench ends by itself before its part does
    # shellcheck disable=SC2086
    part "$1" "$2" "$python" -m bench.offload.bench_gpu_offload --what "$1" --device "$device" $toy --out "$out" \
        --time-limit $(($2 - 10))
}

export PYTHONUNBUFFERED=1
part tests 90 "$python" -m pytest -m gpu tests/zero/test_offload_gpu.py --basetemp "$out/tests"
bench rate 170
bench largest 210
bench deepspeed 60
rm -rf "$out/tests"

echo "failed: ${failed[*]:-nothing}" | tee -a "$out/round.log"
[ ${#failed[@]} -eq 0 ]
