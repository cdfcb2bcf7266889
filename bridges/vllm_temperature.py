"""Mechanism A of HAPO inside vLLM: every token is drawn at T = T_base (1 + tau h), Eq. 8.

vLLM divides a request's logits by its temperature, which is T_base. This logits processor divides
them by the other factor of Eq. 8 before that: 1 + tau h in the bounded form, clip(1 + tau z, 0.1,
10) in the z-score form. The factor comes from the entropy of the row's raw logits.

An engine learns of the class when it starts, in one of three ways:

    pip install -e .                                                an entry point: always loaded
    LLM(model, logits_processors=[AdaptiveTemperature])
    LLM(model, logits_processors=["bridges.vllm_temperature:AdaptiveTemperature"])

The statistics of the last rollout travel with each request, so a worker holds nothing that must be
renewed (at: the temperature of their entropies, 1 for raw logits):

    SamplingParams(temperature=T_base, extra_args=request_arguments(stats, tau=0.05))
    {"temperature": T_base, "vllm_xargs": request_arguments(stats, tau=0.05)}       over HTTP

Requests without them, and greedy requests, are divided by exactly 1. An engine that has not loaded
the class ignores them without a word, and so does the first model runner with speculative decoding:
call check_engine once, or check_draws with what a server has drawn for probe_requests.

Shapes: R rows of a decoding step, V vocabulary.
"""

import importlib
import math
import weakref

import torch
from torch import Tensor
from transformers import AutoTokenizer

import hapo
from losses import NEVER
from sampling import vocabulary

KEY = "hapo"  # of SamplingParams.extra_args
FORMS = ("bounded", "zscore", "released")  # released: bounded, with the sign of HAPO's release
# what a request carries, in this order; `at`: the temperature of the statistics' entropies
FIELDS = (*hapo.EntropyStats._fields, "tau", "at", "form")
NO_CHANGE = (0.0, 1.0, 1.0, -1.0, 0.0, 1.0, 0.0)  # tau 0: the factor is 1
TAU = FIELDS.index("tau")
CPU_CHUNK, GPU_CHUNK = 2**18, 2**24  # logits at a time; a CPU's fit into its cache
GREEDY = 1e-5  # vLLM draws greedily below this temperature
# vLLM has two model runners with different interfaces
INTERFACES = (
    "vllm.v1.sample.logits_processor",
    "vllm.v1.worker.gpu.sample.logits_processor",
)


# ---------------------------------------------------------------------------------------- requests


def request_arguments(
    stats: hapo.EntropyStats, tau: float = 0.05, form: str = "bounded", at: float = 1.0
) -> dict:
    """Return extra_args of a request, {"hapo": list}: plain numbers, as vllm_xargs allows.

    at: the temperature at which the entropies of `stats` were computed; the row's entropy is
    computed at the same.
    """
    return {KEY: [*(float(x) for x in stats), float(tau), float(at), form]}


def read_request(params) -> tuple:
    """Return the seven numbers of a vLLM request, NO_CHANGE where it has none or is greedy.

    ValueError names what is wrong with them.
    """
    given = (params.extra_args or {}).get(KEY)
    if given is None:
        return NO_CHANGE
    wrong = f"extra_args[{KEY!r}] must be a list of {', '.join(FIELDS)}, not {given!r:.200}"
    if not isinstance(given, (list, tuple)) or len(given) != len(FIELDS):
        raise ValueError(wrong)
    *numbers, form = given
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
    if form not in FORMS or not all(map(number, numbers)):
        raise ValueError(f"{wrong}: six finite numbers and one of {', '.join(FORMS)}")
    _, sigma, h_max, h_min, tau, at = numbers
    if sigma <= 0 or h_max <= 0 or h_min >= 0 or at <= 0:
        raise ValueError(f"{wrong}: sigma, h_max and at must be above 0, h_min below 0")
    if tau < 0 or (form != "zscore" and tau >= 1):
        raise ValueError(f"{wrong}: tau must be at least 0, and below 1 in the bounded form")
    if params.temperature < GREEDY:
        return NO_CHANGE
    return (*map(float, numbers), float(FORMS.index(form)))


# ---------------------------------------------------------------------------------------- Eq. 8


def temperature_factors(
    logits: Tensor, rows: Tensor, vocab_size: int | None = None, forms: tuple = FORMS
) -> Tensor:
    """Return T / T_base of each row, Eq. 8: (R, V) raw logits, (R, 7) numbers -> (R,).

    Ids from vocab_size on only pad the vocabulary; they are left out of the entropy. forms: those
    that any row has.
    """
    *numbers, tau, at, form = rows.unbind(1)
    entropy = row_entropy(logits[:, :vocab_size], at)
    stats, factors = hapo.EntropyStats(*numbers), torch.ones_like(entropy)
    for name in forms:
        how = {"form": "zscore"} if name == "zscore" else {"released": name == "released"}
        found = hapo.adaptive_temperature(entropy, stats, tau=tau, **how)
        factors = torch.where(form == FORMS.index(name), found, factors)
    return torch.where(tau == 0, 1.0, factors)


def row_entropy(logits: Tensor, at: Tensor) -> Tensor:
    """Return the entropies H = log1p(s) + sum p (-z) of logits / at in nats, (R, V), (R,) -> (R,).

    It is that of losses.row_logprobs_and_entropy, in buffers that are used again: on a CPU fresh
    memory for every intermediate result would take longer than the arithmetic.
    """
    chunk = CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK
    size = max(1, chunk // logits.shape[1])
    buffers = torch.empty(2, min(size, len(logits)), logits.shape[1], device=logits.device)
    entropies = []
    for rows, divisor in zip(logits.split(size), at.split(size)):
        z, p = buffers[:, : len(rows)]
        top = rows.argmax(-1, keepdim=True)
        torch.sub(rows, rows.gather(-1, top), out=z).div_(divisor[:, None]).clamp_min_(NEVER)
        torch.exp(z, out=p).scatter_(-1, top, 0.0)  # e^z of all ids but the likeliest
        s = p.sum(-1)
        entropies.append(torch.log1p(s) - p.mul_(z).sum(-1) / (1 + s))
    return torch.cat(entropies)


# --------------------------------------------------------------------------- vLLM's two interfaces


def interfaces() -> list[type]:
    """Return the base classes that this vLLM has; none where it is not installed."""
    found = []
    for name in INTERFACES:
        try:
            found.append(importlib.import_module(name).LogitsProcessor)
        except ImportError:  # of another vLLM
            pass
    return found


def tokenizer_ids(model_config) -> int | None:
    """Return how many ids the engine's tokenizer knows; None where it has no tokenizer."""
    if model_config.skip_tokenizer_init:
        return None
    tokenizer = AutoTokenizer.from_pretrained(
        model_config.tokenizer,
        revision=model_config.tokenizer_revision,
        trust_remote_code=model_config.trust_remote_code,  # as the engine's user has decided
    )
    return vocabulary(tokenizer)


class AdaptiveTemperature(*interfaces()):
    """Divide each row's logits by its factor of Eq. 8. One class for both model runners.

    In the first runner a row is a place in the batch: update_state, then apply(logits). In the
    second one requests have slots, and the context of apply names each row's slot: add_request,
    then apply(logits, context).
    """

    _acting = weakref.WeakValueDictionary()  # {id of an engine's configuration: its processor}

    def __init__(self, vllm_config, device_or_slots, is_pin_memory=None):
        self.acts = self._acting.setdefault(id(vllm_config), self) is self
        self.device = torch.device(getattr(device_or_slots, "device", device_or_slots))
        most = vllm_config.scheduler_config.max_num_seqs
        most = getattr(device_or_slots, "max_num_reqs", most)
        self.numbers = torch.tensor(NO_CHANGE).repeat(most, 1)  # by place or by slot
        self.on_device, self.forms = None, ()  # a copy of self.numbers, None where they changed
        self.model_config, self.vocab_size = vllm_config.model_config, None

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        """Raise ValueError for a malformed request. vLLM refuses it and keeps running."""
        read_request(sampling_params)

    def is_argmax_invariant(self) -> bool:
        # it is, but vLLM would then run it behind T_base and min_p, where logits are not raw
        return False

    def update_state(self, batch_update) -> None:
        """First runner: requests have left the batch, entered it or changed their places."""
        if batch_update is None:
            return
        numbers, nothing = self.numbers, torch.tensor(NO_CHANGE)
        for place in batch_update.removed:
            numbers[place] = nothing
        for place, params, *_ in batch_update.added:
            numbers[place] = torch.tensor(read_request(params))
        for a, b, direction in batch_update.moved:
            left_behind = numbers[b].clone() if direction.name == "SWAP" else nothing
            numbers[b] = numbers[a].clone()
            numbers[a] = left_behind
        self.on_device = None

    def add_request(self, req_idx: int, sampling_params) -> bool:
        """Second runner: a request has entered a slot. Return whether its logits are changed."""
        self.numbers[req_idx] = torch.tensor(read_request(sampling_params))
        self.on_device = None
        return self.acts and bool(self.numbers[req_idx, TAU] > 0)

    def apply(self, logits: Tensor, context=None) -> Tensor:
        if self.acts and self.on_device is None:
            heated = self.numbers[self.numbers[:, TAU] > 0]
            self.forms = tuple(FORMS[int(n)] for n in heated[:, -1].unique())
            copied = self.numbers.clone()
            if self.device.type == "cuda":  # pinned, so that the copy to the GPU does not wait
                copied = copied.pin_memory()
            self.on_device = copied.to(self.device, non_blocking=True)
        if not self.acts or not self.forms:
            return logits
        if self.vocab_size is None:  # only an engine that is asked to heat reads its tokenizer
            self.vocab_size = tokenizer_ids(self.model_config) or logits.shape[1]
        if context is None:
            rows = self.on_device[: len(logits)]
        else:
            rows = self.on_device[context.expanded_idx_mapping]
        factors = temperature_factors(logits, rows, self.vocab_size, self.forms)
        return logits.div_(factors[:, None])


# ------------------------------------------------------------------- does an engine apply it?

# Two requests at T_base 2. At a millionth of it every draw is the likeliest id; at ten times it the
# draws are scattered. Without this processor both have one distribution, and cannot do both.
_COLD = hapo.EntropyStats(*torch.tensor([100.0, 1.0, 1.0, -1.0]))  # h = -1 whatever the entropy
_HOT = hapo.EntropyStats(*torch.tensor([-100.0, 1.0, 1.0, -1.0]))  # z > 80 whatever the entropy
_PROBE = {"n": 64, "temperature": 2.0, "max_tokens": 1}
_SCATTERED = 8  # different ids among the hot request's draws


def probe_requests() -> list[dict]:
    """Return the settings of two requests, cold and hot, whose draws show whether A is applied."""
    cold = request_arguments(_COLD, tau=1 - 1e-6)
    hot = request_arguments(_HOT, tau=1.0, form="zscore")
    return [_PROBE | {"extra_args": cold}, _PROBE | {"extra_args": hot}]


def check_draws(cold: list, hot: list) -> None:
    """Raise ValueError unless the first tokens drawn for probe_requests are those of Eq. 8."""
    if len(set(cold)) != 1 or len(set(hot)) < _SCATTERED:
        raise ValueError(
            "this vLLM engine does not apply HAPO's adaptive temperature: install the entry point "
            "(pip install -e . in the project's folder) before the engine starts, and disable "
            "speculative decoding"
        )


def check_engine(llm, prompt: tuple = (1, 2, 3)) -> None:
    """Raise ValueError unless a vLLM engine applies mechanism A. prompt: ids of any text."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": list(prompt)}] * 2
    settings = [SamplingParams(**probe) for probe in probe_requests()]
    answers = llm.generate(asked, settings, use_tqdm=False)
    check_draws(*([output.token_ids[0] for output in answer.outputs] for answer in answers))
