"""Decode fast: prefill each prompt once, drop finished rows, preallocate the KV cache.

`generate` has the signature of sampling.generate and draws the same tokens. Every prompt runs
through the model once; its keys and values are then repeated for its G responses. Rows that draw an
end-of-sequence id are removed from the batch. On CUDA the steps are replayed as graphs
(cuda_graphs.py). On a CPU they use matrix products that are fast for few rows (onednn.py).

Shapes: P prompts, G responses to each, B = P G rows, S prompt positions, T response positions, R
unfinished rows, V vocabulary.
"""

import torch
from transformers.cache_utils import DynamicLayer

from common.devices import to_device_async, widest_float_dtype
from engine import cuda_graphs, onednn, rows
from engine.decode_attention import packed_heads
from engine.forward import next_logits, prefill
from sampling import Drawn, NonFinite, Rollout, pad_prompts, rollout_mode

PREFILL_TOKENS = 2**15


def generate(
    model,
    prompts,
    group_size=1,
    max_new_tokens=32,
    eos_ids=(),
    temperature=1.0,
    vocab_size=None,
    uniform=None,
    measure_entropy=False,
    capture=True,
    decode_rows=0,
    prefill_tokens=PREFILL_TOKENS,
):
    """Draw responses and return them as a Rollout. The arguments of sampling.generate come first.

    capture         on CUDA, replay steps as graphs (cuda_graphs.py) if the model allows it
    decode_rows     responses decoded at a time, in whole groups; 0: all of them
    prefill_tokens  prompt tokens per prefill pass, padding included
    """
    G, device = group_size, model.get_input_embeddings().weight.device
    together = max(1, decode_rows // G) if decode_rows else len(prompts)
    if uniform is None:
        uniform = torch.rand(max_new_tokens, len(prompts) * G)
    ends = torch.zeros(len(model.get_input_embeddings().weight), dtype=torch.bool)
    ends[[i for i in eos_ids if i < len(ends)]] = True  # a table: isin would sort and wait
    ends, uniform = to_device_async(ends, device), to_device_async(uniform, device)
    captures = capture and cuda_graphs.why_not(model.config, device) is None
    loop = cuda_graphs.decode if captures else decode
    draw, tables = Draw(), []
    prompt, prompt_mask = pad_prompts(prompts, device)
    with rollout_mode(model), onednn.onednn_linear(model, together * G):
        for i in range(0, len(prompts), together):
            width = max(map(len, prompts[i : i + together]))
            ids, mask = (x[i : i + together, -width:] for x in (prompt, prompt_mask))
            logits, cache = prefill(model, ids, mask, prefill_tokens)
            draws = uniform[:, i * G : (i + together) * G]

            def draw_next(logits, t, row, draws=draws):
                logits = logits[:, :vocab_size].float()
                return draw(logits, temperature, draws[t, row], measure_entropy, t)

            with packed_heads(model):
                drawn = loop(model, logits, cache, mask, G, max_new_tokens, ends, draw_next)
            tables.append(drawn)
    table = {name: torch.cat([part[name] for part in tables]) for name in tables[0]}
    width = int(table["mask"].sum(1).max())
    cut = {name: x[:, :width] if x.dim() == 2 else x for name, x in table.items()}
    return Rollout(prompt=prompt, prompt_mask=prompt_mask, **cut)


def decode(model, logits, cache, prompt_mask, G, cap, ends, draw_next):
    """Decode after prefill: return the fields of a Rollout by name, `cap` tokens wide.

    logits (P, V) and cache come from prefill. `ends` (V,) is true for ids that end a response.
    draw_next(logits, t, row) draws token t of the rollout's rows `row`. NonFinite if a logit is NaN
    or infinite.
    """
    B, S, device = len(prompt_mask) * G, prompt_mask.shape[1], prompt_mask.device
    kept = {name: torch.zeros(B, cap, device=device) for name in Drawn._fields[1:]}
    tokens = torch.zeros(B, cap, dtype=torch.long, device=device)
    mask, finished = tokens.bool(), torch.zeros(B, dtype=torch.bool, device=device)

    logits = logits.repeat_interleave(G, 0)
    repeat_cache(cache, G, cap - 1)
    padded = not bool(prompt_mask.all())
    visible = torch.ones(B, S + cap, dtype=torch.bool, device=device)
    visible[:, :S] = prompt_mask.repeat_interleave(G, 0)
    position = visible[:, :S].sum(1, keepdim=True)
    row = torch.arange(B, device=device)  # the number in the rollout of each row being decoded

    for t in range(cap):
        drawn = draw_next(logits, t, row)
        if not bool(drawn.logp.isfinite().all()):
            raise NonFinite(f"the model's logits are NaN or infinite at response position {t}")
        token, tokens[row, t], mask[row, t] = drawn.tokens, drawn.tokens, True
        for name, table in kept.items():
            table[row, t] = getattr(drawn, name)
        ended = ends[token]
        finished[row] = ended
        if t + 1 == cap or bool(ended.all()):
            break
        if bool(ended.any()):
            row, token, position, visible = drop_finished(
                ended, cache, row, token, position, visible
            )
        mask_so_far = visible[:, : S + t + 1] if padded else None
        logits = next_logits(model, token[:, None], mask_so_far, position, cache)
        position = position + 1
    return {"tokens": tokens, "mask": mask, "finished": finished, **kept}


class _KeysAndValues(DynamicLayer):
    """One layer's keys and values, in buffers of their final length; a step writes one token."""

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
        """Compact the cache: move rows `movers` into rows `holes`, keep the first `count` rows."""
        self.buffers = [b.index_copy_(0, holes, b[movers])[:count] for b in self.buffers]
        self._show()


def repeat_cache(cache, repeats, room):
    """Repeat each row's keys and values `repeats` times, in buffers with `room` more positions."""
    cache.layers = [_KeysAndValues(x.keys, x.values, repeats, room) for x in cache.layers]


def drop_finished(ended, cache, *per_row):
    """Remove the rows that ended from the cache; return the tensors `per_row` without them.

    Unfinished rows from the end take the places of ended ones, so at most as many cache rows are
    copied as have ended.
    """
    keep = (~ended).nonzero().squeeze(1)
    count = len(keep)
    holes, movers = ended[:count].nonzero().squeeze(1), keep[keep >= count]
    for layer in cache.layers:
        layer.fill_holes(holes, movers, count)
    order = torch.arange(count, device=ended.device)
    order[holes] = movers
    return [x[order] for x in per_row]


class Draw:
    """`sampling.draw` with two buffers that all steps of a rollout reuse.

    `position` is the token's position in the response: a number, or a tensor (1,) that a recorded
    graph increments.
    """

    def __init__(self):
        self.buffers = None

    def __call__(self, logits, temperature, uniform, measure_entropy=False, position=0):
        if self.buffers is None:
            self.buffers = torch.empty_like(logits), torch.empty_like(logits)
        z, work = (b[: len(logits)] for b in self.buffers)
        entropy, adaptive = torch.full_like(uniform, torch.nan), callable(temperature)
        if adaptive or measure_entropy or temperature == 0:
            top = rows.likeliest(logits)
            logits = torch.sub(logits, logits.gather(-1, top), out=z)
            logp, entropy_of_all, _ = rows.scores(z, top, top.squeeze(-1), work)
            if adaptive or measure_entropy:
                entropy = entropy_of_all
        if adaptive:
            positions = torch.zeros_like(entropy, dtype=torch.long) + position
            temperatures = temperature(entropy, positions)
        else:
            temperatures = torch.full_like(uniform, temperature)
        if not adaptive and temperature == 0:  # greedy: the distribution is a single token
            return Drawn(top.squeeze(-1), temperatures, logp, entropy)
        if adaptive or temperature != 1:
            logits = torch.div(logits, temperatures[:, None], out=z)
        token, share, rest = index_and_shares(torch.softmax(logits, -1, out=work), uniform)
        # log p from the sum of the other ids, not from 1 - p: exact for p near 1, too
        logp = -torch.log1p(rest.to(widest_float_dtype(rest.device)) / share).to(share.dtype)
        return Drawn(token, temperatures, logp, entropy)


def index_and_shares(probs, uniform):
    """Return (index, its share, the sum of all other shares): (R, V), (R,) -> three (R,).

    The index is sampling.invert_cdf's: the smallest whose cumulative share exceeds `uniform`.

    The search has two levels: first over blocks of about sqrt(V) ids, then inside the block found.
    This takes two short cumulative sums instead of one over the whole vocabulary. torch.multinomial
    is not used, since it draws V random numbers per row.
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
    share = weights.gather(1, offset)
    others = weights.scatter(1, offset, 0.0).sum(-1) + sums.scatter(1, chosen, 0.0).sum(-1)
    index = (chosen * block + offset).clamp_max(size - 1)
    return index.squeeze(1), share.squeeze(1), others


def _first_above(weights, threshold):
    """Return the first index whose cumulative weight exceeds the threshold, and the remainder.

    The remainder is the threshold minus the weight before that index. Both are (R, 1).
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # rounding may raise the threshold to the total, where an index of weight 0 would be chosen
    threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, threshold, right=True).clamp_max(weights.shape[1] - 1)
    return index, (threshold - (cumulative - weights).gather(1, index)).clamp_min(0)
