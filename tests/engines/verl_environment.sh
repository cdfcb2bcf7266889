#!/usr/bin/env bash
# An environment with verl 0.9 for a CPU and this project's bridges, from the package index:
#     tests/engines/verl_environment.sh FOLDER
# Of verl's extra verl-core its trainer needs what is named here; the rest is for GPUs and pictures.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1
[ -f "$folder/ready" ] && exit 0
python3 -m venv "$folder"
pip="$folder/bin/pip --disable-pip-version-check --quiet"
$pip install torch==2.13.0 transformers==5.9.0 verl==0.9.1 TransferQueue==0.1.11 ray==2.60.0 \
    pyzmq msgspec pillow fastapi uvicorn cachetools setuptools pytest
$pip install --no-build-isolation --no-deps -e .
touch "$folder/ready"
