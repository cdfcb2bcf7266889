"""Forward passes of at most so many tokens, and the same number of them on every rank."""

from scale.shard import exchange_gradients


def passes_of_tokens(rollout, rows, tokens, packs=None):
    """Rows in lists of at most `tokens` tokens each, or of one row. Where answers are packed into
    lines (`packs` says so), real ones, each prompt once; else with their padding."""
    lengths, prompt, parts = rollout.lengths.tolist(), rollout.prompt.shape[1], [[]]
    rows = rollout.listed(rows)
    if packs and packs(rollout, rows):
        return _of_real_tokens(rollout, rows, tokens, lengths)
    for row in sorted(rows, key=lengths.__getitem__):  # neighbours of like length: little padding
        if parts[-1] and (len(parts[-1]) + 1) * (prompt + lengths[row]) > tokens:
            parts.append([])
        parts[-1].append(row)
    return as_slices(parts)


def as_slices(parts):
    """Neighbouring rows as a slice: no list of theirs has to go to the device."""
    ends = [(part[0], part[-1] + 1) for part in parts]
    return [slice(*e) if part == list(range(*e)) else part for part, e in zip(parts, ends)]


def _of_real_tokens(rollout, rows, tokens, lengths):
    prompts, G = rollout.prompt_mask.sum(1).tolist(), rollout.group_size
    parts, held = [], 0
    for row in rows:
        first = not parts or parts[-1][-1] // G != row // G
        more = lengths[row] + first * prompts[row // G]
        if not parts or held + more > tokens:
            parts.append([])
            held, more = 0, lengths[row] + prompts[row // G]
        parts[-1].append(row)
        held += more
    return as_slices(parts)


def even_passes(passes, ranks, rollout, rows):
    """As many passes as the rank with the most: a pass of a sharded model is a collective call, so
    every rank must make the same number of them. All have as many rows."""
    parts = [rollout.listed(part) for part in passes(rollout, rows)]
    needed = int(ranks.max(len(parts)))
    while len(parts) < needed:  # cut the longest in two
        longest = max(range(len(parts)), key=lambda i: len(parts[i]))
        part = parts[longest]
        half = len(part) // 2
        parts[longest : longest + 1] = [part[:half], part[half:]]
    return as_slices(parts)


def one_exchange(passes, policy, rollout, rows):
    """Gradients go down to main memory once, behind the last pass."""
    parts = passes(rollout, rows)
    for i, part in enumerate(parts, 1):
        exchange_gradients(policy, i == len(parts))
        yield part
