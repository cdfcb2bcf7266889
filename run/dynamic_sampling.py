"""Sample dynamically (DAPO): replace zero-variance groups, in at most --max-rounds rounds.

If too few groups have reward variance after the last round, zero-variance groups fill the batch and
are left out of the loss.
"""

import torch

from run.batch import join, moved_to, select


def is_filled(drawn, run):
    """Return whether all processes together have enough groups with reward variance for a step."""
    (found,) = run.dist.all_reduce_sum(groups_with_variance(drawn).sum())
    return found >= run.options.prompts_per_step


def select_groups(drawn, run):
    """Return a step's Batch: of all groups drawn, the first P with reward variance.

    They are selected over all processes and distributed over the updates in turn, so that every
    update gets an equal share of them.
    """
    options, dist = run.options, run.dist
    everywhere = moved_to(join(dist.gather_objects(moved_to(drawn, "cpu"))), dist.device)
    # the order in which a single process would have drawn: processes took prompts in turn
    order = torch.arange(len(everywhere.problems)).view(dist.size, -1).T.flatten()
    zero_variance = ~groups_with_variance(everywhere).cpu()
    chosen = order[zero_variance[order].int().argsort(stable=True)][: options.prompts_per_step]
    dealt = chosen.view(-1, options.updates_per_rollout).T.flatten().tolist()
    batch = select(everywhere, dist.local_shard(dealt))
    batch.all_drawn = drawn
    batch.in_loss = batch.has_reward_variance
    batch.loss_mask = batch.rollout.mask & batch.in_loss[:, None]
    return batch


def groups_with_variance(batch):
    """Return for each group whether its rewards differ, (P,)."""
    return batch.has_reward_variance.view(-1, batch.rollout.group_size)[:, 0]
