#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests under the marker `gpu`, then the benches.
#   bench/gpu_round.sh OUT_DIR          JSON and round.log go to OUT_DIR; PYTHON=... picks the interpreter
# Each part has a limit of its own and the rest runs on when one fails; all limits together stay under 9 minutes.
set -u -o pipefail
out=${1:?usage: bench/gpu_round.sh OUT_DIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=()

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name" | tee -a "$out/round.log"
    timeout "$limit" "$@" 2>&1 | tee -a "$out/round.log" || failed+=("$name")
}

export PYTHONUNBUFFERED=1
part tests 200 "$python" -m pytest -m gpu tests --ignore tests/engine
part engine 90 "$python" -m pytest -m gpu tests/engine --basetemp "$out/engine"   # its trace stays there, for Perfetto
part adamw 150 "$python" -m bench.kernels.bench_adamw --device cuda --sweep --out "$out"
part global_norm 90 "$python" -m bench.kernels.bench_global_norm --device cuda --out "$out"

echo "failed: ${failed[*]:-nothing}" | tee -a "$out/round.log"
[ ${#failed[@]} -eq 0 ]
