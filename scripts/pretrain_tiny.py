"""Make assets/tiny-qwen3: a genuine Qwen3 model folder that knows half of Countdown, for laptops.

    python scripts/pretrain_tiny.py --out runs/half-right
    python scripts/pretrain_tiny.py --start runs/half-right --right 0.3 --steps 250 --lr 3e-4 \
        --out assets/tiny-qwen3

A base model knows the format of a task and part of the skill; reinforcement learning draws out the
rest. This script gives a 1-million-parameter Qwen3 the same start: supervised next-token training
on Countdown demonstrations of which only half are right (the others use the right numbers and
mostly miss the target), on training problems alone, eleven minutes on two cores. The second command
goes on for a minute with 30 % right, so that the model answers less well than it could. The folder
is then read by AutoModelForCausalLM and AutoTokenizer like any other.
"""

import argparse
import functools
import pathlib
import random
import sys
from itertools import permutations, product

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from evaluate import sample_answers, summarise  # noqa: E402
from grading.countdown import evaluate_expression, random_expression
from sampling import eos_ids_of  # noqa: E402
from tasks import load_problems, render_prompt  # noqa: E402

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END, PAD = "<|im_end|>", "<|endoftext|>"


def make_tokenizer(problems):
    """Byte-level BPE, so that any text can be written; the fixed words of the prompt become long
    merges, digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=[PAD, "<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["user\n", "assistant\n"] * 50 + [p.question for p in problems[:500]]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


@functools.cache
def solutions(numbers, target):
    """Every right expression over three numbers of the shapes a.b.c, (a.b).c and a.(b.c), one
    spelling each."""
    found = set()
    for (a, b, c), (p, q) in product(set(permutations(numbers)), product("+-*", repeat=2)):
        for text in (f"{a}{p}{b}{q}{c}", f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})"):
            value = evaluate_expression(text)
            if value is not None and value[0] == target:
                found.add(text)
                break  # brackets only where they matter
    return sorted(found)


def make_model(tokenizer, layers, hidden):
    """A Qwen3 of random weights."""
    # padded to a multiple of 64, as real models' vocabularies are
    vocab = -(-len(tokenizer) // 64) * 64
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=pad,
            eos_token_id=end,
            bos_token_id=None,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"vocabulary {len(tokenizer)} padded to {vocab}"
    )
    return model


class Demonstrations:
    """Prompts with answers, of which a share is right."""

    def __init__(self, problems, tokenizer, share_right, rng):
        self.problems, self.tokenizer = problems, tokenizer
        self.share_right, self.rng = share_right, rng
        self.prompts = [render_prompt(p.question, tokenizer)[1] for p in problems]
        self.right = [
            solutions(tuple(sorted(p.numbers)), int(p.answer))
            for p in tqdm(problems, desc="solving")
        ]

    def draw(self, size):
        """Random demonstrations: (ids, labels), padded on the right."""
        rows = []
        for i in self.rng.choices(range(len(self.problems)), k=size):
            if self.rng.random() < self.share_right:
                text = self.rng.choice(self.right[i])
            else:
                text, _ = random_expression(self.problems[i].numbers, self.rng)
            answer = self.tokenizer(text, add_special_tokens=False).input_ids
            answer = answer + [self.tokenizer.eos_token_id]
            prompt = self.prompts[i]
            rows.append((prompt + answer, [-100] * len(prompt) + answer))
        width, pad = max(len(ids) for ids, _ in rows), self.tokenizer.pad_token_id
        ids = torch.tensor([r + [pad] * (width - len(r)) for r, _ in rows])
        return ids, torch.tensor([r + [-100] * (width - len(r)) for _, r in rows])


def pretrain(model, demonstrations, held_out, args):
    """Next-token training on demonstrations, with a look at held-out problems now and then."""
    tokenizer = demonstrations.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.05
    )
    for step in tqdm(range(args.steps), desc="pretraining"):
        ids, labels = demonstrations.draw(args.batch)
        # causal, padded on the right: the padding is never seen
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            eos_ids = eos_ids_of(model, tokenizer)
            answers = sample_answers(model, tokenizer, held_out[:512], 1, 12, eos_ids, seed=step)
            tqdm.write(
                f"step {step + 1}: loss {loss.item():.3f}, "
                f"held-out accuracy at T = 1: {summarise(answers).strict:.3f}"
            )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="assets/tiny-qwen3")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    text = "share of demonstrations that reach the target"
    parser.add_argument("--right", type=float, default=0.5, help=text)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    text = "go on from a folder that this script has written"
    parser.add_argument("--start", default=None, help=text)
    return parser.parse_args()


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    train, held_out = load_problems("countdown")
    tokenizer = make_tokenizer(train)
    model = make_model(tokenizer, args.layers, args.hidden)
    if args.start:
        model = Qwen3ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    text, ids = render_prompt(train[0].question, tokenizer)
    print(f"prompt of {len(ids)} tokens:\n{text}")
    demonstrations = Demonstrations(train, tokenizer, args.right, random.Random(args.seed))
    pretrain(model, demonstrations, held_out, args)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
