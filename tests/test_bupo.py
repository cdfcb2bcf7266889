"""BuPO: the schedule, who moves in phase 1, one IPA step against a reference written by hand."""

import torch
from conftest import random_model

from bupo import AUTO, boundary_or_fallback, target_layer
from internals import layer_hidden, unembedding
from losses import clipped_surrogate, masked_mean, token_logprobs_and_entropy

IDS = torch.randint(4, 50, (2, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 8, dtype=torch.long)
ADVANTAGES = torch.tensor([[1.0], [-0.5]]).expand(2, 4)


def ipa_loss(model, layer, old_logp):
    """Eq. 9 on the last four positions, through the functions that train.py uses."""
    states = layer_hidden(model, IDS, MASK, layer)[:, 3:-1]
    logp, _ = token_logprobs_and_entropy(states, unembedding(model), IDS[:, 4:])
    per_token = clipped_surrogate(torch.exp(logp - old_logp), ADVANTAGES, 0.2, 0.2)
    return masked_mean(per_token, torch.ones(2, 4)), logp


def test_schedule():
    assert [target_layer(s, 3, 6) for s in (1, 2, 3, 4, 5)] == [6, 6, 6, None, None]
    assert target_layer(1, 0, 6) is None and target_layer(1, 3, None) is None
    assert target_layer(1, 3, AUTO) == AUTO and target_layer(4, 3, AUTO) is None


def test_boundary_or_fallback():
    assert boundary_or_fallback([1.0, 2.0, -1.0]) == (2, True)
    assert boundary_or_fallback([-3.0, -1.0, -2.0]) == (2, False)


def test_gradient_is_nonzero_exactly_where_the_paper_says(any_model):
    for layer in (1, 2, 3):
        any_model.zero_grad()
        ipa_loss(any_model, layer, torch.full((2, 4), -3.0))[0].backward()
        above = (*any_model.model.layers[layer:], any_model.model.norm)
        still = {id(p) for part in above for p in part.parameters()}
        for name, p in any_model.named_parameters():
            if id(p) in still:
                assert p.grad is None, (layer, name)
            else:
                assert p.grad is not None and p.grad.abs().sum() > 0, (layer, name)


def test_one_step_against_autograd_by_hand():
    """The same gradient from transformers' own hidden states, full logits, log_softmax and a
    surrogate written out."""
    ours, theirs = random_model(layers=3), random_model(layers=3)
    old = torch.full((2, 4), -3.0)
    loss, logp = ipa_loss(ours, 2, old)
    loss.backward()
    hidden = theirs(IDS, output_hidden_states=True).hidden_states[2][:, 3:-1]
    log_probs = (hidden @ theirs.lm_head.weight.T).log_softmax(-1)
    taken = log_probs.gather(-1, IDS[:, 4:, None]).squeeze(-1)
    r = (taken - old).exp()
    reference = -torch.min(r * ADVANTAGES, r.clamp(0.8, 1.2) * ADVANTAGES).mean()
    reference.backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(logp, taken)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        if a.grad is None:
            assert b.grad is None or (b.grad == 0).all(), name
        else:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_upper_layers_stay_bit_identical_and_start_phase_two_as_if_never_touched():
    model = random_model(layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    upper = [p for part in (*model.model.layers[1:], model.model.norm) for p in part.parameters()]
    before = [p.detach().clone() for p in upper]
    for _ in range(3):
        loss, _ = ipa_loss(model, 1, torch.full((2, 4), -3.0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(before, upper))
    assert not any(p in optimizer.state for p in upper)  # no moment, no step count
    assert all(p in optimizer.state for p in model.model.layers[0].parameters())
