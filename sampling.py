"""Drawing answers: what a batch of them holds, and the decoder in its readable form.

Each step draws one token for every row from softmax(logits / temperature), and from nothing else:
no top-k, no top-p, no repetition penalty, whatever the model's generation_config says. The
temperature is a number, or a function of the entropy of the step's raw logits (HAPO's Eq. 8, for
example; this module does not know it).

`generate` is for reading, and what --plain runs. fast/decoding.py has one of the same signature
that reads every prompt once, lets rows that have ended leave, and copies nothing. Both draw the
same tokens.

Shapes: P prompts, G answers each, B = P G rows (answers of a prompt adjacent), S prompt positions
(left-padded), T answer positions (right-padded), V vocabulary, R rows in flight.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor

from losses import row_logprobs_and_entropy
from program.errors import NonFinite
from program.models import cache_argument
from questions.prompts import end_of_turn

Rows = slice | list[int]  # of a rollout's answers
Temperature = float | Callable[[Tensor], Tensor]  # or entropies (R,) -> temperatures (R,)

# ----------------------------------------------------------------------------------------- answers


@dataclass(kw_only=True)
class Rollout:
    """A batch of answers. Masks come from lengths, never from token values."""

    prompt: Tensor  # (P, S) int64, left-padded
    prompt_mask: Tensor  # (P, S) bool
    tokens: Tensor  # (B, T) int64, 0 after the end
    mask: Tensor  # (B, T) bool, true up to and including the end-of-sequence token
    temperature: Tensor  # (B, T) what each token was drawn at, 0 after the end
    logp: Tensor  # (B, T) its log-probability at that temperature (greedy: at 1)
    entropy: Tensor  # (B, T) of that step's raw logits, nats; NaN where it was not measured
    finished: Tensor  # (B,) bool, false where the length cap cut the answer

    @property
    def group_size(self) -> int:
        return len(self.tokens) // len(self.prompt)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    def answers(self) -> list[list[int]]:
        """The answers as lists of ids, end-of-sequence token included."""
        tokens, mask = self.tokens.cpu(), self.mask.cpu()
        return [ids[own].tolist() for ids, own in zip(tokens, mask)]

    def listed(self, rows: Rows) -> list[int]:
        if isinstance(rows, slice):
            count = len(self.tokens)
            rows = list(range(count))[rows]
        return rows

    def sequences(self, rows: Rows) -> tuple:
        """Some rows as lines padded on the right: ids, mask, and whether an answer's id is next."""
        prompts = torch.arange(len(self.tokens), device=self.mask.device)[rows] // self.group_size
        padded = torch.cat([self.prompt[prompts], self.tokens[rows]], 1)
        start = self.prompt_mask[prompts].sum(1, keepdim=True)
        end = start + self.mask[rows].sum(1, keepdim=True)
        place = torch.arange(int(end.max()), device=padded.device)
        attention = place < end
        source = place + self.prompt.shape[1] - start  # skips the padding on the left
        ids = padded.gather(1, source.clamp_max(padded.shape[1] - 1)) * attention
        predicts = (place >= start - 1) & (place < end - 1)
        return ids, attention, predicts

    def with_response_mask(self, cap: int) -> tuple:
        """At most `cap` answers spread over the batch: ids, attention and response mask."""
        total = len(self.tokens)
        count = min(cap, total)
        places = range(count)
        rows = [i * total // count for i in places]
        ids, attention, predicts = self.sequences(rows)
        response = predicts.roll(1, 1)  # a token stands right of what predicts it
        return ids, attention, response


def pad_prompts(prompts: list, device: str = "cpu") -> tuple:
    """Lists of ids -> (P, S) ids and mask, padded on the left with 0; only the mask tells."""
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    starts = torch.tensor([[width - len(prompt)] for prompt in prompts])
    mask = torch.arange(width) >= starts
    return torch.tensor(ids, device=device), mask.to(device)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only: a left-padded row sees those of an unpadded one."""
    count = attention_mask.long().cumsum(-1)
    return (count - 1).clamp_min(0)


# ---------------------------------------------------------------------------------------- decoding


def generate(
    model: nn.Module,
    prompts: list,
    answers_per_prompt: int = 1,
    max_new_tokens: int = 32,
    eos_ids: Iterable[int] = (),
    temperature: Temperature = 1.0,
    vocab_size: int | None = None,
    uniform: Tensor | None = None,
    measure_entropy: bool = False,
) -> Rollout:
    """Draw `answers_per_prompt` answers to each prompt (lists of token ids, of any lengths).

    eos_ids          every id that ends an answer (see eos_ids_of)
    temperature      0 for greedy; see Temperature
    vocab_size       ids from here on (a padded vocabulary) have probability 0
    uniform          the random numbers, (max_new_tokens, B) in [0, 1)
    measure_entropy  of every step, also where no temperature asks for it (here it always is)"""
    device = model.get_input_embeddings().weight.device
    prompt, prompt_mask = pad_prompts(prompts, device)
    ids = prompt.repeat_interleave(answers_per_prompt, 0)
    visible = prompt_mask.repeat_interleave(answers_per_prompt, 0)
    position = position_ids(visible)
    if uniform is None:
        uniform = torch.rand(max_new_tokens, len(ids))
    ends = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    alive = torch.ones(len(ids), dtype=torch.bool, device=device)
    inputs = {"use_cache": True, cache_argument(type(model)): DynamicCache()}
    steps = []
    with rollout_mode(model):
        for t, draws in enumerate(uniform.to(device)):
            inputs |= {"attention_mask": visible, "position_ids": position}
            logits = model(ids, logits_to_keep=1, **inputs).logits[:, -1, :vocab_size]
            drawn = draw(logits.float(), temperature, draws)
            if not bool(drawn.logp[alive].isfinite().all()):
                raise NonFinite(f"the model's logits are NaN or infinite at answer position {t}")
            steps.append((alive, *drawn))
            # a row that has ended runs on beside the others, and what it draws does not count
            alive = alive & ~torch.isin(drawn.tokens, ends)
            if not bool(alive.any()):
                break
            ids = drawn.tokens[:, None]
            position = position[:, -1:] + 1
            visible = nn.functional.pad(visible, (0, 1), value=True)
    mask, *columns = [torch.stack(column, 1) for column in zip(*steps)]
    columns = [torch.where(mask, column, 0) for column in columns]
    kept = dict(zip(Drawn._fields, columns))
    return Rollout(prompt=prompt, prompt_mask=prompt_mask, mask=mask, finished=~alive, **kept)


@contextlib.contextmanager
def rollout_mode(model: nn.Module) -> Iterator[None]:
    """No gradient, and eval: in training mode gradient checkpointing silently drops the cache."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


class Drawn(NamedTuple):
    """One step's tokens and what is kept of each, (R,)."""

    tokens: Tensor
    temperature: Tensor
    logp: Tensor  # at that temperature (greedy: at 1)
    entropy: Tensor  # of the raw logits, in nats; NaN where it was not measured


def draw(logits: Tensor, temperature: Temperature, uniform: Tensor) -> Drawn:
    """One token a row from softmax(logits / T), (R, V): its inverse CDF at `uniform`, (R,) < 1."""
    entropy = entropy_of(logits)
    heat = temperature
    if callable(temperature):
        heat = temperature(entropy)
    heat = torch.zeros_like(entropy) + heat  # one a row
    if bool((heat == 0).all()):  # greedy: the distribution is a single token
        token = logits.argmax(-1)
    else:
        logits = logits / heat[:, None]
        token = invert_cdf(logits.softmax(-1), uniform)
    logp, _ = row_logprobs_and_entropy(logits, token)
    return Drawn(token, heat, logp, entropy)


def invert_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """The smallest index whose cumulative probability exceeds `uniform`; (R, V), (R,) -> (R,)."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # rounding may carry the threshold up to the total; below it, no id of probability 0 is drawn
    below = torch.nextafter(total, torch.zeros_like(total))
    threshold = uniform[:, None] * total
    threshold = torch.minimum(threshold, below)
    index = torch.searchsorted(cumulative, threshold, right=True)
    return index.squeeze(1).clamp_max(probs.shape[1] - 1)


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), (R, V) -> (R,). Logits of -inf have probability 0."""
    _, entropy = row_logprobs_and_entropy(logits, logits.argmax(-1))
    return entropy


class AdaptiveTemperature(LogitsProcessor):
    """The same rule for transformers' own generate: divides a row's logits by rule(their entropy).

    rule = lambda entropy: hapo.adaptive_temperature(entropy, stats)
    model.generate(..., do_sample=True, top_k=0, logits_processor=[AdaptiveTemperature(rule)])
    """

    def __init__(self, rule: Callable[[Tensor], Tensor]):
        self.rule = rule

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float()
        entropy = entropy_of(logits)
        temperature = self.rule(entropy)
        logits = logits / temperature[:, None]
        return logits.to(scores.dtype)


def eos_ids_of(model: nn.Module, tokenizer: object) -> list[int]:
    """Every id that ends an answer: of generation_config, of config, the tokenizer's own, and the
    one that the chat template puts behind an answer."""
    found = {end_of_turn(tokenizer)}
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        several = isinstance(ids, (list, tuple))
        if not several:
            ids = [ids]
        found.update(ids)
    return sorted(found - {None})
