#!/usr/bin/env bash
# Make the peers' own virtual environment: real DeepSpeed beside the torch that constraints.txt pins.
#   bench/peers/setup.sh VENV_DIR
# The package's environment never sees DeepSpeed, so that nothing of ours can lean on it. Needs a C++ compiler: DeepSpeed builds
# its CPU Adam at first use (which is a part of what bench/systems/first_step.py times). PYTHON picks the interpreter.
set -euo pipefail

venv=${1:?usage: bench/peers/setup.sh VENV_DIR}
constraints=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/constraints.txt
python=${PYTHON:-python3}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip)
"${pip[@]}" install -q --upgrade pip
"${pip[@]}" install -q -c "$constraints" torch numpy setuptools wheel ninja packaging

# Seen by DeepSpeed's setup.py: build no op ahead of time, and do not look for an accelerator. Its sdist imports the
# installed torch, which an isolated build could not see.
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu
PATH="$venv/bin:$PATH" "${pip[@]}" install -q --no-build-isolation -c "$constraints" "deepspeed==0.19.*"
"$venv/bin/python" - <<'PY'
import importlib.metadata as metadata

print(*(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "ninja")), sep=", ")
PY
