"""What `python internals.py` does: sample answers (or read finished ones), ask every layer for its entropy on them, print and draw."""

import json
import math
import pathlib

import torch
from tqdm import tqdm

from internals import boundary_layer, decoder_body, internal_entropy
from program.command import OneLineParser
from program.errors import BadInput
from program.models import check_device, load_model
from sampling import Rollout, eos_ids_of, generate
from tasks import BUILT_IN, fit_context, load_problems, read_problems, render_prompt


def sampled_answers(model, tokenizer, problems, max_new_tokens, seed):
    """One answer to each problem, drawn from the model at T = 1, as a Rollout."""
    prompts = [ids for _, ids in fit_context(problems, tokenizer, model.config, max_new_tokens)]
    parts = [
        generate(
            model,
            prompts[i : i + 32],
            1,
            max_new_tokens,
            eos_ids_of(model, tokenizer),
            vocab_size=len(tokenizer),
            generator=torch.Generator().manual_seed(seed + i),
        )
        for i in tqdm(range(0, len(prompts), 32), desc="answering", leave=False)
    ]
    return Rollout.join(parts)


def finished_answers(path, tokenizer, limit, max_new_tokens, context):
    """Answers from a JSONL file with `question` and `answer` (a run's samples.jsonl, for example), as a Rollout."""
    prompts, answers = [], []
    for number, line in enumerate(open_lines(path), 1):
        try:
            row = json.loads(line.decode("utf-8"))
            question, answer = row["question"], row["answer"]
            if not (isinstance(question, str) and isinstance(answer, str)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise BadInput(
                f"--answers {path}, line {number}: needs a JSON object with question and answer, both texts"
            ) from None
        ids = tokenizer(answer, add_special_tokens=False).input_ids[: max_new_tokens - 1] + [
            i for i in [tokenizer.eos_token_id] if i is not None
        ]
        prompts.append(render_prompt(question, tokenizer)[1])
        answers.append(ids)
        if len(prompts[-1]) + len(ids) > context:
            raise BadInput(
                f"--answers {path}, line {number}: question and answer have {len(prompts[-1]) + len(ids)} tokens, the model's context {context}; shorten them, or lower --max-new-tokens"
            )
        if len(answers) == limit:
            break
    if not answers:
        raise BadInput(f"--answers {path}: the file is empty")
    return Rollout.of_answers(prompts, answers)


def open_lines(path):
    if not pathlib.Path(path).is_file():
        raise BadInput(f"--answers {path}: no such file")
    return open(path, "rb")


def model_folder(name):
    """A model folder, or a run's folder, which stands for its final/ model."""
    final = pathlib.Path(name) / "final"
    return str(final) if final.is_dir() else name


def table(entropy):
    """One row a layer, as lines of text; the boundary layer is marked."""
    boundary = boundary_layer(entropy.feed_forward_change)
    head = f"{'layer':>5} {'H(H^l)':>8} {'H(A^l)':>8} {'H(F^l)':>8} {'dH layer':>9} {'dH attn':>8} {'dH ffn':>8} {'cos A':>7} {'cos F':>7}"
    rows = [head, f"{0:>5} {entropy.layer[0]:>8.3f}   (the embedding)"]
    for l in range(1, len(entropy.layer)):
        numbers = (entropy.layer[l], entropy.attention[l - 1], entropy.feed_forward[l - 1])
        changes = (
            entropy.layer_change[l - 1],
            entropy.attention_change[l - 1],
            entropy.feed_forward_change[l - 1],
        )
        rows.append(
            f"{l:>5} "
            + " ".join(f"{x:>8.3f}" for x in numbers)
            + f" {changes[0]:>+9.3f} {changes[1]:>+8.3f} {changes[2]:>+8.3f} {entropy.attention_cosine[l - 1]:>+7.3f} {entropy.feed_forward_cosine[l - 1]:>+7.3f}"
            + ("  <- boundary layer" if l == boundary else "")
        )
    rows.append(f"the model's own policy (with the final norm): {entropy.policy:.3f} nats")
    rows.append(
        f"boundary layer: {boundary} of {len(entropy.layer) - 1}"
        if boundary
        else "boundary layer: none, no feed-forward block raises entropy"
    )
    return "\n".join(rows)


def main(argv=None):
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--model", required=True, help="a Hugging Face folder or name, or a run's folder"
    )
    parser.add_argument(
        "--task",
        choices=sorted(BUILT_IN),
        default="countdown",
        help="held-out problems of a built-in task",
    )
    parser.add_argument("--difficulty", type=int, default=None)
    parser.add_argument(
        "--data",
        default=None,
        metavar="FILE",
        help="questions from a JSONL or parquet file instead",
    )
    parser.add_argument(
        "--answers",
        default=None,
        metavar="FILE",
        help="finished answers (JSONL with question and answer) instead of sampling",
    )
    parser.add_argument(
        "--samples", type=int, default=32, metavar="N", help="answers that are looked at"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--compare",
        default=None,
        metavar="RUN_OR_DIR",
        help="a second model on the same answers, before and after training for example",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out",
        default="internals",
        metavar="DIR",
        help="internals.json, entropy_flow.png, entropy_change.png",
    )
    args = parser.parse_args(argv)
    for name in ("samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")

    check_device(args.device)
    model, tokenizer = load_model(model_folder(args.model), args.device)
    decoder_body(model)
    if args.answers:
        rollout = finished_answers(
            args.answers,
            tokenizer,
            args.samples,
            args.max_new_tokens,
            getattr(model.config, "max_position_embeddings", None) or math.inf,
        )
    else:
        problems = (
            read_problems(args.data)
            if args.data
            else load_problems(args.task, difficulty=args.difficulty)[1]
        )
        rollout = sampled_answers(
            model, tokenizer, problems[: args.samples], args.max_new_tokens, args.seed
        )
    inputs = [x.to(args.device) for x in rollout.with_response_mask(args.samples)]
    results = {}
    for name in [args.model] + ([args.compare] if args.compare else []):
        if name != args.model:
            model, other = load_model(model_folder(name), args.device)
            if other.get_vocab() != tokenizer.get_vocab():
                raise BadInput(
                    f"--compare {name}: its tokenizer is not that of {args.model}; the same answers mean other tokens there"
                )
        results[name] = internal_entropy(
            model, *inputs, len(tokenizer), progress=f"layers of {name}"
        )
        print(
            f"\n{name}: {len(rollout.tokens)} answers, {int(rollout.mask.sum())} tokens; entropies in nats\n{table(results[name])}"
        )

    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        name: {key: value.tolist() for key, value in e._asdict().items()}
        | {
            "layer_change": e.layer_change.tolist(),
            "attention_change": e.attention_change.tolist(),
            "feed_forward_change": e.feed_forward_change.tolist(),
            "boundary_layer": boundary_layer(e.feed_forward_change),
            "answers": len(rollout.tokens),
            "tokens": int(rollout.mask.sum()),
            "seed": args.seed,
        }
        for name, e in results.items()
    }
    (out / "internals.json").write_text(json.dumps(record, indent=1) + "\n")
    try:
        from scripts.internal_figures import draw
    except ImportError:
        print(f"\n{out / 'internals.json'} written; for the two figures: pip install matplotlib")
    else:
        print(
            f"\nwritten: {out / 'internals.json'}, " + ", ".join(str(p) for p in draw(record, out))
        )
