"""Pack sequences: responses follow their prompt in shared rows, which avoids most padding.

This module lays out some rows of a sampling.Rollout for one forward pass. A *segment* is a prompt
and some of its responses. A packed row ("line" in the code) holds as many segments as fit its
width. The plain layout, one response per row, is internals.unpacked.

    ids        p0 p1 a0 a1 b0 q0 q1 c0 c1 c2    prompt p with two responses, prompt q with one;
    positions   0  1  2  3  2  0  1  2  3  4    the last token of a response predicts nothing and
    owner       p  p  a  a  b  q  q  c  c  c    is omitted

A token attends to earlier tokens of its prompt and of its own response. In this example the
predecessors of response a's three tokens are p1, a0 and a1.
"""

from typing import NamedTuple

import torch

from common.attention import takes_any_mask
from common.devices import to_device_async
from internals import PackedBatch, unpacked

LONGEST_ROW = 1024  # tokens of a packed row; limits the mask, whose size is its square
STEPS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8)  # widths to try, as multiples of the smallest one


class Segment(NamedTuple):
    """A prompt and some of its responses, which stand together in a packed row."""

    size: int  # tokens of the prompt and of these responses in the packed row
    prompt: int  # number of the prompt
    rows: list  # numbers of the responses


class Packer:
    """Lays out responses in shared rows.

    It keeps the layouts of the last rollout, since scoring and updating need the same ones.
    """

    def __init__(self, config):
        self.config, self.rollout = config, None

    def packs(self, rollout, rows):
        """Return whether all of these responses can be packed: the model allows it, none too long.

        pack may still give one response per row, where this costs less.
        """
        longest = int(rollout.lengths[rows].max()) + rollout.prompt.shape[1]
        return takes_any_mask(self.config) and longest <= LONGEST_ROW

    def pack(self, rollout, rows):
        """Return the PackedBatch of some rows of a rollout."""
        if self.rollout is not rollout:
            self.rollout, self.known = rollout, {}
            self.lengths = rollout.lengths.tolist()
            self.prompts = rollout.prompt_mask.sum(1).tolist()
        rows = rollout.row_list(rows)
        key = tuple(rows)
        if key not in self.known:
            sizes = (self.lengths, self.prompts)
            packing = choose_packing(self.config, rows, *sizes, rollout.group_size)
            if packing:
                self.known[key] = laid_out(rollout, rows, *packing, *sizes)
            else:
                self.known[key] = unpacked(rollout, rows)
        packed = self.known[key]
        if isinstance(packed.mask, tuple):  # build the mask for each pass: it is too large to keep
            packed = packed._replace(mask=visible(*packed.mask))
        return packed


def choose_packing(config, rows, lengths, prompts, G):
    """Return (lists of Segments, one per packed row; width), or None if packing does not pay.

    lengths: tokens of each response; prompts: tokens of each prompt. In a layer, a token costs
    about 24 D^2 operations in matrix products and 4 D in attention for each token of its packed
    row, masked ones included: W (6 D + W) for a row of width W. With one response per row and
    causal attention, it is W (6 D + W / 2).
    """
    least = max(prompts[row // G] + lengths[row] - 1 for row in rows)
    if least > LONGEST_ROW or not takes_any_mask(config):
        return None
    D = config.hidden_size
    widths = sorted({min(round(least * step), LONGEST_ROW) for step in STEPS})
    tried = []
    for width in widths:
        lines = fill(segments(rows, lengths, prompts, G, width), width)
        used = max(sum(segment.size for segment in line) for line in lines)
        tried.append((lines, used))
    best = min(tried, key=lambda packing: cost(packing, D))
    alone = max(prompts[row // G] for row in rows) + max(lengths[row] for row in rows) - 1
    return best if cost(best, D) < len(rows) * alone * (6 * D + alone / 2) else None


def cost(packing, D):
    lines, width = packing
    return len(lines) * width * (6 * D + width)


def segments(rows, lengths, prompts, G, width):
    """Return the Segments of all prompts, split so that none is longer than `width` tokens."""
    groups, found = {}, []
    for row in rows:
        groups.setdefault(row // G, []).append(row)
    for p, own in groups.items():
        size, some = prompts[p], []
        for row in sorted(own, key=lambda row: -lengths[row]):
            if some and size + lengths[row] - 1 > width:
                found.append(Segment(size, p, some))
                size, some = prompts[p], []
            size += lengths[row] - 1
            some.append(row)
        found.append(Segment(size, p, some))
    return found


def fill(segments, width):
    """Return packed rows, lists of segments: first fit, in order of decreasing size."""
    lines, used = [], []
    for segment in sorted(segments, key=lambda segment: -segment.size):
        for i, n in enumerate(used):
            if n + segment.size <= width:
                lines[i].append(segment)
                used[i] += segment.size
                break
        else:
            lines.append([segment])
            used.append(segment.size)
    return lines


def laid_out(rollout, rows, lines, width, lengths, prompts):
    """Return the PackedBatch of a packing, with the arguments of `visible` in place of the mask."""
    padded, T = rollout.prompt.shape[1], rollout.tokens.shape[1]
    # of each prompt and response: destination, tokens, source, first position, segment, owner
    pieces, starts, behind = [], {}, {}
    for i, line in enumerate(lines):
        at = i * width
        for number, segment in enumerate(line):
            p, S = segment.prompt, prompts[segment.prompt]
            pieces.append((at, S, p * padded + padded - S, 0, number, -1))
            last, at = at + S - 1, at + S
            for row in segment.rows:
                n = lengths[row] - 1
                source = rollout.prompt.numel() + row * T
                pieces.append((at, n, source, S, number, len(behind)))
                starts[row], behind[row] = at, last
                at += n
    dest, count, source, first, segment, owner = torch.tensor(pieces).T
    which, place = spans(count)
    filled = dest[which] + place
    columns = torch.stack(
        [source[which] + place, first[which] + place, segment[which], owner[which]]
    )
    table = torch.zeros(4, len(lines) * width, dtype=torch.long)
    table[2:] = -2  # padding attends only to itself
    table[:, filled] = columns
    real = torch.zeros(len(lines) * width, dtype=torch.bool)
    real[filled] = True

    own = torch.tensor([lengths[row] for row in rows])
    which, place = spans(own)
    start = torch.tensor([starts[row] for row in rows])[which]
    before = torch.tensor([behind[row] for row in rows])[which]
    predecessors = torch.where(place == 0, before, start + place - 1)
    token = torch.tensor(rows)[which] * T + place

    device = rollout.tokens.device
    table, real, places = (
        to_device_async(x, device) for x in (table, real, torch.stack([predecessors, token]))
    )
    source, positions, segment, owner = table.view(4, len(lines), width)
    held = torch.cat([rollout.prompt.flatten(), rollout.tokens.flatten()])
    ids = held[source] * real.view_as(source)
    return PackedBatch(
        ids, (segment, owner), positions, places[0], rollout.tokens.flatten()[places[1]]
    )


def visible(segment, owner):
    """Return the attention mask, (packed rows, 1, width, width).

    A token attends to earlier tokens of its prompt (owner -1) and of its own response.
    """
    width = segment.shape[1]
    before = torch.ones(width, width, dtype=torch.bool, device=segment.device).tril()
    same_prompt = segment[:, :, None] == segment[:, None, :]
    shared = owner[:, None, :] == -1
    own = owner[:, :, None] == owner[:, None, :]
    padding = torch.eye(width, dtype=torch.bool, device=segment.device) & (owner == -2)[:, None, :]
    return ((before & same_prompt & (shared | own) & (owner != -2)[:, None, :]) | padding)[:, None]


def spans(count):
    """Return (which, place): for counts of 3 and 2, they are 0 0 0 1 1 and 0 1 2 0 1."""
    which = torch.repeat_interleave(torch.arange(len(count)), count)
    before = count.cumsum(0) - count
    return which, torch.arange(len(which)) - before[which]
