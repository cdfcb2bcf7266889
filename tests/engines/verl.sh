#!/usr/bin/env bash
# HAPO and BuPO in verl, on a CPU:
#     tests/engines/verl.sh ENVIRONMENT
# The environment is made if it is not there (about two minutes). verl's worker against this project's
# step takes a minute in one process and two in two; then verl's own main_ppo runs on Ray: HAPO on one
# rank, and HAPO with BuPO and a KL term on two, three steps each (STEPS=30 learns the addition task).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
environment=$(mkdir -p "$1" && cd "$1" && pwd)
"$here/verl_environment.sh" "$environment"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
cd "$project"
tests=(-m pytest -q -s -p no:cacheprovider --show-capture=no tests/engines/test_verl.py)
"$environment/bin/python" "${tests[@]}"
"$environment/bin/torchrun" --standalone --nproc-per-node 2 "${tests[@]}" -k our_step
export PYTHON=$environment/bin/python
folder=$(mktemp -d)
"$here/verl_main.sh" "$folder/hapo" 1 "${STEPS:-3}" | grep -o "critic/score/mean:[0-9.]*"
"$here/verl_main.sh" "$folder/both" 2 "${STEPS:-3}" +bupo.layer=auto +bupo.steps=2 \
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001 \
    | grep -o "critic/score/mean:[0-9.]*\|bupo/layer:[0-9]*"
