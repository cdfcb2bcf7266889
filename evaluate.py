"""How good is a model: avg@k and unbiased pass@k on any task or file, with standard errors.

    python evaluate.py --model runs/hapo-addition/final --samples 16
    python evaluate.py --model DIR --data test.jsonl --samples 8 --temperature 0.5 --out result.json

avg@k   the mean over k sampled responses per question, then over questions
pass@k  1 - C(n - c, k) / C(n, k): the chance that k responses drawn without replacement from the n
        sampled ones, c of them right, hold a right one (Chen et al. 2021, arXiv 2107.03374);
        unbiased, unlike 1 - (1 - c / n)^k

Strict and lenient verdicts (tasks.py) stand side by side. The reward of training is graded by the
same function, so the two can be compared.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import common.threads  # before torch
from common.command import run_main
from run.evaluate_options import read_command_line

DESCRIPTION = __doc__.splitlines()[0]
if __name__ == "__main__":  # before torch, whose import takes seconds: mistakes are named at once
    run_main(read_command_line, None, DESCRIPTION)

# isort: split
import torch
from torch import nn
from tqdm import tqdm

from common.devices import check_device, default_device, default_dtype
from common.errors import UserError
from common.models import load_model, run_config, vocab_size_of
from engine.decoding import generate
from engine.self_check import check_decoder
from problems.files import DatasetSpec
from problems.grading import Grade, grade, response_texts
from problems.latex import LATEX
from problems.prompts import (
    default_instruction,
    fit_context,
    instruct,
    render_prompt,
)
from sampling import eos_ids_of
from tasks import BUILT_IN, Problem, default_cap, key_of, load_problems, read_problems


def valid_json(thing: object, **style) -> str:
    """json.dumps with null for NaN and infinity, which JSON does not have."""

    def clean(x):
        if isinstance(x, dict):
            return {key: clean(value) for key, value in x.items()}
        if isinstance(x, list):
            return [clean(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(clean(thing), allow_nan=False, **style)


class Accuracy(NamedTuple):
    """Shares of right responses and what they rest on."""

    strict: float
    lenient: float
    strict_error: float  # standard error over questions: responses to one are not independent
    lenient_error: float
    finished: float  # share of responses that ended before the length cap
    length: float  # mean tokens of a response


class Response(NamedTuple):
    text: str
    grade: Grade
    tokens: int
    finished: bool
    reward: float | None = None  # of a function of one's own


def decoder_of(model: nn.Module, tokenizer: object) -> Callable:
    """Return (prompts, group size, length cap, temperature, random numbers) -> Rollout."""
    eos_ids, vocab_size = eos_ids_of(model, tokenizer), vocab_size_of(model, tokenizer)

    def generate_with_the_model(prompts, group_size, max_new_tokens, temperature, uniform):
        sizes = (group_size, max_new_tokens)
        return generate(model, prompts, *sizes, eos_ids, temperature, vocab_size, uniform)

    return generate_with_the_model


def sample_responses(
    generate: Callable,
    tokenizer: object,
    problems: list[Problem],
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    rows_at_once: int = 512,
    progress: str | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[Response]]:
    """Return for each problem a list of `samples` Responses. `progress` names a bar, or None.

    Problem i draws with random numbers of its own, a function of `seed` and numbers[i] (default i):
    how many are answered together, and in which process, changes no draw.
    """
    responses, chunk = [], max(1, rows_at_once // samples)
    numbers = range(len(problems)) if numbers is None else numbers
    with tqdm(total=len(problems), desc=progress, disable=not progress or None, leave=False) as bar:
        for i in range(0, len(problems), chunk):
            part = problems[i : i + chunk]
            rendered = [render_prompt(p.question, tokenizer, p.history) for p in part]
            prompts = [ids for _, ids in rendered]
            draws = [draws_of(seed, n, max_new_tokens, samples) for n in numbers[i : i + chunk]]
            uniform = torch.cat(draws, 1)
            rollout = generate(prompts, samples, max_new_tokens, temperature, uniform)
            texts = response_texts(rollout.responses(), tokenizer)
            rows = list(zip(texts, rollout.lengths.tolist(), rollout.finished.tolist()))
            for j, problem in enumerate(part):
                graded = []
                for text, tokens, finished in rows[j * samples : (j + 1) * samples]:
                    verdict = grade(problem, text, finished, rendered[j][0])
                    graded.append(Response(text, verdict, tokens, finished))
                responses.append(graded)
            bar.update(len(part))
    return responses


def draws_of(seed: int, number: int, tokens: int, samples: int) -> torch.Tensor:
    """Uniform random numbers for the responses to one problem, (tokens, samples)."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(tokens, samples, generator=generator)


def mean_verdict(row: list[Response], verdict: str) -> float:
    """Return the share of responses with a verdict, strict or lenient."""
    return sum(getattr(a.grade, verdict) for a in row) / len(row)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over questions; NaN for a single one."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else math.nan


def summarise(responses: list[list[Response]]) -> Accuracy:
    """Accuracy over problems from sample_responses' lists."""
    flat = [a for row in responses for a in row]
    strict, lenient = (
        mean_and_error([mean_verdict(row, verdict) for row in responses])
        for verdict in Grade._fields
    )
    return Accuracy(
        strict[0],
        lenient[0],
        strict[1],
        lenient[1],
        sum(a.finished for a in flat) / len(flat),
        sum(a.tokens for a in flat) / len(flat),
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), as a product of k factors that never overflows."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    failure = 1.0
    for i in range(k):
        failure *= (n - c - i) / (n - i)
    return 1.0 - failure


def accuracy_table(responses: list[list[Response]], samples: int) -> tuple[dict, str]:
    """avg@k and pass@k as numbers by name, and as a table for people."""
    result = summarise(responses)._asdict()
    lines = [f"{'':14s}{'strict':>16s}{'lenient':>18s}"]
    ks = [k for k in (2, 4, 8, 16, 32, 64, 128, 256) if k <= samples]
    for name, k in [(f"avg@{samples}", None), *((f"pass@{k}", k) for k in ks)]:
        cells = []
        for verdict in Grade._fields:
            key = verdict if k is None else f"{name}_{verdict}"
            if k is not None:
                right = [sum(getattr(a.grade, verdict) for a in row) for row in responses]
                shares = [pass_at_k(samples, c, k) for c in right]
                result[key], result[f"{key}_error"] = mean_and_error(shares)
            cells.append(f"{result[key]:.3f} ± {result[f'{key}_error']:.3f}")
        lines.append(f"{name:14s}{cells[0]:>16s}{cells[1]:>18s}")
    return result, "\n".join(lines)


class EvaluationSet(NamedTuple):
    """What is asked: the options that say so, as a run has them."""

    task: str
    difficulty: int | None
    data: str  # a file instead of a task
    eval_data: str
    instruction: str
    max_new_tokens: int
    form: DatasetSpec  # of the file


def evaluation_set(args: object, run: dict | None) -> EvaluationSet:
    """What the command line says; else what the run asked whose folder holds the model."""
    run = run or {}
    own = {} if args.task or args.data else run  # whose questions are asked
    task = args.task or own.get("task", "addition")
    data = args.data or own.get("data", "")
    level = args.difficulty or own.get("difficulty", next(iter(BUILT_IN[task].levels)))
    instruction = run.get("instruction", default_instruction(data))
    if args.instruction is not None:
        instruction = args.instruction
    cap = args.max_new_tokens or own.get("max_new_tokens", default_cap(task, data))
    held_out = own.get("eval_data", "")
    form = form_of(own)
    if held_out:
        form = form._replace(split=own.get("eval_split", "test"))
    if args.data:
        form = DatasetSpec(args.data_split, args.question_column, args.answer_column)
    return EvaluationSet(task, None if data else level, data, held_out, instruction, cap, form)


def form_of(run: dict) -> DatasetSpec:
    """What a run's options say of its data."""
    columns = (run.get(f"{name}_column", "") for name in ("question", "answer"))
    return DatasetSpec(run.get("data_split", "train"), *columns)


def trained_on(model: str, problems: list[Problem]) -> str | None:
    """How many of the questions were trained on in the run whose folder holds the model, or in one
    that it was started from, and so on; None if none was."""
    known, seen, run = set(), set(), run_config(model)
    while run is not None and model not in seen:
        seen.add(model)
        try:
            form, own = form_of(run), bool(run.get("reward_function"))
            if run["eval_data"]:
                train_set = read_problems(run["data"], "--data", form, own)
            else:
                asked = (run["task"], run["data"] or None, run["difficulty"])
                train_set, _ = load_problems(*asked, form, own)
        except UserError as error:
            return f"cannot tell which questions {model} was trained on ({error})"
        known.update(map(key_of, train_set))
        model = run["model"]
        run = run_config(model)
    trained = sum(key_of(p) in known for p in problems)
    if not trained:
        return None
    return (
        f"{trained} of the {len(problems)} questions are among those that the model was trained on"
    )


def held_out_questions(args: object, asked: EvaluationSet) -> list[Problem]:
    """Every row of a file that is named; else the held-out part."""
    if args.data or asked.eval_data:
        return read_problems(args.data or asked.eval_data, "--data", asked.form)
    return load_problems(asked.task, asked.data or None, asked.difficulty, asked.form)[1]


def main(argv: list[str] | None = None) -> dict:
    args = read_command_line(argv, DESCRIPTION)
    args.device = args.device or default_device()
    check_device(args.device)
    common.threads.use_threads(args.threads)
    asked = evaluation_set(args, run_config(args.model))
    problems = held_out_questions(args, asked)[: args.limit]
    if overlap := trained_on(args.model, problems):
        print(f"warning: {overlap}")
    problems, cap = instruct(problems, asked.instruction), asked.max_new_tokens
    dtype = getattr(torch, args.dtype or default_dtype(args.device))
    model, tokenizer = load_model(args.model, args.device, dtype)
    problems = [problem for problem, _ in fit_context(problems, tokenizer, model.config, cap)]
    text, ids = render_prompt(problems[0].question, tokenizer, problems[0].history)
    level = f", level {asked.difficulty}" if asked.difficulty else ""
    print(
        f"{asked.eval_data or asked.data or asked.task}{level}: {len(problems)} questions, "
        f"{args.samples} responses each, at most {cap} tokens; "
        f"the first prompt ({len(ids)} tokens):\n{text}"
    )
    decoder = decoder_of(model, tokenizer)
    if not args.no_self_check:
        check_decoder(model, decoder, tokenizer, vocab_size_of(model, tokenizer), args.model)
    responses = sample_responses(
        decoder,
        tokenizer,
        problems,
        args.samples,
        cap,
        args.temperature,
        args.seed,
        args.rows_at_once,
        "answering",
    )
    accuracy, table = accuracy_table(responses, args.samples)
    result = {"model": args.model, "task": asked.eval_data or asked.data or asked.task}
    result |= {"difficulty": asked.difficulty, "instruction": asked.instruction}
    result |= {"questions": len(problems), "max_new_tokens": cap}
    result |= {name: getattr(args, name) for name in ("samples", "temperature", "seed")} | accuracy
    print(
        f"\n{table}\nfinished within the cap: {result['finished']:.1%}; mean length "
        f"{result['length']:.1f} tokens; ± is one standard error over questions"
    )
    if LATEX.failures:
        print(f"{LATEX.failures} LaTeX comparisons failed or ran out of time and count as wrong")
    if args.out:
        pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(args.out).write_text(valid_json(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {args.out}")
    return result


if __name__ == "__main__":
    run_main(main)
