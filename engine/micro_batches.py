"""Split a batch into micro-batches of limited size, the same number of them in every process."""


def split_by_tokens(rollout, rows, tokens, packed):
    """Return rows as micro-batches of at most `tokens` tokens each; one row may have more.

    packed: responses share rows with their prompt (engine/packing.py), so padding is not counted,
    and each prompt is counted once. Otherwise padding and every prompt are counted.
    """
    lengths, prompt, parts = rollout.lengths.tolist(), rollout.prompt.shape[1], [[]]
    rows = rollout.row_list(rows)
    if packed:
        return _split_by_real_tokens(rollout, rows, tokens, lengths)
    for row in sorted(rows, key=lengths.__getitem__):  # similar lengths: little padding
        if parts[-1] and (len(parts[-1]) + 1) * (prompt + lengths[row]) > tokens:
            parts.append([])
        parts[-1].append(row)
    return as_slices(parts)


def as_slices(parts):
    """Return lists of adjacent rows as slices, which need no copy to the device."""
    ends = [(part[0], part[-1] + 1) for part in parts]
    return [slice(*e) if part == list(range(*e)) else part for part, e in zip(parts, ends)]


def _split_by_real_tokens(rollout, rows, tokens, lengths):
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


def equal_counts(parts, dist):
    """Return the micro-batches, split further until every process has the same number of them.

    A forward pass of a sharded model is a collective call, so every process must make the same
    number of them. The micro-batches with the most rows are cut in two. This always succeeds, since
    all processes have the same number of rows.
    """
    needed = int(dist.all_reduce_max(len(parts)))
    while len(parts) < needed:
        longest = max(range(len(parts)), key=lambda i: len(parts[i]))
        part = parts[longest]
        half = len(part) // 2
        parts[longest : longest + 1] = [part[:half], part[half:]]
    return as_slices(parts)
