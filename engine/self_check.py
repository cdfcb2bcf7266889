"""Compare the sampler and the scorer with the model's own forward pass, before the first step.

Training is exact only if three computations agree: the decoder that draws the responses, the scorer
that computes old and new log-probabilities, and one forward pass of the model over a whole text,
without a cache. A model can break this in many ways: a cache that the decoder does not fill as the
model expects, dropout or noise that is on in training mode, positions that depend on the longest
row, logits that are scaled. So nothing is concluded from the model's name. A few tokens are drawn
after two short prompts, and their log-probabilities are compared.
"""

import dataclasses

import torch

import internals
from common.attention import takes_any_mask
from common.errors import UserError
from engine import packing
from engine.engine import Engine, autocast
from losses import row_logprobs_and_entropy, token_logprobs_and_entropy
from sampling import NonFinite

TEXT = "What is 12 plus 30?"
G, TOKENS = 2, 3  # responses per prompt, tokens of each
# largest difference of a log-probability; 16-bit rounding moves it by some hundredths
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.5, "float16": 0.1}


class Disagreement(Exception):
    """What differs, and the likely cause."""


def check_engine(engine, tokenizer):
    """Raise UserError unless an engine's sampler and scorer agree with its own forward pass."""
    options, prompts = engine.options, prompts_of(tokenizer, engine.vocab_size)
    try:
        _compare_engine(engine, prompts)
        engine.dist.reshard(engine.policy)
    except Disagreement as found:
        hint = ""
        if not options.plain and options.dtype == "float32" and not engine.dist.sharded:
            plain = dataclasses.replace(options, plain=True)
            more = (plain, engine.dist, engine.vocab_size, engine.eos_ids)
            try:
                _compare_engine(Engine(engine.policy, *more), prompts)
                hint = "; with --plain all agree: add it"
            except Disagreement:
                pass
        raise UserError(
            f"--model {options.model}: {found}. Training would not be exact{hint} "
            "(--no-self-check skips this check)"
        ) from None


def check_decoder(model, generate, tokenizer, vocab_size, name):
    """Raise UserError unless a decoder's log-probabilities are those of the model's forward pass.

    generate: (prompts, group size, length cap, temperature, uniform) -> Rollout.
    """
    prompts = prompts_of(tokenizer, vocab_size)
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    try:
        rollout = _attempt("the sampler", generate, prompts, G, TOKENS, 1.0, _uniform(prompts))
        own = _attempt("a forward pass", forward_logprobs, model, rollout, vocab_size)
        _agree("the sampler", rollout.logp[rollout.mask], own, dtype, CACHE)
    except Disagreement as found:
        raise UserError(
            f"--model {name}: {found}. Its responses would not be the model's own "
            "(--no-self-check skips this check)"
        ) from None


CACHE = (
    "likely cause: layers whose cache is not one of keys and values at every position, or a "
    "sampler that changes the distribution (top-p, top-k)"
)
RANDOM = "likely cause: dropout or noise that its configuration names"
ROWS = "likely cause: positions or experts that depend on the other rows of a pass"
PACKED = "likely cause: attention that ignores the mask it is given"
LOGITS = "likely cause: logits that are more than hidden states times the output embedding"


def _compare_engine(engine, prompts):
    """Raise Disagreement for the first comparison that fails.

    The batch has four rows. The model's own forward passes are over the first and the last.
    """
    policy, dtype, every = engine.policy, engine.options.dtype, list(range(len(prompts) * G))
    first_and_last, base = [0, every[-1]], engine.options.temperature
    rollout = _attempt("the sampler", engine.generate, prompts, G, TOKENS, 1.0, _uniform(prompts))

    def scored():
        rows = slice(0, len(every))
        scores = engine.token_logprobs(policy, rollout, rows, None, measure_entropy=False)
        return scores.logp[rollout.mask]

    def of_own_rows(values):
        return torch.cat([_rows_of(values, rollout, row) for row in first_and_last])

    with torch.no_grad():
        twice = [_attempt("the scorer", scored) for _ in range(2)]
        _agree("a second pass in training mode", twice[1], twice[0], dtype, RANDOM)
        with autocast(engine.dist.device, dtype):
            arguments = (policy, rollout, engine.vocab_size, first_and_last)
            own = at_1 = _attempt("a forward pass", forward_logprobs, *arguments, base)
            if base != 1:
                at_1 = forward_logprobs(*arguments)
            alone = _attempt("the scorer", _laid_out, engine, rollout, [every[-1]], "plain")
            _agree("the scorer", alone, own[-len(alone) :], dtype, LOGITS)
            found = _attempt("a pass over several rows", _laid_out, engine, rollout, every, "plain")
            _agree("a pass over several rows", of_own_rows(found), own, dtype, ROWS)
            if takes_any_mask(policy.config) and not engine.options.plain:
                found = _attempt("packing", _laid_out, engine, rollout, every, "packed")
                _agree("packing", of_own_rows(found), own, dtype, PACKED)
    _agree("the scorer", of_own_rows(twice[0]), own, dtype, LOGITS)
    _agree("the sampler", of_own_rows(rollout.logp[rollout.mask]), at_1, dtype, CACHE)


def _rows_of(values, rollout, row):
    """Return the values (N,) of one row's tokens."""
    return values.split(rollout.lengths.tolist())[row]


def prompts_of(tokenizer, vocab_size):
    """Return two prompts of different length, lists of ids."""
    ids = [i for i in tokenizer(TEXT, add_special_tokens=False).input_ids if i < vocab_size]
    return [ids, ids[: max(1, len(ids) // 3)]]


def _uniform(prompts):
    rows = len(prompts) * G
    return torch.linspace(0.05, 0.95, TOKENS * rows).view(TOKENS, rows)


@torch.no_grad()
def forward_logprobs(model, rollout, vocab_size, rows=None, temperature=1.0):
    """Return the log-probabilities of some rows' tokens, (N,), from one forward pass per row.

    The pass is in evaluation mode, over the whole text, without padding, mask or cache.
    """
    training, found = model.training, []
    model.eval()
    try:
        for row in range(len(rollout.tokens)) if rows is None else rows:
            p = row // rollout.group_size
            prompt = rollout.prompt[p][rollout.prompt_mask[p]]
            response = rollout.tokens[row][rollout.mask[row]]
            ids = torch.cat([prompt, response])[None]
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :vocab_size]
            logp, _ = row_logprobs_and_entropy(logits.float() / temperature, response)
            found.append(logp)
    finally:
        model.train(training)
    return torch.cat(found)


def _laid_out(engine, rollout, rows, layout):
    """Return the log-probabilities of some rows, (N,), scored in one pass of one layout."""
    if layout == "plain":
        packed = internals.unpacked(rollout, rows)
    else:
        sizes = rollout.lengths.tolist(), rollout.prompt_mask.sum(1).tolist()
        width = sum(sizes[0]) + sum(sizes[1])  # all in one packed row
        lines = packing.fill(packing.segments(rows, *sizes, rollout.group_size, width), width)
        packed = packing.laid_out(rollout, rows, lines, width, *sizes)
        packed = packed._replace(mask=packing.visible(*packed.mask))
    states = internals.response_states(engine.policy, packed)
    weight = internals.unembedding(engine.policy)[: engine.vocab_size]
    temperature = engine.options.temperature
    return token_logprobs_and_entropy(states, weight, packed.tokens, temperature)[0]


def _attempt(what, function, *arguments):
    """Return function(*arguments); Disagreement names what failed, whatever it raised."""
    try:
        return function(*arguments)
    except (UserError, NonFinite):
        raise
    except Exception as error:  # noqa: BLE001 - a model's code may raise anything
        first = (str(error).strip().splitlines() or [""])[0][:150]
        raise Disagreement(f"{what} fails on it ({type(error).__name__}: {first})") from error


def _agree(what, found, expected, dtype, cause):
    """Raise Disagreement unless two tensors of log-probabilities agree."""
    difference = (found.float() - expected.float()).abs().max().item()
    if not difference <= TOLERANCE[dtype]:  # NaN, too
        raise Disagreement(
            f"{what} differs from the model's own forward pass by up to {difference:.2g} in a "
            f"log-probability; {cause}"
        )
