#!/usr/bin/env bash
# verl's own main_ppo on a CPU, on the addition task: Ray, TransferQueue, agent loop, reward, FSDP2 over
# gloo and this project's bridge. The rollout is tests/engines/verl_rollout.py.
#     PYTHON=environment/bin/python tests/engines/verl_main.sh FOLDER RANKS STEPS [overrides of verl]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
folder=$1 ranks=$2 steps=$3
shift 3
mkdir -p "$folder"
export VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_cpu,bridges.verl_hapo,verl_rollout
export PYTHONPATH=$here:$project OMP_NUM_THREADS=1 TOY_WEIGHTS=$folder/weights.pt
export HF_HUB_OFFLINE=1 RAY_AUTH_MODE=disabled RAY_DEDUP_LOGS=0 RAY_USAGE_STATS_ENABLED=0 WANDB_MODE=offline
unset CUDA_VISIBLE_DEVICES  # Ray takes an empty list for no processor at all
rm -f "$TOY_WEIGHTS"
cd "$folder"
"$PYTHON" "$here/verl_addition.py" train.parquet 512
actor=actor_rollout_ref.actor rollout=actor_rollout_ref.rollout
exec "$PYTHON" -m verl.trainer.main_ppo \
    trainer.v1.trainer_mode=hapo algorithm.adv_estimator=hapo $actor.policy_loss.loss_mode=hapo \
    $actor.clip_ratio_low=0.2 $actor.clip_ratio_high=0.28 $actor.clip_ratio_c=1e9 \
    data.train_files=train.parquet data.val_files=train.parquet data.train_batch_size=16 \
    data.max_prompt_length=64 data.max_response_length=40 data.dataloader_num_workers=0 \
    actor_rollout_ref.model.path="$project/assets/tiny-qwen3" \
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa \
    actor_rollout_ref.model.use_remove_padding=True \
    $actor.strategy=fsdp2 $actor.fsdp_config.use_torch_compile=False \
    +$actor.fsdp_config.mixed_precision.param_dtype=fp32 \
    +$actor.fsdp_config.mixed_precision.reduce_dtype=fp32 \
    $actor.ppo_mini_batch_size=8 $actor.ppo_micro_batch_size_per_gpu=16 $actor.optim.lr=2e-4 \
    $rollout.name=toy $rollout.n=8 $rollout.log_prob_micro_batch_size_per_gpu=32 \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=32 \
    $rollout.tensor_model_parallel_size=1 $rollout.load_format=auto $rollout.free_cache_engine=False \
    $rollout.agent.num_workers=1 $rollout.agent.default_agent_loop=hapo_agent reward.num_workers=1 \
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1 \
    reward.custom_reward_function.path="$here/verl_addition.py" \
    trainer.device=cpu trainer.n_gpus_per_node="$ranks" trainer.nnodes=1 \
    trainer.val_before_train=False trainer.test_freq=-1 trainer.save_freq=-1 \
    "trainer.logger=['console']" trainer.total_training_steps="$steps" trainer.total_epochs=99 \
    trainer.project_name=addition trainer.experiment_name=addition \
    trainer.default_local_dir="$folder/checkpoints" \
    ray_kwargs.ray_init.num_cpus=16 +ray_kwargs.ray_init.num_gpus="$ranks" \
    +ray_kwargs.ray_init.include_dashboard=False +ray_kwargs.ray_init._temp_dir="$folder/ray" \
    +ray_kwargs.ray_init.object_store_memory=500000000 "$@"
