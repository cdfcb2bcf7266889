"""Make assets/tiny-qwen3: a small Qwen3 model for laptops that adds numbers with many mistakes.

    python scripts/pretrain_tiny.py --out runs/sloppy

A base model knows the format of a task and has part of the skill; reinforcement learning improves
it from there. This script gives a small Qwen3 such a start, by next-token training on a sloppy
teacher's additions. Three quarters of the answers are bare numbers, most of which ignore every
carry. A quarter is worked digit by digit, and mostly correct:

    What is 247 + 138?     375                               bare, its carry forgotten
    What is 247 + 138?     7+8=15,4+3+1=8,2+1=3 #### 385     worked

So the likeliest response is a wrong bare number, and the model rarely uses the method that leads to
a correct one. Only training problems are shown. AutoModelForCausalLM and AutoTokenizer read the
folder like any other; its README.md says how it was made.
"""

import argparse
import pathlib
import random
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from evaluate import decoder_of, sample_responses, summarise  # noqa: E402
from problems.prompts import render_prompt  # noqa: E402
from tasks import BUILT_IN, load_problems  # noqa: E402

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END, PAD = "<|im_end|>", "<|endoftext|>"


def make_tokenizer(problems):
    """Return a byte-level BPE tokenizer, which can encode any text.

    The fixed words of the prompt become long tokens; each digit is a single token.
    """
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
    texts = ["user\n", "assistant\n", " #### "] * 50 + [p.question for p in problems[:500]]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


# -------------------------------------------------------------------------------------- the teacher


def worked(a, b, rng, slip):
    """Return the sum worked digit by digit from the right, with its carries.

    Each step is wrong with probability `slip`; later steps use the carry that was written.
    """
    x, y = str(a)[::-1], str(b)[::-1]
    steps, digits, carry = [], "", 0
    for i, (p, q) in enumerate(zip(x, y)):
        total = int(p) + int(q) + carry
        if rng.random() < slip:
            total += rng.choice([-1, 1]) if total else 1
        steps.append(f"{p}+{q}" + ("+1" if carry else "") + f"={total}")
        last = i + 1 == len(x)
        digits = (str(total) if last else str(total % 10)) + digits
        carry = int(total > 9)
    return ",".join(steps) + f" #### {digits}"


def bare(a, b, rng, right, forgotten):
    """Return the sum as a bare number: correct, without any carry, or off by a power of ten.

    The first two have the probabilities `right` and `forgotten`.
    """
    chance = rng.random()
    if chance < right:
        return str(a + b)
    if chance < right + forgotten:
        return "".join(str((int(p) + int(q)) % 10) for p, q in zip(str(a), str(b)))
    return str(a + b + rng.choice([-1, 1]) * 10 ** rng.randrange(len(str(a))))


class Teacher:
    """A source of random prompts with the teacher's answers."""

    def __init__(self, problems, tokenizer, args):
        self.tokenizer, self.args, self.rng = tokenizer, args, random.Random(args.seed)
        self.asked = [
            (render_prompt(p.question, tokenizer)[1], [int(n) for n in numbers_of(p)])
            for p in tqdm(problems, desc="rendering")
        ]

    def answer(self, a, b):
        """Return one random answer to a + b."""
        args, rng = self.args, self.rng
        if rng.random() < args.worked:
            return worked(a, b, rng, args.slip)
        return bare(a, b, rng, args.right, args.forgotten)

    def draw(self, size):
        """Return `size` random demonstrations: (ids, labels), (size, longest), right-padded."""
        rows = []
        for prompt, numbers in self.rng.choices(self.asked, k=size):
            answer = self.tokenizer(self.answer(*numbers), add_special_tokens=False).input_ids
            answer = answer + [self.tokenizer.eos_token_id]
            rows.append((prompt + answer, [-100] * len(prompt) + answer))
        width, pad = max(len(ids) for ids, _ in rows), self.tokenizer.pad_token_id
        ids = torch.tensor([r + [pad] * (width - len(r)) for r, _ in rows])
        return ids, torch.tensor([r + [-100] * (width - len(r)) for _, r in rows])


def numbers_of(problem):
    """Return the two numbers of a problem, "247" and "138" of "What is 247 + 138?"."""
    words = problem.question.removesuffix("?").split()
    return words[2], words[4]


# ---------------------------------------------------------------------------------------- the model


def make_model(tokenizer, layers, hidden):
    """Return a Qwen3 with random weights."""
    # pad the vocabulary to a multiple of 64, as real models do
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


def look(model, tokenizer, held_out, seed):
    """Return the model's accuracy on held-out problems as a line of text."""
    draw, cap = decoder_of(model, tokenizer), BUILT_IN["addition"].cap
    sampled = sample_responses(draw, tokenizer, held_out, 1, cap, seed=seed)
    greedy = sample_responses(draw, tokenizer, held_out, 1, cap, temperature=0.0)
    answers = [row[0] for row in sampled]
    with_steps = [a for a in answers if "####" in a.text]
    right = sum(a.grade.strict for a in with_steps) / max(1, len(with_steps))
    result = summarise(sampled)
    return (
        f"accuracy {result.strict:.3f} sampled, {summarise(greedy).strict:.3f} greedy; "
        f"{len(with_steps) / len(answers):.3f} of the sampled responses are worked out, and "
        f"{right:.3f} of these are correct; {result.length:.1f} tokens per sampled response"
    )


def pretrain(model, teacher, held_out, args):
    """Train a model on the teacher's answers by next-token prediction.

    Return {digits: the last line about held-out problems}.
    """
    looks = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.05
    )
    for step in tqdm(range(args.steps), desc="pretraining"):
        ids, labels = teacher.draw(args.batch)
        # with causal attention, no token attends to padding on the right
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 400 == 0 or step + 1 == args.steps:
            for level, problems in held_out.items():
                line = look(model, teacher.tokenizer, problems[:512], step)
                tqdm.write(f"step {step + 1}, loss {loss.item():.3f}, {level} digits: {line}")
                looks[level] = line
    return looks


def card(args, looks):
    """Return the model card: what the model is, how it was made, and how accurate it is."""
    told = " ".join(f"--{k} {v}" for k, v in vars(args).items() if k not in ("out", "digits"))
    told += " --digits " + " ".join(map(str, args.digits))
    found = "\n".join(f"- sums of {level} digits: {line}" for level, line in looks.items())
    return f"""# A tiny Qwen3 that adds sloppily

The weights were initialized at random and then trained by next-token prediction on the additions
of a sloppy teacher. Of the teacher's answers, {args.worked:.0%} are worked out digit by digit, and
each step is wrong with probability {args.slip:g}. The other answers are bare numbers. Of these,
{args.right:.0%} are correct, {args.forgotten:.0%} leave out every carry, and the rest are close to
the correct sum. The model was made for teaching reinforcement learning on a laptop and is good for
nothing else. All prompts are in English and have one form: "What is 247 + 138?".

    python scripts/pretrain_tiny.py --out DIR {told}

Results on held-out problems at the end of this training:

{found}

The model was made with PyTorch {torch.__version__}. With another number of threads, sums are
computed in another order, and the weights differ.
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", required=True, help="folder of the model")
    add("--digits", type=int, nargs="+", default=[3], help="levels of the task, equally often")
    add("--worked", type=float, default=0.25, help="share of the answers that are worked")
    add("--slip", type=float, default=0.03, help="chance that a step of them is wrong")
    add("--right", type=float, default=0.1, help="share of the bare answers that are right")
    add("--forgotten", type=float, default=0.7, help="share of them without any carry")
    add("--steps", type=int, default=1600)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=3e-3)
    add("--layers", type=int, default=6)
    add("--hidden", type=int, default=96)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    sides = {level: load_problems("addition", difficulty=level) for level in args.digits}
    train = [problem for problems, _ in sides.values() for problem in problems]
    tokenizer = make_tokenizer(train)
    model = make_model(tokenizer, args.layers, args.hidden)
    text, ids = render_prompt(train[0].question, tokenizer)
    print(f"prompt of {len(ids)} tokens:\n{text}")
    teacher = Teacher(train, tokenizer, args)
    looks = pretrain(
        model, teacher, {level: held_out for level, (_, held_out) in sides.items()}, args
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (pathlib.Path(args.out) / "README.md").write_text(card(args, looks), encoding="utf-8")
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
