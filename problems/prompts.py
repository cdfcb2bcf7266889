"""From questions to the token ids a model reads."""

import math
from collections.abc import Callable
from dataclasses import replace

from tqdm import tqdm

from common.errors import UserError

# what the questions of a file are followed by: a strict verdict measures what was asked for
FILE_INSTRUCTION = "Finish with the final answer behind ####."


def default_instruction(data: str | None) -> str:
    """The instruction where nobody says: built-in questions ask for their form themselves."""
    return FILE_INSTRUCTION if data else ""


def instruct(problems: list, instruction: str) -> list:
    """The problems, each question followed by a line that says how to answer."""
    if not instruction:
        return problems
    return [replace(p, question=f"{p.question}\n{instruction}") for p in problems]


# enable_thinking is Qwen3's switch; templates that do not know it ignore it
TEMPLATE = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)


def render_prompt(question: str, tokenizer: object, history: tuple = ()) -> tuple[str, list[int]]:
    """(text, token ids) of one question: through the tokenizer's chat template if it has one."""
    return render_prompts([(question, history)], tokenizer)[0]


def render_prompts(asked: list[tuple], tokenizer: object) -> list[tuple[str, list[int]]]:
    """Of many (question, history) at once, in a quarter of the time. A history is the system
    message and the turns before the question, ((role, text), ...)."""
    chats = [(*history, ("user", question)) for question, history in asked]
    if getattr(tokenizer, "chat_template", None):
        chats = [[{"role": role, "content": text} for role, text in chat] for chat in chats]
        texts = tokenizer.apply_chat_template(chats, **TEMPLATE)
        return list(zip(texts, tokenizer(texts, add_special_tokens=False).input_ids))
    form = {"user": "Question: {}\nAnswer:", "assistant": " {}\n\n", "system": "{}\n\n"}
    texts = ["".join(form.get(role, "{}\n\n").format(text) for role, text in c) for c in chats]
    rows = tokenizer(texts).input_ids
    end = getattr(tokenizer, "eos_token_id", None)
    # some tokenizers close every text with an end token, behind which no answer begins
    return [(text, ids[:-1] if ids[-1:] == [end] else ids) for text, ids in zip(texts, rows)]


def _rendered(problems, tokenizer):
    """render_prompts of problems; UserError names the one that template or tokenizer refuses."""
    try:
        return render_prompts([(p.question, p.history) for p in problems], tokenizer)
    except Exception as error:  # noqa: BLE001 - a template may raise anything, tokenizers too
        if len(problems) > 1:
            return [pair for p in problems for pair in _rendered([p], tokenizer)]
        (problem,) = problems
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        where = f"{problem.place}, " if problem.place else ""
        raise UserError(
            f"{where}question {problem.question[:60]!r}: the model's chat template or tokenizer "
            f"refuses it ({first}); remove the row, or mend the template"
        ) from error


def context_of(config: object) -> float:
    """Return the most tokens of a text that the model computes alike in every forward pass.

    With rope of type longrope, a pass whose longest row exceeds the original context rotates all
    rows by other angles. So the log-probabilities of a text would depend on its neighbours, and the
    original context is the limit.
    """
    context = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(x for x in rope.values() if isinstance(x, dict))):  # one per kind of layer
        if kind.get("rope_type") == "longrope":
            original = getattr(config, "original_max_position_embeddings", None)
            context = min(
                context, kind.get("original_max_position_embeddings") or original or context
            )
    return context


def fit_context(
    problems: list,
    tokenizer: object,
    config: object,
    max_new_tokens: int,
    say: Callable[[str], None] = print,
) -> list[tuple[object, list[int]]]:
    """[(problem, prompt ids)] whose prompt leaves room for an answer in the model's context.

    Says how many do not.
    """
    context = context_of(config)
    room = context - max_new_tokens
    items, together = [], 500
    bar = tqdm(total=len(problems), desc="rendering prompts", leave=False, delay=1, disable=None)
    for i in range(0, len(problems), together):
        some = problems[i : i + together]
        rendered = _rendered(some, tokenizer)
        items += [(problem, ids) for problem, (_, ids) in zip(some, rendered)]
        bar.update(len(some))
    bar.close()
    known = getattr(config, "vocab_size", None) or math.inf
    for problem, ids in items:
        if max(ids, default=0) >= known:
            raise UserError(
                f"{problem.place or 'a question'}: its prompt holds a token that the model does "
                f"not know (id {max(ids)}, the model has {known:g}); remove the row, or use the "
                "model's own tokenizer"
            )
    fitting = [item for item in items if 0 < len(item[1]) <= room]
    if not fitting:
        shortest = min(len(ids) for _, ids in items)
        raise UserError(
            f"--max-new-tokens {max_new_tokens}: no prompt fits the model's context of {context} "
            f"tokens beside it; the shortest has {shortest}"
            + (f": at most {context - shortest} are left" if shortest < context else "")
        )
    if len(fitting) < len(items):
        say(
            f"warning: {len(items) - len(fitting)} of {len(items)} prompts are longer than the "
            f"model's context less --max-new-tokens ({room} tokens) and are left out"
        )
    return fitting
