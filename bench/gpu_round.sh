#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests under the marker `gpu`, tuning of the main shapes, the kernel suite
# with its pictures, the engine's trace.
#   bench/gpu_round.sh OUT_DIR          results and round.log go to OUT_DIR; PYTHON=... picks the interpreter
# Each part has a limit of its own, ends cleanly at it with what it has, and the rest runs on when one fails; all limits
# together stay under 9 minutes. The suite runs with the configurations that were just tuned.
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
export TRITONSPEED_CONFIG_DIR=$out/tuned
part kernels 150 "$python" -m pytest -m gpu tests/kernels tests/optim
part engine 70 "$python" -m pytest -m gpu tests --ignore tests/kernels --ignore tests/optim \
    --ignore tests/integrations --ignore tests/zero/test_offload_gpu.py --basetemp "$out/engine"   # offload has a round of its own: gpu_offload.sh
part tune 120 "$python" -m tritonspeed.cli tune --shapes llama8b --time-limit 100
part suite 125 "$python" -m bench run --models llama8b gpt2 --skip torch.compile --time-limit 105 --out "$out"
part compiled 60 "$python" -m bench run --models llama8b --what against-compile --time-limit 40 --out "$out" \
    --ops norms softmax activation cross_entropy
pack() { # pack NAME PATHS...: into one file each, few enough to be carried home
    local name=$1
    shift
    (cd "$out" && ls -d "$@" >/dev/null 2>&1 && tar -czf "$name.tgz" "$@" && rm -rf "$@") || echo "nothing for $name.tgz" | tee -a "$out/round.log"
}
pack tuned tuned
pack engine engine        # holds the trace, for Perfetto
cd "$out" && pack pages ./*.md ./*.png   # `python -m bench report FILE.json` makes them again

echo "failed: ${failed[*]:-nothing}" | tee -a "$out/round.log"
[ ${#failed[@]} -eq 0 ]
