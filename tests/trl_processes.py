"""Run by tests/test_bridges.py under torchrun: groups that straddle processes, then phase 1 with
checkpointed layers, DDP's own errors included. Prints what process 0 has checked."""

import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer

import hapo
from bridges.trl_trainers import HAPOBuPOTrainer, HAPOConfig

P, G = 3, 4


def paid(text):
    return float(sum(map(ord, text)) % 2)


def reward(completions, **more):
    return [paid(messages[0]["content"]) for messages in completions]


def main(folder, out):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = HAPOConfig(
        output_dir=out,
        per_device_train_batch_size=P * G // 2,  # one group and a half
        num_generations=G,
        num_iterations=2,
        max_completion_length=24,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_steps=4,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        bupo_layer="auto",
        bupo_steps=1,
        logging_steps=1,
    )
    asked = [f"What is {371 + n} + {245 * n}?" for n in range(3 * P)]
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": q}] for q in asked]})
    trainer = HAPOBuPOTrainer(
        folder, reward, args=args, train_dataset=data, processing_class=tokenizer
    )
    seen, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(score(inputs)) or seen[-1]
    trainer.train()

    gather = trainer.accelerator.gather
    batch = seen[0]
    mask = trainer._everywhere(batch["completion_mask"])
    ids = trainer._everywhere(batch["completion_ids"])
    h, shares = trainer._everywhere(batch["h"]), trainer._everywhere(batch["advantages"])
    rows = [row[own.bool()] for row, own in zip(ids, mask)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    rewards = torch.tensor([paid(text) for text in texts])
    expected = hapo.token_group_advantages(rewards, mask, G)
    torch.testing.assert_close(shares, expected, atol=1e-4, rtol=1e-4)
    assert h[mask.bool()].max() > 0.99 and h[mask.bool()].min() < -0.99  # of all tokens together
    assert len(set(rewards[4:8].tolist())) == 2, rewards  # the group that straddles has both
    layers = gather(torch.tensor([trainer._kept.layer])).tolist()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    one, two = gather(weights[None])
    assert layers[0] == layers[1] and torch.equal(one, two)
    phases = [row["bupo/layer"] for row in trainer.state.log_history if "bupo/layer" in row]
    if trainer.accelerator.is_main_process:
        print(f"checked: layer {layers[0]}, phases {phases}")


if __name__ == "__main__":
    main(*sys.argv[1:])
