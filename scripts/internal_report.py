"""Run `python internals.py`: measure every layer's entropy on responses, print and draw it.

The responses are sampled, or read from the file that --answers names.
"""

import json
import pathlib

import torch
from tqdm import tqdm

from common.devices import check_device, default_device
from common.errors import UserError
from common.models import load_model, run_config, vocab_size_of
from common.threads import use_threads
from engine.decoding import generate
from evaluate import evaluation_set, held_out_questions
from internals import boundary_layer, decoder_body, internal_entropy
from problems.prompts import context_of, fit_context, instruct, render_prompt
from run.batch import join, rollout_of
from sampling import eos_ids_of
from scripts.internal_options import read_command_line
from scripts.model_page import write_model_page


def sampled_answers(model, tokenizer, problems, max_new_tokens, seed):
    """Draw one response to each problem at temperature 1. Return (questions, Rollout)."""
    items = fit_context(problems, tokenizer, model.config, max_new_tokens)
    questions, prompts = [problem.question for problem, _ in items], [ids for _, ids in items]
    eos_ids, parts = eos_ids_of(model, tokenizer), []
    for i in tqdm(range(0, len(prompts), 32), desc="answering", leave=False, disable=None):
        some = prompts[i : i + 32]
        generator = torch.Generator().manual_seed(seed + i)
        draws = torch.rand(max_new_tokens, len(some), generator=generator)
        rollout = generate(
            model,
            some,
            1,
            max_new_tokens,
            eos_ids,
            vocab_size=vocab_size_of(model, tokenizer),
            uniform=draws,
        )
        parts.append(rollout)
    return questions, join(parts)


def finished_answers(path, tokenizer, limit, max_new_tokens, context):
    """Return (questions, Rollout) of the responses in a JSONL file.

    Each line has `question` and `answer`, the response. At most `limit` lines are read.
    """
    end = [i for i in [tokenizer.eos_token_id] if i is not None]
    questions, prompts, answers = [], [], []
    for number, line in enumerate(pathlib.Path(path).read_bytes().splitlines(), 1):
        question, answer = question_and_answer(line, f"--answers {path}, line {number}")
        ids = tokenizer(answer, add_special_tokens=False).input_ids[: max_new_tokens - 1] + end
        questions.append(question)
        prompts.append(render_prompt(question, tokenizer)[1])
        answers.append(ids)
        tokens = len(prompts[-1]) + len(ids)
        if tokens > context:
            raise UserError(
                f"--answers {path}, line {number}: question and answer have {tokens} tokens, "
                f"the model's context {context}; shorten them, or lower --max-new-tokens"
            )
        if len(answers) == limit:
            break
    if not answers:
        raise UserError(f"--answers {path}: the file is empty")
    return questions, rollout_of(prompts, answers)


def question_and_answer(line, where):
    """Return the texts `question` and `answer` (or `response`, as in samples.jsonl) of a line.

    UserError if one is missing; it names the line by `where`.
    """
    try:
        row = json.loads(line.decode("utf-8"))
        question, answer = row["question"], row.get("response", row.get("answer"))
        if not (isinstance(question, str) and isinstance(answer, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{where}: needs a JSON object with question and answer, both texts"
        ) from None
    return question, answer


def model_folder(name):
    """Return the model folder that a name refers to: RUN/final for the folder of a run."""
    final = pathlib.Path(name) / "final"
    return str(final) if final.is_dir() else name


def table(entropy):
    """Return an InternalEntropy as text, one row per layer; the boundary layer is marked."""
    e, boundary = entropy, boundary_layer(entropy.feed_forward_change)
    head = (
        f"{'layer':>5} {'H(H^l)':>8} {'H(A^l)':>8} {'H(F^l)':>8} {'dH layer':>9} {'dH attn':>8} "
        f"{'dH ffn':>8} {'cos A':>7} {'cos F':>7}"
    )
    rows = [head, f"{0:>5} {e.layer[0]:>8.3f}   (the embedding)"]
    for l in range(1, len(e.layer)):
        i = l - 1  # index of lists without an entry for the embedding
        rows.append(
            f"{l:>5} {e.layer[l]:>8.3f} {e.attention[i]:>8.3f} {e.feed_forward[i]:>8.3f} "
            f"{e.layer_change[i]:>+9.3f} {e.attention_change[i]:>+8.3f} "
            f"{e.feed_forward_change[i]:>+8.3f} "
            f"{e.attention_cosine[i]:>+7.3f} {e.feed_forward_cosine[i]:>+7.3f}"
            f"{'  <- boundary layer' if l == boundary else ''}"
        )
    rows.append(f"the model's own policy (with the final norm): {e.policy:.3f} nats")
    if boundary:
        margin = e.feed_forward_change[boundary - 1 :].abs().min()
        rows.append(
            f"boundary layer: {boundary} of {len(e.layer) - 1}; no deciding change is nearer to 0 "
            f"than {margin:.3f} nats"
        )
    else:
        rows.append("boundary layer: none, no feed-forward block raises entropy")
    return "\n".join(rows)


def answers_for(args, model, tokenizer):
    """Return (questions, Rollout) of the responses that every model is measured on."""
    if args.answers:
        context = context_of(model.config)
        return finished_answers(args.answers, tokenizer, args.samples, args.max_new_tokens, context)
    asked = evaluation_set(args, run_config(model_folder(args.model)))
    problems = instruct(held_out_questions(args, asked), asked.instruction)[: args.samples]
    return sampled_answers(model, tokenizer, problems, args.max_new_tokens, args.seed)


def record_of(entropy, rollout, seed):
    """Return the entry of internals.json for one model."""
    e = entropy
    return {key: value.tolist() for key, value in e._asdict().items()} | {
        "layer_change": e.layer_change.tolist(),
        "attention_change": e.attention_change.tolist(),
        "feed_forward_change": e.feed_forward_change.tolist(),
        "boundary_layer": boundary_layer(e.feed_forward_change),
        "answers": len(rollout.tokens),
        "tokens": int(rollout.mask.sum()),
        "seed": seed,
    }


def write(record, out):
    """Write internals.json and, if matplotlib is installed, the two figures."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "internals.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    try:
        from scripts.internal_figures import draw
    except ImportError:
        print(f"\n{out / 'internals.json'} written; for the two figures: pip install matplotlib")
    else:
        figures = ", ".join(str(p) for p in draw(record, out))
        print(f"\nwritten: {out / 'internals.json'}, {figures}")


def main(argv=None):
    args = read_command_line(argv)
    args.device = args.device or default_device()
    check_device(args.device)
    use_threads(args.threads)
    model, tokenizer = load_model(model_folder(args.model), args.device)
    decoder_body(model)
    questions, rollout = answers_for(args, model, tokenizer)
    inputs = [x.to(args.device) for x in rollout.with_response_mask(args.samples)]
    if not int(rollout.mask.sum()):
        raise UserError(f"--model {args.model}: its answers are empty; nothing can be asked about")
    record, models = {}, {}
    for name in [args.model] + ([args.compare] if args.compare else []):
        if name != args.model:
            model, other = load_model(model_folder(name), args.device)
            if other.get_vocab() != tokenizer.get_vocab():
                raise UserError(
                    f"--compare {name}: its tokenizer is not that of {args.model}; "
                    "the same answers mean other tokens there"
                )
        progress = f"layers of {name}"
        entropy = internal_entropy(
            model, *inputs, vocab_size_of(model, tokenizer), progress=progress
        )
        size = f"{len(rollout.tokens)} answers, {int(rollout.mask.sum())} tokens"
        print(f"\n{name}: {size}; entropies in nats\n{table(entropy)}")
        record[name], models[name] = record_of(entropy, rollout, args.seed), model
    write(record, pathlib.Path(args.out))
    page = write_model_page(
        pathlib.Path(args.out), models.items(), tokenizer, questions, rollout, record
    )
    print(f"what every layer would have said: open {page} in a browser")
