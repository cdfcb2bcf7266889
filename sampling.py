"""Drawing answers: a decoder of our own on any Hugging Face causal language model with a KV cache.

Every prompt runs through the model once; its keys and values are then repeated for the G answers. Each step draws one
token for every unfinished row by inverting the cumulative distribution of softmax(logits / T) — nothing else: no top-k, no
top-p, no repetition penalty, whatever the model's generation_config says. T is a number, or a function that gets
the entropy of the step's raw logits and returns one temperature a row (HAPO's Eq. 8, for example; this module does
not know it). A row that draws an end-of-sequence id is dropped from the batch, so short answers cost nothing more.

Shapes: P prompts, G answers each, B = P G rows (answers of a prompt adjacent), S prompt positions (left-padded), T answer
positions (right-padded), V vocabulary.
"""

import contextlib

import torch
from transformers import DynamicCache, LogitsProcessor
from transformers.cache_utils import DynamicLayer

from scale.cpu import few_rows
from scale.rollout import Rollout, pad_prompts, position_ids


class NonFinite(ArithmeticError):
    """A NaN or an infinity where a number must be, in logits for example: no distribution can be drawn from them."""


@contextlib.contextmanager
def rollout_mode(model, rows):
    """eval, no gradient, gradient checkpointing off (it silently drops the KV cache); all restored afterwards. `rows`: decoded together."""
    training = [(m, m.training) for m in model.modules()]
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    model.eval()
    for m in checkpointed:
        m.gradient_checkpointing = False
    try:
        with torch.no_grad(), few_rows(model, rows):
            yield
    finally:
        for m in checkpointed:
            m.gradient_checkpointing = True
        for m, flag in training:
            m.training = flag


class _KeysAndValues(DynamicLayer):
    """One layer's keys and values in a buffer of their final length: a step writes its token, nothing is copied."""

    def __init__(self, keys, values, repeats, room):
        super().__init__()
        self.filled, self.is_initialized = keys.shape[-2], True
        self.buffers = [self._buffer(x, repeats, room) for x in (keys, values)]
        self._show()

    @staticmethod
    def _buffer(x, repeats, room):
        rows, heads, length, size = x.shape
        buffer = x.new_empty(rows * repeats, heads, length + room, size)
        buffer[:, :, :length] = x.repeat_interleave(repeats, 0)
        return buffer

    def _show(self):
        self.keys, self.values = (b[:, :, : self.filled] for b in self.buffers)

    def update(self, keys, values, *args, **kwargs):
        end = self.filled + keys.shape[-2]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, self.filled : end] = new
        self.filled = end
        self._show()
        return self.keys, self.values

    def fill_holes(self, holes, movers, count):
        """Rows `movers` move into `holes`, then only the first `count` rows live on: copies as many rows as ended."""
        self.buffers = [b.index_copy_(0, holes, b[movers])[:count] for b in self.buffers]
        self._show()


def generate(model, prompts, answers_per_prompt=1, max_new_tokens=32, eos_ids=(), temperature=1.0, vocab_size=None, generator=None, uniform=None):
    """Draw `answers_per_prompt` answers to each prompt; returns a Rollout.

    prompts      lists of token ids, of any lengths
    eos_ids      every id that ends an answer (see eos_ids_of)
    temperature  a number; 0 for greedy decoding; or a callable, entropy (rows,) in nats -> temperature (rows,)
    vocab_size   ids from here on (a padded vocabulary) have probability 0
    generator    a CPU torch.Generator; the draws of a row do not depend on when other rows finish
    uniform      instead of a generator: the random numbers themselves, (max_new_tokens, B) in [0, 1)
    """
    rows = len(prompts) * answers_per_prompt
    with rollout_mode(model, rows):
        device = model.get_input_embeddings().weight.device
        prompt, prompt_mask = pad_prompts(prompts, device)
        uniform = (torch.rand(max_new_tokens, rows, generator=generator) if uniform is None else uniform).to(device)
        eos = torch.tensor(sorted(eos_ids), device=device, dtype=torch.long)

        tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
        heat, logp, entropy = (torch.zeros(rows, max_new_tokens, device=device) for _ in range(3))
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)

        # Prefill: each prompt once. Then its state is repeated for its G answers, with room for the new tokens.
        padded = not bool(prompt_mask.all())
        cache = DynamicCache()  # whole, for layers with a sliding window too: their mask does the sliding
        out = model(prompt, attention_mask=prompt_mask if padded else None, position_ids=position_ids(prompt_mask),
                    past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.layers = [_KeysAndValues(x.keys, x.values, answers_per_prompt, max_new_tokens - 1) for x in cache.layers]
        logits = out.logits[:, -1].repeat_interleave(answers_per_prompt, 0)
        seen = torch.ones(rows, prompt.shape[1] + max_new_tokens, dtype=torch.bool, device=device)
        seen[:, : prompt.shape[1]] = prompt_mask.repeat_interleave(answers_per_prompt, 0)
        position = seen[:, : prompt.shape[1]].sum(1, keepdim=True)
        alive = torch.arange(rows, device=device)  # which row of the rollout each row of the batch is
        buffer = None

        for t in range(max_new_tokens):
            logits = logits[:, :vocab_size].float()
            buffer = torch.empty_like(logits) if buffer is None else buffer[: len(logits)]
            token, drawn = draw(logits, temperature, uniform[t, alive], buffer)
            if not bool(drawn[1].isfinite().all()):
                raise NonFinite(f"the model's logits are NaN or infinite at answer position {t}")
            tokens[alive, t] = token
            for kept, value in zip((heat, logp, entropy), drawn):
                kept[alive, t] = value
            lengths[alive] = t + 1
            ended = torch.isin(token, eos)
            finished[alive] = ended
            if t + 1 == max_new_tokens:
                break
            if bool(ended.any()):
                keep = (~ended).nonzero().squeeze(1)
                count = len(keep)
                if count == 0:
                    break
                # live rows behind position `count` fill the holes in front of it
                holes, movers = ended[:count].nonzero().squeeze(1), keep[keep >= count]
                for layer in cache.layers:
                    layer.fill_holes(holes, movers, count)
                order = torch.arange(count, device=device)
                order[holes] = movers
                alive, token, position, seen = alive[order], token[order], position[order], seen[order]
            out = model(token[:, None], attention_mask=seen[:, : prompt.shape[1] + t + 1] if padded else None,
                        position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits, position = out.logits[:, -1], position + 1

        width = int(lengths.max())
        mask = torch.arange(width, device=device) < lengths[:, None]
        return Rollout(prompt, prompt_mask, tokens[:, :width], mask, heat[:, :width], logp[:, :width], entropy[:, :width], finished)


def draw(logits, temperature, uniform, buffer=None):
    """One token a row from softmax(logits / T), by inverting the cumulative distribution at `uniform` in [0, 1).

    logits (rows, V), uniform (rows,). Returns token (rows,) and (T, log-probability, entropy), each (rows,).
    buffer: room for (rows, V) numbers; a decoder that brings the same one to every step need not allocate it again.
    """
    buffer = torch.empty_like(logits) if buffer is None else buffer
    entropy = torch.full_like(uniform, torch.nan)
    if callable(temperature):
        entropy = entropy_of(logits, buffer)
        heat = temperature(entropy)
        logits = torch.div(logits, heat[:, None], out=buffer)
    else:
        heat = torch.full_like(uniform, temperature)
        if temperature == 0:  # greedy: the distribution is a single token
            token = logits.argmax(-1)
            return token, (heat, logits.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1), entropy)
        if temperature != 1:
            logits = torch.div(logits, temperature, out=buffer)
    probs = torch.softmax(logits, -1, out=buffer)
    token = invert_cdf(probs, uniform)
    return token, (heat, probs.gather(-1, token[:, None]).squeeze(-1).log(), entropy)


def invert_cdf(probs, uniform):
    """The smallest index whose cumulative probability exceeds `uniform`; (rows, V), (rows,) -> (rows,).

    In two levels, blocks of about sqrt(V) and then inside the block drawn: two short cumulative sums instead of one
    as long as the vocabulary, and no multinomial, which draws V random numbers a row.
    """
    rows, size = probs.shape
    block = max(1, round(size**0.5))
    whole = size // block * block
    sums = probs[:, :whole].unflatten(1, (-1, block)).sum(-1)
    if whole < size:
        sums = torch.cat([sums, probs[:, whole:].sum(-1, keepdim=True)], 1)
    chosen, rest = _first_above(sums, uniform[:, None] * sums.sum(-1, keepdim=True))
    inside = chosen * block + torch.arange(block, device=probs.device)
    weights = probs.gather(1, inside.clamp_max(size - 1)).masked_fill(inside >= size, 0.0)
    offset, _ = _first_above(weights, rest)
    return (chosen * block + offset).squeeze(1).clamp_max(size - 1)


def _first_above(weights, threshold):
    """First index whose cumulative weight exceeds the threshold, and what of the threshold is left; both (rows, 1)."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # rounding may carry the threshold up to the total; kept below it, an index of weight 0 is never chosen
    threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, threshold, right=True).clamp_max(weights.shape[1] - 1)
    return index, (threshold - (cumulative - weights).gather(1, index)).clamp_min(0)


def entropy_of(logits, buffer=None):
    """Entropy in nats of softmax(logits), (rows, V) -> (rows,). Logits of -inf have probability 0."""
    probs = torch.softmax(logits, -1, out=buffer)
    # H = log Z - E[logit], and the likeliest token says log Z = max logit - log max p
    log_z = logits.amax(-1) - probs.amax(-1).log()
    mean = probs.mul_(logits).sum(-1)
    if not bool(mean.isfinite().all()):  # a masked id: keep 0 * -inf out of the mean
        mean = torch.linalg.vecdot(logits.softmax(-1), logits.clamp_min(torch.finfo(logits.dtype).min))
    return (log_z - mean).clamp_min(0)


class AdaptiveTemperature(LogitsProcessor):
    """The same rule for transformers' own generate: divides each row's logits by rule(entropy of that row's logits).

        rule = lambda entropy: hapo.adaptive_temperature(entropy, stats)
        model.generate(..., do_sample=True, top_k=0, logits_processor=[AdaptiveTemperature(rule)])
    """

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, input_ids, scores):
        logits = scores.float()
        return (logits / self.rule(entropy_of(logits))[:, None]).to(scores.dtype)


def eos_ids_of(model, tokenizer):
    """Every id that ends an answer: those of the model's generation_config and config, and the tokenizer's own."""
    found = set()
    for ids in (getattr(model.generation_config, "eos_token_id", None), model.config.eos_token_id, tokenizer.eos_token_id):
        found.update(ids if isinstance(ids, (list, tuple)) else [ids])
    return sorted(found - {None})
