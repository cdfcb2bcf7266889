"""From questions to the token ids a model reads."""

import math
from collections.abc import Callable
from dataclasses import replace

import jinja2
from tqdm import tqdm

from program.errors import BadInput

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


def render_prompt(question: str, tokenizer: object) -> tuple[str, list[int]]:
    """(text, token ids) of one question: through the tokenizer's chat template if it has one."""
    return render_prompts([question], tokenizer)[0]


def render_prompts(questions: list[str], tokenizer: object) -> list[tuple[str, list[int]]]:
    """Of many questions at once, in a quarter of the time."""
    if getattr(tokenizer, "chat_template", None):
        chats = [[{"role": "user", "content": question}] for question in questions]
        texts = tokenizer.apply_chat_template(chats, **TEMPLATE)
        return list(zip(texts, tokenizer(texts, add_special_tokens=False).input_ids))
    texts = [f"Question: {question}\nAnswer:" for question in questions]
    rows = tokenizer(texts).input_ids
    end = getattr(tokenizer, "eos_token_id", None)
    # some tokenizers close every text with an end token, behind which no answer begins
    return [(text, ids[:-1] if ids[-1:] == [end] else ids) for text, ids in zip(texts, rows)]


def end_of_turn(tokenizer: object) -> int | None:
    """The special token that the chat template puts behind an answer, if it puts one there."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "xyz"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except jinja2.TemplateError:
        return None  # it knows no answers, and so no end of one
    behind = tokenizer(text.rpartition("xyz")[2], add_special_tokens=False).input_ids[:1]
    added = tokenizer.added_tokens_decoder
    return behind[0] if behind and behind[0] in added and added[behind[0]].special else None


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
    context = getattr(config, "max_position_embeddings", None) or math.inf
    room = context - max_new_tokens
    items, together = [], 500
    bar = tqdm(total=len(problems), desc="rendering prompts", leave=False, delay=1, disable=None)
    for i in range(0, len(problems), together):
        some = problems[i : i + together]
        rendered = render_prompts([p.question for p in some], tokenizer)
        items += [(problem, ids) for problem, (_, ids) in zip(some, rendered)]
        bar.update(len(some))
    bar.close()
    fitting = [item for item in items if 0 < len(item[1]) <= room]
    if not fitting:
        shortest = min(len(ids) for _, ids in items)
        raise BadInput(
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
