"""How good is a model: avg@k and unbiased pass@k on any task or file, strict and lenient, with standard errors.

    python evaluate.py --model runs/hapo-countdown/final --task countdown --samples 16
    python evaluate.py --model DIR --data test.jsonl --samples 8 --temperature 0.5 --out result.json

avg@k   the mean over k sampled answers a question, then over questions
pass@k  1 - C(n - c, k) / C(n, k): the chance that k answers drawn without replacement from the n sampled ones, c of them
        right, hold a right one (Chen et al. 2021, arXiv 2107.03374); unbiased, unlike 1 - (1 - c / n)^k
The reward of training is graded by the same function, so the two can be compared.
"""

import json
import math
import pathlib
from typing import NamedTuple

import torch
from tqdm import tqdm

from sampling import eos_ids_of, generate
from scale.latex import LATEX
from scale.load import check_device, fit_context, load_model
from scale.options import OneLineParser, run_main
from tasks import BUILT_IN, BadInput, Grade, default_cap, grade, load_problems, read_problems, render_prompt


def valid_json(thing, **style):
    """json.dumps with null for NaN and infinity, which JSON does not have."""

    def clean(x):
        if isinstance(x, dict):
            return {key: clean(value) for key, value in x.items()}
        if isinstance(x, list):
            return [clean(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(clean(thing), allow_nan=False, **style)


class Accuracy(NamedTuple):
    """Shares of right answers and what they rest on."""

    strict: float
    lenient: float
    strict_error: float  # standard error over questions; the answers to one question are not independent
    lenient_error: float
    finished: float  # share of answers that ended before the length cap
    length: float  # mean tokens of an answer


class Answer(NamedTuple):
    text: str
    grade: Grade
    tokens: int
    finished: bool


def sample_answers(model, tokenizer, problems, samples, max_new_tokens, eos_ids, temperature=1.0, seed=0, rows_at_once=512, progress=None):
    """For each problem a list of `samples` Answers. `progress` names a bar, or None."""
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, rows_at_once // samples)
    answers = []
    with tqdm(total=len(problems), desc=progress, disable=progress is None, leave=False) as bar:
        for i in range(0, len(problems), chunk):
            part = problems[i : i + chunk]
            prompts = [render_prompt(p.question, tokenizer)[1] for p in part]
            rollout = generate(model, prompts, samples, max_new_tokens, eos_ids, temperature, len(tokenizer), generator)
            texts = tokenizer.batch_decode(rollout.answers(), skip_special_tokens=True)
            rows = list(zip(texts, rollout.lengths.tolist(), rollout.finished.tolist()))
            for j, problem in enumerate(part):
                answers.append([Answer(text, grade(problem, text), n, done) for text, n, done in rows[j * samples : (j + 1) * samples]])
            bar.update(len(part))
    return answers


def summarise(answers):
    """Accuracy over problems from sample_answers' lists."""
    flat = [a for row in answers for a in row]

    def mean_and_error(verdict):
        means = torch.tensor([sum(getattr(a.grade, verdict) for a in row) / len(row) for row in answers], dtype=torch.float64)
        return means.mean().item(), (means.std() / len(means) ** 0.5).item() if len(means) > 1 else float("nan")

    strict, lenient = mean_and_error("strict"), mean_and_error("lenient")
    return Accuracy(strict[0], lenient[0], strict[1], lenient[1], sum(a.finished for a in flat) / len(flat), sum(a.tokens for a in flat) / len(flat))


def pass_at_k(n, c, k):
    """1 - C(n - c, k) / C(n, k), as a product of k factors that never overflows."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    failure = 1.0
    for i in range(k):
        failure *= (n - c - i) / (n - i)
    return 1.0 - failure


def main(argv=None):
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a Hugging Face folder or name")
    parser.add_argument("--task", choices=sorted(BUILT_IN), default="countdown", help="built-in task; its held-out problems are used")
    parser.add_argument("--difficulty", type=int, default=None)
    parser.add_argument("--data", default=None, metavar="FILE", help="JSONL or parquet instead of a built-in task; all its rows are used")
    parser.add_argument("--samples", type=int, default=8, metavar="K", help="answers a question, 1 to 256")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="default 16 for countdown, 32 for arithmetic, 512 for files")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first N questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows-at-once", type=int, default=512, help="answers decoded together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=None, metavar="FILE.json")
    args = parser.parse_args(argv)
    for name, low, high in (("samples", 1, 256), ("limit", 1, None), ("max_new_tokens", 1, None), ("rows_at_once", 1, None)):
        value = getattr(args, name)
        if value is not None and (value < low or (high and value > high)):
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be at least {low}" + (f" and at most {high}" if high else ""))
    check_device(args.device)
    if args.out and (pathlib.Path(args.out).is_dir() or pathlib.Path(args.out).parent.is_file()):
        raise BadInput(f"--out {args.out}: not a file that can be written; name one, such as result.json")
    if not 0 <= args.temperature <= 100:
        raise BadInput(f"--temperature {args.temperature}: must lie between 0 (greedy) and 100")
    if args.temperature == 0 and args.samples > 1:
        raise BadInput(f"--samples {args.samples}: greedy decoding (--temperature 0) has one answer a question; use --samples 1")

    problems = (read_problems(args.data) if args.data else load_problems(args.task, difficulty=args.difficulty)[1])[: args.limit]
    cap = args.max_new_tokens or default_cap(args.task, args.data)
    model, tokenizer = load_model(args.model, args.device, torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    problems = [problem for problem, _ in fit_context(problems, tokenizer, model.config, cap)]
    text, ids = render_prompt(problems[0].question, tokenizer)
    print(f"{len(problems)} questions, {args.samples} answers each, at most {cap} tokens; the first prompt ({len(ids)} tokens):\n{text}")
    answers = sample_answers(model, tokenizer, problems, args.samples, cap, eos_ids_of(model, tokenizer), args.temperature, args.seed, args.rows_at_once, "answering")

    result = {"model": args.model, "task": args.data or args.task, "questions": len(problems), "samples": args.samples, "temperature": args.temperature, "seed": args.seed, "max_new_tokens": cap, **summarise(answers)._asdict()}
    print(f"\n{'':14s}{'strict':>16s}{'lenient':>18s}")
    print(f"{'avg@' + str(args.samples):14s}{result['strict']:>8.3f} ± {result['strict_error']:.3f}{result['lenient']:>10.3f} ± {result['lenient_error']:.3f}")
    for k in (k for k in (2, 4, 8, 16, 32, 64, 128, 256) if k <= args.samples):
        for verdict in ("strict", "lenient"):
            values = torch.tensor([pass_at_k(args.samples, sum(getattr(a.grade, verdict) for a in row), k) for row in answers], dtype=torch.float64)
            result[f"pass@{k}_{verdict}"] = values.mean().item()
            result[f"pass@{k}_{verdict}_error"] = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")
        print(f"{'pass@' + str(k):14s}{result[f'pass@{k}_strict']:>8.3f} ± {result[f'pass@{k}_strict_error']:.3f}{result[f'pass@{k}_lenient']:>10.3f} ± {result[f'pass@{k}_lenient_error']:.3f}")
    print(f"finished within the cap: {result['finished']:.1%}; mean length {result['length']:.1f} tokens; ± is one standard error over questions")
    if LATEX.failures:
        print(f"{LATEX.failures} LaTeX comparisons failed or ran out of time and count as wrong")
    if args.out:
        pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(args.out).write_text(valid_json(result, indent=1) + "\n")
        print(f"written to {args.out}")
    return result


if __name__ == "__main__":
    run_main(main)
