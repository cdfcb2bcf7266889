"""Drawing answers: a decoder of our own on any Hugging Face causal language model with a KV cache.

Every prompt runs through the model once; its keys and values are then repeated for its G answers.
Each step draws one token for every unfinished row from softmax(logits / T), and from nothing else:
no top-k, no top-p, no repetition penalty, whatever the model's generation_config says. T is a
number, or a function from the entropy of the step's raw logits to a temperature (HAPO's Eq. 8, for
example; this module does not know it). Rows that draw an end-of-sequence id leave the batch.

Here stand the plain steps: `repeat_cache`, `draw`, `drop_finished`. fast/decoding.py has the same
three without copies; `generate` takes those unless plain=True. Both draw the same tokens.

Shapes: P prompts, G answers each, B = P G rows (answers of a prompt adjacent), S prompt positions
(left-padded), T answer positions (right-padded), V vocabulary, R rows still in flight.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor

from fast import captured, cpu, decoding
from fast.decoding import Drawn
from fast.rows import product
from losses import row_logprobs_and_entropy
from program.errors import NonFinite
from program.models import cache_argument

Temperature = float | Callable[[Tensor], Tensor]  # T, or entropies (R,) -> temperatures (R,)
PREFILL_TOKENS = 2**15

# ----------------------------------------------------------------------------------------- answers


@dataclass(kw_only=True)
class Rollout:
    """A batch of answers. Masks come from lengths, never from token values."""

    prompt: Tensor  # (P, S) int64, left-padded
    prompt_mask: Tensor  # (P, S) bool
    tokens: Tensor  # (B, T) int64, 0 after the end
    mask: Tensor  # (B, T) bool, true up to and including the end-of-sequence token
    temperature: Tensor  # (B, T) what each token was drawn at, 0 after the end
    logp: Tensor  # (B, T) its log-probability under the distribution it was drawn from
    entropy: Tensor  # (B, T) of that step's raw logits, nats; NaN where nobody asked for it
    finished: Tensor  # (B,) bool, false where the length cap cut the answer

    @property
    def group_size(self) -> int:
        return len(self.tokens) // len(self.prompt)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    def answers(self) -> list[list[int]]:
        """The answers as lists of ids, end-of-sequence token included."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths.tolist())]

    def sequences(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Some rows as lines padded on the right: ids, mask, and where an answer token is next."""
        prompts = [r // self.group_size for r in rows]
        ids = torch.cat([self.prompt[prompts], self.tokens[rows]], 1)
        start = self.prompt_mask[prompts].sum(1, keepdim=True)
        end = start + self.mask[rows].sum(1, keepdim=True)
        place = torch.arange(int(end.max()), device=ids.device)
        shifted = place + self.prompt.shape[1] - start  # skips the padding on the left
        attention = place < end
        ids = ids.gather(1, shifted.clamp_max(ids.shape[1] - 1)) * attention
        return ids, attention, (place >= start - 1) & (place < end - 1)

    def with_response_mask(self, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """At most `most` answers spread over the batch: ids, attention and response mask."""
        count, total = min(most, len(self.tokens)), len(self.tokens)
        rows = [i * total // count for i in range(count)]
        ids, attention, predicts = self.sequences(rows)
        return ids, attention, predicts.roll(1, 1)  # a token stands right of what predicts it

    def select(self, groups: list[int]) -> "Rollout":
        """The rollout of some of its prompts, in that order."""
        rows = rows_of(groups, self.group_size)
        index = {f.name: groups if f.name.startswith("prompt") else rows for f in fields(self)}
        return Rollout(**{name: getattr(self, name)[of] for name, of in index.items()})

    def to(self, device: str | torch.device) -> "Rollout":
        """The rollout on another device."""
        return Rollout(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @staticmethod
    def join(parts: list["Rollout"]) -> "Rollout":
        """Several rollouts with the same G as one, padded to the longest."""
        joined = {}
        for f in fields(Rollout):
            tensors = [getattr(p, f.name) for p in parts]
            if tensors[0].dim() == 2:
                tensors = pad_to_longest(tensors, left=f.name.startswith("prompt"))
            joined[f.name] = torch.cat(tensors)
        return Rollout(**joined)

    @staticmethod
    def of_answers(
        prompts: list[list[int]], answers: list[list[int]], device: str = "cpu"
    ) -> "Rollout":
        """Finished answers, one to each prompt; temperature 0, log-probabilities unknown."""
        prompt, prompt_mask = pad_prompts(prompts, device)
        width = max(map(len, answers))
        tokens = torch.tensor([a + [0] * (width - len(a)) for a in answers], device=device)
        lengths = torch.tensor([len(a) for a in answers], device=device)
        blank = torch.zeros(tokens.shape, device=device)
        return Rollout(
            prompt=prompt,
            prompt_mask=prompt_mask,
            tokens=tokens,
            mask=torch.arange(width, device=device) < lengths[:, None],
            temperature=blank,
            logp=blank + torch.nan,
            entropy=blank + torch.nan,
            finished=torch.ones(len(answers), dtype=torch.bool, device=device),
        )


def rows_of(groups: list[int], group_size: int) -> list[int]:
    """The rows of some groups: G adjacent rows each."""
    return [p * group_size + g for p in groups for g in range(group_size)]


def pad_to_longest(tensors: list[Tensor], left: bool = False) -> list[Tensor]:
    """(n_i, T_i) tensors, all padded with 0 to the largest T."""
    width = max(t.shape[1] for t in tensors)
    gaps = [width - t.shape[1] for t in tensors]
    return [nn.functional.pad(t, (n, 0) if left else (0, n)) for t, n in zip(tensors, gaps)]


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only: a left-padded row sees those of an unpadded one."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def pad_prompts(prompts: list[list[int]], device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Lists of ids -> (P, S) ids and mask, padded on the left with 0; only the mask tells."""
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


# ---------------------------------------------------------------------------------------- decoding


def generate(
    model: nn.Module,
    prompts: list[list[int]],
    answers_per_prompt: int = 1,
    max_new_tokens: int = 32,
    eos_ids: Iterable[int] = (),
    temperature: Temperature = 1.0,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    measure_entropy: bool = False,
    plain: bool = False,
    capture: bool = True,
    decode_rows: int = 0,
    prefill_tokens: int = PREFILL_TOKENS,
) -> Rollout:
    """Draw `answers_per_prompt` answers to each prompt (lists of token ids, of any lengths).

    eos_ids          every id that ends an answer (see eos_ids_of)
    temperature      0 for greedy; see Temperature
    vocab_size       ids from here on (a padded vocabulary) have probability 0
    generator        on the CPU; or `uniform`: the random numbers, (max_new_tokens, B) in [0, 1)
    measure_entropy  record the entropy of every step, also where no temperature asks for it
    capture          on CUDA, replay steps as graphs (fast/captured.py), where the model allows it
    decode_rows      answers drawn together, whole groups; 0: all. What is left waits its turn
    prefill_tokens   prompt tokens that run through the model together, padding included
    """
    G, together = answers_per_prompt, len(prompts)
    if decode_rows:
        together = max(1, decode_rows // G)
    if uniform is None:
        uniform = torch.rand(max_new_tokens, len(prompts) * G, generator=generator)
    products = contextlib.nullcontext() if plain else cpu.few_rows(model, together * G)
    loop, parts = _loop_for(model, plain, capture), []
    device = model.get_input_embeddings().weight.device
    eos = torch.tensor(sorted(eos_ids), device=device, dtype=torch.long)
    size = (G, max_new_tokens, vocab_size)
    with rollout_mode(model), products:
        for i in range(0, len(prompts), together):
            prompt, prompt_mask = pad_prompts(prompts[i : i + together], device)
            draws = uniform[:, i * G : (i + together) * G].to(device)
            how = (temperature, draws, measure_entropy)
            prefilled = prefill(model, prompt, prompt_mask, prefill_tokens)
            kept = loop(model, prefilled, prompt_mask, eos, size, how)
            width = int(kept["mask"].sum(1).max())
            kept = {name: x[:, :width] if x.dim() == 2 else x for name, x in kept.items()}
            parts.append(Rollout(prompt=prompt, prompt_mask=prompt_mask, **kept))
    return parts[0] if len(parts) == 1 else Rollout.join(parts)


def _loop_for(model, plain, capture):
    """The plain loop, the same without copies, or its steps captured."""
    if plain:
        return functools.partial(_decode, (repeat_cache, draw, drop_finished))
    if capture and captured.why_not(model) is None:
        return functools.partial(_decode_captured, decoding.Draw())
    steps = (decoding.repeat_cache, decoding.Draw(), decoding.drop_finished)
    return functools.partial(_decode, steps)


def prefill(
    model: nn.Module, prompt: Tensor, prompt_mask: Tensor, tokens: int
) -> tuple[Tensor, DynamicCache]:
    """Each prompt once through the model, `tokens` at a time: the logits behind it, (P, V), and the
    cache of its keys and values. Without padding no mask is needed."""
    padded, position = not bool(prompt_mask.all()), position_ids(prompt_mask)
    logits, caches, together = [], [], max(1, tokens // prompt.shape[1])
    for i in range(0, len(prompt), together):
        rows, cache = slice(i, i + together), DynamicCache()
        mask = prompt_mask[rows] if padded else None
        logits.append(_next_logits(model, prompt[rows], mask, position[rows], cache))
        caches.append(cache)
    for layers in zip(*(cache.layers for cache in caches)) if len(caches) > 1 else ():
        layers[0].keys = torch.cat([layer.keys for layer in layers])
        layers[0].values = torch.cat([layer.values for layer in layers])
    return torch.cat(logits), caches[0]


def _decode(steps, model, prefilled, prompt_mask, eos, size, how):
    """The loop of `generate`; returns the tensors of the rollout by name."""
    (G, most, vocab_size), (temperature, uniform, measure_entropy) = size, how
    (repeat, draw_token, drop), (logits, cache) = steps, prefilled
    B, S, device = len(prompt_mask) * G, prompt_mask.shape[1], prompt_mask.device
    kept = {name: torch.zeros(B, most, device=device) for name in Drawn._fields[1:]}
    tokens = torch.zeros(B, most, dtype=torch.long, device=device)
    mask, finished = tokens.bool(), torch.zeros(B, dtype=torch.bool, device=device)

    logits = logits.repeat_interleave(G, 0)
    repeat(cache, G, most - 1)
    padded = not bool(prompt_mask.all())
    seen = torch.ones(B, S + most, dtype=torch.bool, device=device)
    seen[:, :S] = prompt_mask.repeat_interleave(G, 0)
    position = seen[:, :S].sum(1, keepdim=True)
    row = torch.arange(B, device=device)  # which row of the rollout each row in flight is

    for t in range(most):
        logits = logits[:, :vocab_size].float()
        drawn = draw_token(logits, temperature, uniform[t, row], measure_entropy)
        if not bool(drawn.logp.isfinite().all()):
            raise NonFinite(f"the model's logits are NaN or infinite at answer position {t}")
        token, tokens[row, t], mask[row, t] = drawn.token, drawn.token, True
        for name, table in kept.items():
            table[row, t] = getattr(drawn, name)
        ended = torch.isin(token, eos)
        finished[row] = ended
        if t + 1 == most or bool(ended.all()):
            break
        if bool(ended.any()):
            row, token, position, seen = drop(ended, cache, row, token, position, seen)
        visible = seen[:, : S + t + 1] if padded else None
        logits = _next_logits(model, token[:, None], visible, position, cache)
        position = position + 1
    return {"tokens": tokens, "mask": mask, "finished": finished, **kept}


def _decode_captured(draw_token, model, prefilled, prompt_mask, eos, size, how):
    """The same tokens, by steps that a GPU replays."""
    states = (*prefilled, prompt_mask, eos, size, how)
    return captured.decode(model, _next_logits, *states, draw_token)


def _next_logits(model, ids, mask, position, cache):
    """The logits behind the last of some new tokens, (R, V); keys and values join the cache."""
    where = dict(attention_mask=mask, position_ids=position, use_cache=True)
    where[cache_argument(type(model))] = cache
    if model.get_input_embeddings().weight.dtype != torch.float32:
        return _low_precision_logits(model, ids, where)
    return model(ids, logits_to_keep=1, **where).logits[:, -1]


def _low_precision_logits(model, ids, where):
    """A replica in bfloat16: the product that makes the logits keeps its float32 accumulator."""
    states = model.base_model(ids, **where).last_hidden_state[:, -1]
    return product(states, model.get_output_embeddings().weight, torch.float32)


@contextlib.contextmanager
def rollout_mode(model: nn.Module) -> Iterator[None]:
    """eval, no gradient, and no gradient checkpointing, which silently drops the KV cache."""
    modes = ("training", "gradient_checkpointing")
    before = [(m, n, getattr(m, n)) for m in model.modules() for n in modes if hasattr(m, n)]
    for m, name, _ in before:
        setattr(m, name, False)
    try:
        with torch.no_grad():
            yield
    finally:
        for m, name, value in before:
            setattr(m, name, value)


# -------------------------------------------------------------------------------- the plain steps


def repeat_cache(cache: DynamicCache, repeats: int, room: int) -> None:
    """Every row's keys and values `repeats` times. (`room` is for the version with buffers.)"""
    cache.batch_repeat_interleave(repeats)


def drop_finished(ended: Tensor, cache: DynamicCache, *per_row: Tensor) -> list[Tensor]:
    """Rows that ended leave the cache and each tensor of `per_row`."""
    keep = (~ended).nonzero().squeeze(1)
    cache.batch_select_indices(keep)
    return [x[keep] for x in per_row]


def draw(
    logits: Tensor, temperature: Temperature, uniform: Tensor, measure_entropy: bool = False
) -> Drawn:
    """One token a row from softmax(logits / T), (R, V): its inverse CDF at `uniform`, (R,) < 1."""
    asked = measure_entropy or callable(temperature)
    entropy = entropy_of(logits) if asked else torch.full_like(uniform, torch.nan)
    heat = temperature(entropy) if callable(temperature) else torch.full_like(uniform, temperature)
    if bool((heat == 0).all()):  # greedy: the distribution is a single token
        token = logits.argmax(-1)
    else:
        logits = logits / heat[:, None]
        token = invert_cdf(logits.softmax(-1), uniform)
    return Drawn(token, heat, row_logprobs_and_entropy(logits, token)[0], entropy)


def invert_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """The smallest index whose cumulative probability exceeds `uniform`; (R, V), (R,) -> (R,)."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # rounding may carry the threshold up to the total; below it, no id of probability 0 is drawn
    below = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniform[:, None] * total, below)
    index = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    return index.clamp_max(probs.shape[1] - 1)


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), (R, V) -> (R,). Logits of -inf have probability 0."""
    return row_logprobs_and_entropy(logits, logits.argmax(-1))[1]


class AdaptiveTemperature(LogitsProcessor):
    """The same rule for transformers' own generate: divides a row's logits by rule(their entropy).

    rule = lambda entropy: hapo.adaptive_temperature(entropy, stats)
    model.generate(..., do_sample=True, top_k=0, logits_processor=[AdaptiveTemperature(rule)])
    """

    def __init__(self, rule: Callable[[Tensor], Tensor]):
        self.rule = rule

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float()
        return (logits / self.rule(entropy_of(logits))[:, None]).to(scores.dtype)


def eos_ids_of(model: nn.Module, tokenizer: object) -> list[int]:
    """Every id that ends an answer: of generation_config, of config, and the tokenizer's own."""
    config, found = getattr(model.generation_config, "eos_token_id", None), set()
    for ids in (config, model.config.eos_token_id, tokenizer.eos_token_id):
        found.update(ids if isinstance(ids, (list, tuple)) else [ids])
    return sorted(found - {None})
