#!/usr/bin/env bash
# Mechanism A in a real vLLM engine, and TRL with vLLM, on a CPU:
#     tests/engines/vllm.sh ENVIRONMENT
# The environment is made if it is not there (about four minutes), the tests take five.
# HAPO_ROLLOUTS=30 runs TRL's addition example to its end.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
environment=$(mkdir -p "$1" && cd "$1" && pwd)
"$here/vllm_environment.sh" "$environment"
export OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=WARNING
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
cd /  # nothing of the project is found by lying beside it
"$environment/bin/python" - <<'PYTHON'
import importlib.util
import bridges, bupo, hapo, internals, losses, sampling  # noqa: E401 - what is installed

for name in ("train", "evaluate", "tasks", "common", "engine", "problems"):
    assert importlib.util.find_spec(name) is None, f"{name} would hide other packages"
print("installed: the five concept files and bridges, nothing else")
PYTHON
for register in class name entry; do
    HAPO_REGISTER=$register "$environment/bin/python" -m pytest -q -s --show-capture=no \
        --rootdir "$project" "$project/tests/engines/test_vllm.py"
done
"$environment/bin/python" -m pytest -q -s --show-capture=no --rootdir "$project" \
    "$project/tests/engines/test_trl_vllm.py"
