"""Sampling: a batch of responses (`Rollout`) and a readable decoder (`generate`).

Each decoding step draws one token per row from softmax(logits / temperature), and from nothing
else: no top-k, no top-p, no repetition penalty, whatever the model's generation_config says. The
temperature is a number, or a rule: a function of the entropies of the step's raw logits and of the
tokens' positions in the response. HAPO's Eq. 8 is such a rule, but this module needs no part of it.

`generate` is the readable decoder, which --plain runs. engine/decoding.py has the fast one: the
same arguments and the same tokens.

Shapes: P prompts, G responses to each, B = P G rows (the responses to a prompt are adjacent), S
prompt positions (left-padded), T response positions (right-padded), V vocabulary, R rows that are
being decoded.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor

from losses import row_logprobs_and_entropy

Rows = slice | list[int]  # rows of a rollout
# a number, or a rule: entropies in nats and positions in the response -> temperatures, (R,) each
Temperature = float | Callable[[Tensor, Tensor], Tensor]


class NonFinite(FloatingPointError):
    """A logit, a reward, a loss or a weight is NaN or infinite."""


# --------------------------------------------------------------------------------------- responses


class TokenScores(NamedTuple):
    """Log-probability and entropy of every response token, with their policy and temperature."""

    logp: Tensor  # (B, T), 0 at padding
    entropy: Tensor | None  # (B, T) in nats, 0 at padding; None where it was not computed
    policy: str  # whose distribution: "sampler", "full policy", "layer 3", "reference"
    temperature: float | Tensor  # of logp: a number, or one per token where the sampler adapts it
    entropy_temperature: float  # temperature at which the entropy was computed


@dataclass(kw_only=True)
class Rollout:
    """A batch of responses. Masks come from lengths, never from token values."""

    prompt: Tensor  # (P, S) int64, left-padded
    prompt_mask: Tensor  # (P, S) bool
    tokens: Tensor  # (B, T) int64, 0 after the end
    mask: Tensor  # (B, T) bool, true up to and including the end-of-sequence token
    temperature: Tensor  # (B, T) temperature at which each token was drawn, 0 after the end
    logp: Tensor  # (B, T) each token's log-probability at that temperature (greedy: at 1)
    entropy: Tensor  # (B, T) nats, of each step's raw logits; NaN where it was not measured
    finished: Tensor  # (B,) bool, false where the length cap cut the response

    @property
    def group_size(self) -> int:
        return len(self.tokens) // len(self.prompt)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    @property
    def scores(self) -> TokenScores:
        """Return what the sampler recorded: logp at each token's temperature, entropies at 1."""
        return TokenScores(self.logp, self.entropy, "sampler", self.temperature, 1.0)

    def responses(self) -> list[list[int]]:
        """Return the responses as lists of ids, end-of-sequence token included."""
        tokens, mask = self.tokens.cpu(), self.mask.cpu()
        return [ids[kept].tolist() for ids, kept in zip(tokens, mask)]

    def row_list(self, rows: Rows) -> list[int]:
        """Return rows, a slice or a list, as a list of row numbers."""
        if isinstance(rows, slice):
            return list(range(len(self.tokens))[rows])
        return rows

    def sequences(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return some rows padded on the right: (ids, mask, predicts), (rows, longest row) each.

        `predicts` is true at the positions whose next token is a response token.
        """
        prompts = torch.arange(len(self.tokens), device=self.mask.device)[rows] // self.group_size
        padded = torch.cat([self.prompt[prompts], self.tokens[rows]], 1)
        start = self.prompt_mask[prompts].sum(1, keepdim=True)
        end = start + self.mask[rows].sum(1, keepdim=True)
        place = torch.arange(int(end.max()), device=padded.device)
        attention = place < end
        source = place + self.prompt.shape[1] - start  # skip the padding on the left
        ids = padded.gather(1, source.clamp_max(padded.shape[1] - 1)) * attention
        predicts = (place >= start - 1) & (place < end - 1)
        return ids, attention, predicts

    def with_response_mask(self, cap: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return at most `cap` rows, spread evenly over the batch: (ids, attention, response mask).

        All three have the shape (rows, longest row).
        """
        total = len(self.tokens)
        count = min(cap, total)
        rows = [i * total // count for i in range(count)]
        ids, attention, predicts = self.sequences(rows)
        response = predicts.roll(1, 1)  # a token is one position right of the state predicting it
        return ids, attention, response


def pad_prompts(prompts: list, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return lists of ids as (ids, mask), (P, S) each, padded on the left with 0."""
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    starts = torch.tensor([[width - len(prompt)] for prompt in prompts])
    mask = torch.arange(width) >= starts
    return torch.tensor(ids, device=device), mask.to(device)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Return position ids that count real tokens only, so that left padding does not shift them.

    (rows, positions) -> (rows, positions).
    """
    count = attention_mask.long().cumsum(-1)
    return (count - 1).clamp_min(0)


# ---------------------------------------------------------------------------------------- decoding


def generate(
    model: nn.Module,
    prompts: list,
    group_size: int = 1,
    max_new_tokens: int = 32,
    eos_ids: Iterable[int] = (),
    temperature: Temperature = 1.0,
    vocab_size: int | None = None,
    uniform: Tensor | None = None,
    measure_entropy: bool = False,
) -> Rollout:
    """Draw `group_size` responses to each prompt and return them as a Rollout.

    prompts          lists of token ids, of any lengths
    eos_ids          every id that ends a response (see eos_ids_of)
    temperature      a number (0: greedy) or a rule; see Temperature
    vocab_size       ids from here on (a padded vocabulary) have probability 0
    uniform          the random numbers, (max_new_tokens, B) in [0, 1); default: new ones
    measure_entropy  measure entropies even if no rule needs them (this decoder always does)

    NonFinite if a logit is NaN or infinite.
    """
    device = model.get_input_embeddings().weight.device
    prompt, prompt_mask = pad_prompts(prompts, device)
    ids = prompt.repeat_interleave(group_size, 0)
    visible = prompt_mask.repeat_interleave(group_size, 0)
    position = position_ids(visible)
    if uniform is None:
        uniform = torch.rand(max_new_tokens, len(ids))
    ends = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    unfinished = torch.ones(len(ids), dtype=torch.bool, device=device)
    inputs = {"use_cache": True, cache_argument(type(model)): DynamicCache()}
    steps = []
    with rollout_mode(model):
        for t, draws in enumerate(uniform.to(device)):
            inputs |= {"attention_mask": visible, "position_ids": position}
            logits = model(ids, logits_to_keep=1, **inputs).logits[:, -1, :vocab_size]
            drawn = draw(logits.float(), temperature, draws, torch.full_like(ids[:, 0], t))
            if not bool(drawn.logp[unfinished].isfinite().all()):
                raise NonFinite(f"the model's logits are NaN or infinite at response position {t}")
            steps.append((unfinished, *drawn))
            # finished rows stay in the batch; their later tokens are masked out
            unfinished = unfinished & ~torch.isin(drawn.tokens, ends)
            if not bool(unfinished.any()):
                break
            ids = drawn.tokens[:, None]
            position = position[:, -1:] + 1
            visible = nn.functional.pad(visible, (0, 1), value=True)
    mask, *columns = [torch.stack(column, 1) for column in zip(*steps)]
    columns = [torch.where(mask, column, 0) for column in columns]
    drawn = dict(zip(Drawn._fields, columns))
    return Rollout(prompt=prompt, prompt_mask=prompt_mask, mask=mask, finished=~unfinished, **drawn)


@contextlib.contextmanager
def rollout_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients while open; restore its modes afterwards.

    In train mode, gradient checkpointing would turn the KV cache off.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


class Drawn(NamedTuple):
    """The tokens drawn in one decoding step, and the values recorded with them, (R,) each."""

    tokens: Tensor
    temperature: Tensor
    logp: Tensor  # at that temperature (greedy: at 1)
    entropy: Tensor  # of the raw logits, in nats; NaN where it was not measured


def draw(
    logits: Tensor,
    temperature: Temperature,
    uniform: Tensor,
    positions: Tensor | None = None,
) -> Drawn:
    """Draw one token per row from softmax(logits / T), (R, V), by inverting its CDF at `uniform`.

    uniform: (R,) in [0, 1). positions: (R,), each token's position in its response; default 0.
    """
    _, entropy = row_logprobs_and_entropy(logits, logits.argmax(-1))
    temperatures = temperature
    if callable(temperature):
        first = torch.zeros_like(entropy, dtype=torch.long)
        temperatures = temperature(entropy, first if positions is None else positions)
    temperatures = torch.zeros_like(entropy) + temperatures  # one per row
    if bool((temperatures == 0).all()):  # greedy: the distribution is a single token
        token = logits.argmax(-1)
    else:
        logits = logits / temperatures[:, None]
        token = invert_cdf(logits.softmax(-1), uniform)
    logp, _ = row_logprobs_and_entropy(logits, token)
    return Drawn(token, temperatures, logp, entropy)


def invert_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Return the smallest index whose cumulative probability exceeds `uniform`; (R, V), (R,)."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # rounding may raise the threshold to the total, where an id of probability 0 would be drawn
    below = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniform[:, None] * total, below)
    index = torch.searchsorted(cumulative, threshold, right=True)
    return index.squeeze(1).clamp_max(probs.shape[1] - 1)


def entropy_of(logits: Tensor) -> Tensor:
    """Return the entropy in nats of softmax(logits), (R, V) -> (R,). A logit may be -inf."""
    _, entropy = row_logprobs_and_entropy(logits, logits.argmax(-1))
    return entropy


class AdaptiveTemperature(LogitsProcessor):
    """Apply a temperature rule in transformers' own generate: divide each row's logits by it.

    rule = lambda entropies, positions: hapo.adaptive_temperature(entropies, stats)
    model.generate(..., do_sample=True, top_k=0, logits_processor=[AdaptiveTemperature(rule)])

    Positions count from the first token that `generate` draws. A batch that is not one token wider
    than the last one begins another generation. (Make a new processor for each generation, if a
    prompt may be exactly one token wider than the last sequence.)
    """

    def __init__(self, rule: Callable[[Tensor, Tensor], Tensor]):
        self.rule = rule
        self.prompt_width = self.last_width = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = input_ids.shape[1]
        if self.last_width is None or width != self.last_width + 1:
            self.prompt_width = width
        self.last_width = width
        logits = scores.float()
        positions = torch.full_like(input_ids[:, 0], width - self.prompt_width)
        temperatures = self.rule(entropy_of(logits), positions)
        return (logits / temperatures[:, None]).to(scores.dtype)


# ----------------------------------------------------------- properties of models and tokenizers


@functools.cache
def cache_argument(kind: type) -> str:
    """Return the name of the argument by which a class of models takes its KV cache.

    It is past_key_values, or cache since transformers 5.24, which will refuse the old name in 5.40.
    """
    forwards = [vars(k)["forward"] for k in kind.__mro__ if "forward" in vars(k)]
    known = {name for forward in forwards for name in inspect.signature(forward).parameters}
    return "cache" if "cache" in known else "past_key_values"


def vocabulary(tokenizer: object) -> int:
    """Return how many ids the tokenizer knows, from 0 on: one more than its largest.

    (Its length is less where there are holes.) Later ids only pad a model's embedding.
    """
    return max(tokenizer.get_vocab().values()) + 1


def eos_ids_of(model: nn.Module, tokenizer: object) -> list[int]:
    """Return every id that ends a response.

    They are the ids in generation_config, in config and in the tokenizer, and the token that the
    chat template puts after a response.
    """
    found = {end_of_turn(tokenizer)}
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [ids])
    return sorted(found - {None})


def end_of_turn(tokenizer: object) -> int | None:
    """Return the special token that the chat template puts after a response, if there is one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "xyz"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        return None  # the template takes no assistant message, so it has no end of one
    after = tokenizer(text.rpartition("xyz")[2], add_special_tokens=False).input_ids[:1]
    added = tokenizer.added_tokens_decoder
    return after[0] if after and after[0] in added and added[after[0]].special else None
