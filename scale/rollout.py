"""A batch of answers, and how it is laid out for the model: plain lines, lines that answers share, micro-batches.

Shapes: P prompts, G answers each, B = P G rows (answers of a prompt adjacent), S prompt positions (left-padded), T answer
positions (right-padded). Masks come from lengths, never from token values.
"""

from collections import Counter
from dataclasses import dataclass, fields

import torch


@dataclass
class Rollout:
    """Everything that crosses from sampling to learning. Masks come from lengths, never from token values."""

    prompt: torch.Tensor  # (P, S) int64, left-padded
    prompt_mask: torch.Tensor  # (P, S) bool
    tokens: torch.Tensor  # (B, T) int64, 0 after the end
    mask: torch.Tensor  # (B, T) bool, true up to and including the end-of-sequence token
    temperature: torch.Tensor  # (B, T) the temperature each token was drawn at, 0 after the end
    logp: torch.Tensor  # (B, T) its log-probability under the distribution it was drawn from
    entropy: torch.Tensor  # (B, T) entropy of that step's raw logits in nats (NaN where no temperature rule asked for it)
    finished: torch.Tensor  # (B,) bool, false where the length cap cut the answer

    @staticmethod
    def of_answers(prompts, answers, device="cpu"):
        """Finished answers (lists of ids, one to each prompt) as a rollout; temperature 0, log-probabilities unknown."""
        prompt, prompt_mask = pad_prompts(prompts, device)
        width = max(map(len, answers))
        tokens = torch.tensor([a + [0] * (width - len(a)) for a in answers], device=device)
        mask = torch.tensor([[True] * len(a) + [False] * (width - len(a)) for a in answers], device=device)
        blank = torch.zeros(tokens.shape, device=device)
        return Rollout(prompt, prompt_mask, tokens, mask, blank, blank + torch.nan, blank + torch.nan, torch.ones(len(answers), dtype=torch.bool, device=device))

    @property
    def group_size(self):
        return len(self.tokens) // len(self.prompt)

    @property
    def lengths(self):
        return self.mask.sum(1)

    def sequences(self, rows):
        """Prompt and answer in one line for some rows, padded on the right alone: three tensors (rows, width).

        ids, attention mask, and `predicts`: true at each state whose successor is an answer token, row by row in the order
        of `mask`. A causal model never looks to the right, so such rows need no attention mask and ordinary positions.
        """
        prompts = [r // self.group_size for r in rows]
        ids = torch.cat([self.prompt[prompts], self.tokens[rows]], 1)
        start, answer = self.prompt_mask[prompts].sum(1, keepdim=True), self.mask[rows].sum(1, keepdim=True)
        place = torch.arange(int((start + answer).max()), device=ids.device)
        shifted = (place + self.prompt.shape[1] - start).clamp_max(ids.shape[1] - 1)  # over the padding on the left
        attention = place < start + answer
        return ids.gather(1, shifted) * attention, attention, (place >= start - 1) & (place < start + answer - 1)

    def shared_lines(self, rows, per_line):
        """Some rows as lines of a prompt and up to `per_line` of its answers, one behind the other, none of which sees another.

            ids        p0 p1 p2 a0 a1 b0 b1    prompt p with two answers of three tokens,
            positions   0  1  2  3  4  3  4    whose last, a2 and b2, predict nothing and stay out

        Returns ids and positions (lines, width), the attention mask (lines, 1, width, width), and where in the flattened lines the
        predecessor of each answer token stands, (N,) in the order of `mask`: here p2 a0 a1 p2 b0 b1.
        """
        # which line each row is in, and at which place behind the prompt
        count, lines, line, place = Counter(), {}, [], []
        for row in rows:
            p = row // self.group_size
            line.append(lines.setdefault((p, count[p] // per_line), len(lines)))
            place.append(count[p] % per_line)
            count[p] += 1
        device, mask = self.tokens.device, self.mask[rows]
        line, place = torch.tensor([line, place], device=device)

        prompts, width = [p for p, _ in lines], self.prompt.shape[1]
        length = self.prompt_mask[prompts].sum(1, keepdim=True)
        S, T = int(length.max()), int(mask.sum(1).max()) - 1
        in_prompt, in_answer = torch.arange(S, device=device), torch.arange(T, device=device)
        prompt = self.prompt[prompts].gather(1, (in_prompt + width - length).clamp_max(width - 1))  # padded on the right
        answers = prompt.new_zeros(len(lines), per_line, T)
        answers[line, place] = self.tokens[rows][:, :T]
        ids = torch.cat([prompt, answers.flatten(1)], 1)
        positions = torch.cat([in_prompt.expand(len(lines), -1), (length + in_answer).repeat(1, per_line)], 1)

        # a token sees what stands before it, of its prompt and of its own answer
        owner = torch.cat([torch.full_like(in_prompt, -1), torch.arange(per_line, device=device).repeat_interleave(T)])
        before = torch.ones(len(owner), len(owner), dtype=torch.bool, device=device).tril()
        visible = before & ((owner == -1) | (owner == owner[:, None]))
        padding = torch.nn.functional.pad(in_prompt >= length, (0, per_line * T))
        predecessors = line[:, None] * len(owner) + torch.cat([length[line] - 1, S + place[:, None] * T + in_answer], 1)
        return ids, positions, visible & ~padding[:, None, None], predecessors[mask[:, : T + 1]]

    def micro_batches(self, rows, sequences=0, tokens=0):
        """Cut rows into lists of at most `sequences` rows, or of at most `tokens` tokens, padding included; 0: no limit."""
        rows = list(rows)
        if not tokens:
            size = sequences or len(rows)
            return [rows[i : i + size] for i in range(0, len(rows), size)]
        lengths, prompt, parts = self.lengths.tolist(), self.prompt.shape[1], [[]]
        for row in sorted(rows, key=lengths.__getitem__):  # neighbours of like length: little padding
            if parts[-1] and (len(parts[-1]) + 1) * (prompt + lengths[row]) > tokens:
                parts.append([])
            parts[-1].append(row)
        return parts

    def with_response_mask(self, most):
        """At most `most` answers spread over the batch: ids, attention mask and response mask, each (rows, width)."""
        rows = list(range(len(self.tokens)))[:: max(1, len(self.tokens) // most)][:most]
        ids, attention, predicts = self.sequences(rows)
        return ids, attention, predicts.roll(1, 1)  # a response token stands to the right of the state that predicts it

    def select(self, prompts):
        """The rollout of some of its prompts (a list of indices), in that order."""
        rows = [p * self.group_size + g for p in prompts for g in range(self.group_size)]
        by_prompt = ("prompt", "prompt_mask")
        return Rollout(**{f.name: getattr(self, f.name)[prompts if f.name in by_prompt else rows] for f in fields(self)})

    @staticmethod
    def join(parts):
        """Several rollouts with the same G as one, padded to the longest."""
        if len(parts) == 1:
            return parts[0]
        joined = {}
        for f in fields(Rollout):
            tensors = [getattr(p, f.name) for p in parts]
            if tensors[0].dim() == 2:
                width, left = max(t.shape[1] for t in tensors), f.name in ("prompt", "prompt_mask")
                tensors = [torch.nn.functional.pad(t, (width - t.shape[1], 0) if left else (0, width - t.shape[1])) for t in tensors]
            joined[f.name] = torch.cat(tensors)
        return Rollout(**joined)

    def answers(self):
        """The answers as lists of ids, end-of-sequence token included."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths.tolist())]


def position_ids(attention_mask):
    """Positions that count real tokens only, so a left-padded row sees the positions of an unpadded one."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def pad_prompts(prompts, device):
    """Lists of ids -> (P, S) ids and mask, padded on the left with 0 (the mask alone says what is padding)."""
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    return ids, torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
