"""Short answers to one prompt share a line with it: the prompt is computed once for all of them.

The layout of some rows of a sampling.Rollout for one forward pass, and when it pays. The plain
layout, one line an answer, is internals.one_line_each.
"""

import math
from collections import Counter

import torch

from internals import Lines, one_line_each

LONGEST_LINE = 1024  # tokens: masks stay small


def layout_for(config):
    """The layout to score with: (rollout, rows) -> Lines."""

    def layout(rollout, rows):
        per_line = answers_to_a_line(config, rollout, rows)
        if per_line == 1:
            return one_line_each(rollout, rows)
        return shared_lines(rollout, rows, per_line)

    return layout


def answers_to_a_line(config, rollout, rows):
    """How many answers share a line with their prompt in a pass over `rows`; 1: none do."""
    if not takes_any_mask(config):
        return 1
    prompt, answer = rollout.prompt.shape[1], int(rollout.lengths[rows].max())
    counts = Counter(row // rollout.group_size for row in rows).values()
    return cheapest_share(counts, prompt, answer, config.hidden_size)


def cheapest_share(counts, S, T, D):
    """How many answers of up to T tokens share a line with their prompt of S tokens.

    With k answers to a line, an answer's part of it is S / k + T tokens. Each of them costs about
    24 D^2 operations in the matrices of a layer, and 4 D in its attention for each of the S + k T
    tokens of the line, hidden ones too. The cost is in proportion to

        (S / k + T) (6 D + S + k T),    least at    k = sqrt(S (6 D + S)) / T

    counts: how many answers each prompt has in this pass. Where lines would stay so empty that they
    hold more tokens than lines of their own, no answers share any.
    """
    best = min(round((S * (6 * D + S)) ** 0.5 / T), (LONGEST_LINE - S) // T, max(counts))
    if best < 2:
        return 1
    # no more lines than with `best`, equally full
    per_line = math.ceil(max(counts) / math.ceil(max(counts) / best))
    shared = sum(math.ceil(n / per_line) for n in counts) * (S + per_line * T)
    return per_line if shared < sum(counts) * (S + T) else 1


def takes_any_mask(config):
    """PyTorch's attention applies whatever mask it is given; other kinds build their own, and
    windows slide on theirs."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = kinds != {"full_attention"} or getattr(config, "sliding_window", None)
    return config._attn_implementation == "sdpa" and not windowed


def shared_lines(rollout, rows, per_line):
    """Some rows as lines of a prompt and up to `per_line` of its answers, one behind the other,
    none of which sees another.

        ids        p0 p1 p2 a0 a1 b0 b1    prompt p with two answers of three tokens,
        positions   0  1  2  3  4  3  4    whose last, a2 and b2, predict nothing and stay out

    The attention mask is (lines, 1, width, width); the predecessors are here p2 a0 a1 p2 b0 b1.
    """
    prompts, line, place = _places(rollout, rows, per_line)
    device, mask = rollout.tokens.device, rollout.mask[rows]
    width, length = rollout.prompt.shape[1], rollout.prompt_mask[prompts].sum(1, keepdim=True)
    S, T = int(length.max()), int(mask.sum(1).max()) - 1
    in_prompt, in_answer = torch.arange(S, device=device), torch.arange(T, device=device)
    unpadded = (in_prompt + width - length).clamp_max(width - 1)
    prompt = rollout.prompt[prompts].gather(1, unpadded)  # padded on the right
    answers = prompt.new_zeros(len(prompts), per_line, T)
    answers[line, place] = rollout.tokens[rows][:, :T]
    ids = torch.cat([prompt, answers.flatten(1)], 1)
    behind = (length + in_answer).repeat(1, per_line)
    positions = torch.cat([in_prompt.expand(len(prompts), -1), behind], 1)

    # a token sees what stands before it, of its prompt and of its own answer
    answer_of = torch.arange(per_line, device=device).repeat_interleave(T)
    owner = torch.cat([torch.full_like(in_prompt, -1), answer_of])
    before = torch.ones(len(owner), len(owner), dtype=torch.bool, device=device).tril()
    visible = before & ((owner == -1) | (owner == owner[:, None]))
    padding = torch.nn.functional.pad(in_prompt >= length, (0, per_line * T))
    last = torch.cat([length[line] - 1, S + place[:, None] * T + in_answer], 1)
    predecessors = line[:, None] * len(owner) + last
    visible = visible & ~padding[:, None, None]
    return Lines(ids, visible, positions, predecessors[mask[:, : T + 1]])


def _places(rollout, rows, per_line):
    """The prompt of each line; and for each row its line and its place behind the prompt."""
    count, lines, line, place = Counter(), {}, [], []
    for row in rows:
        p = row // rollout.group_size
        line.append(lines.setdefault((p, count[p] // per_line), len(lines)))
        place.append(count[p] % per_line)
        count[p] += 1
    line, place = torch.tensor([line, place], device=rollout.tokens.device)
    return [p for p, _ in lines], line, place
