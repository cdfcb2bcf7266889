"""How often a step draws: once, or anew where groups are dead (--dynamic-sampling, DAPO).

A round is `collect(step, layer, run, attempt)`: P prompts with their answers, as a Batch.
"""

import torch

from run.batch import join, moved_to, select


def dynamic_sampling(collect, step, layer, run):
    """DAPO: groups whose rewards are all equal make room for new ones, for some rounds; those that
    are still dead then keep their place and stay out of the loss.

    The first P live groups are taken, of all processes together, and dealt out to the updates in
    turn: every update gets its share of them.
    """
    options, ranks = run.options, run.ranks
    drawn = collect(step, layer, run)
    for attempt in range(1, options.max_rounds):
        if ranks.total(live_groups(drawn).sum())[0] >= options.prompts_per_step:
            break
        drawn = join([drawn, collect(step, layer, run, attempt)])
    everywhere = moved_to(join(ranks.gather_objects(moved_to(drawn, "cpu"))), ranks.device)
    # as one process would have drawn them: prompts were dealt out to the processes in turn
    order = torch.arange(len(everywhere.problems)).view(ranks.size, -1).T.flatten()
    live_first = (~live_groups(everywhere).cpu()[order]).int().argsort(stable=True)
    chosen = order[live_first][: options.prompts_per_step]
    dealt = chosen.view(-1, options.updates_per_rollout).T.flatten().tolist()
    batch = select(everywhere, ranks.mine(dealt))
    batch.all_drawn = drawn
    batch.in_loss = batch.live
    batch.loss_mask = batch.rollout.mask & batch.in_loss[:, None]
    return batch


def live_groups(batch):
    """Of each group, (P,): whether its rewards differ."""
    return batch.live.view(-1, batch.rollout.group_size)[:, 0]
