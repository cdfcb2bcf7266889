"""bridges/vllm_temperature.py in a real vLLM engine, against transformers on the same responses.

tests/engines/vllm.sh makes the environment and runs this file once for each way in which an engine
learns of the class: HAPO_REGISTER=class, name or entry (an installed entry point).
"""

import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter

import pytest
import torch
from conftest import ROOT, TINY
from models import with_head_size
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("vllm")
pytestmark = [pytest.mark.optional("vllm"), pytest.mark.programs]

import hapo
from bridges import vllm_temperature
from bridges.vllm_temperature import AdaptiveTemperature, check_engine, request_arguments
from sampling import entropy_of, vocabulary

REGISTER = os.environ.get("HAPO_REGISTER", "class")
PROCESSORS = {
    "class": {"logits_processors": [AdaptiveTemperature]},
    "name": {"logits_processors": ["bridges.vllm_temperature:AdaptiveTemperature"]},
    "entry": {},
}
SIZES = dict(dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=16, seed=1)
SIZES |= dict(
    gpu_memory_utilization=0.3,
    block_size=32,
    disable_log_stats=False,
    logprobs_mode="processed_logprobs",
)
TOLERANCE = 5e-5
ROOM = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB for keys and values, of engines in other processes


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The shipped model, whose entropies lie far apart, with heads that vLLM takes."""
    folder = tmp_path_factory.mktemp("model")
    with_head_size(TINY, folder)
    return folder


@pytest.fixture(scope="session")
def engine(folder):
    """An engine in this process, with room for too few tokens: it must interrupt requests."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would come before kv_cache_memory_bytes
    from vllm import LLM

    config = AutoConfig.from_pretrained(folder)
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads  # keys and values
    room = 448 * heads * config.head_dim * 4  # bytes of 448 tokens in float32
    return LLM(str(folder), kv_cache_memory_bytes=room, **PROCESSORS[REGISTER], **SIZES)


@pytest.fixture(scope="session")
def reference(folder):
    """(model, tokenizer) in transformers"""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def prompt_of(reference, question):
    messages = [{"role": "user", "content": question}]
    how = dict(add_generation_prompt=True, return_dict=False)
    return list(reference[1].apply_chat_template(messages, **how))


def statistics(pivot, sigma=1.0, h_max=1.0, h_min=-4.0):
    return hapo.EntropyStats(*torch.tensor([pivot, sigma, h_max, h_min]))


def generate(engine, prompts, settings):
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return engine.generate(asked, [SamplingParams(**s) for s in settings], use_tqdm=False)


@torch.no_grad()
def temperatures(reference, ids, size, rule):
    """(logits of the last `size` tokens, temperatures) of one response, by transformers."""
    model, tokenizer = reference
    logits = model(torch.tensor([ids])).logits[0, -size - 1 : -1].float()
    entropy = entropy_of(logits[:, : vocabulary(tokenizer)])
    return logits, hapo.adaptive_temperature(entropy, **rule)


def mixed_requests(reference, count, seed=0):
    """(prompt, settings, rule or None): HAPO in both forms at three bases, plain, greedy."""
    rng, made = random.Random(seed), []
    sums = [f"What is {rng.randint(1, 999)} + {rng.randint(1, 999)}?" for _ in range(24)]
    long = "Add. " * 8  # longer than a block of cached keys
    prompts = [prompt_of(reference, long + question) for question in sums]
    for _ in range(count):
        kind = rng.choice(["hapo", "hapo", "hapo", "plain", "greedy"])
        stats = statistics(
            rng.uniform(-4, -0.5), rng.uniform(1, 4), rng.uniform(0.5, 2), -rng.uniform(2, 9)
        )
        how = dict(tau=rng.choice([0.05, 0.3, 0.6]), form=rng.choice(["bounded", "zscore"]))
        base = 0.0 if kind == "greedy" else rng.choice([1.0, 0.7, 1.3])
        settings = dict(temperature=base, max_tokens=rng.randint(2, 40), logprobs=2)
        settings |= dict(ignore_eos=rng.random() < 0.5)
        if kind != "plain":
            settings["extra_args"] = request_arguments(stats, **how)
        rule = dict(stats=stats, base=base, **how) if kind == "hapo" else None
        made.append((rng.choice(prompts), settings, rule))
    return made


def metric(engine, name):
    return sum(m.value for m in engine.get_metrics() if m.name == name)


def test_log_probabilities_are_those_at_t(engine, reference):
    """96 requests, twice: behind cached prefixes the second time, with interruptions."""
    made = mixed_requests(reference, 96)
    for _ in range(2):
        outputs = generate(engine, [m[0] for m in made], [m[1] for m in made])
        worst, spread = {True: 0.0, False: 0.0}, []
        for out, (prompt, settings, rule) in zip(outputs, made):
            answer = list(out.outputs[0].token_ids)
            base = settings["temperature"]
            how = rule or dict(stats=None, base=base or 1.0)
            logits, T = temperatures(reference, prompt + answer, len(answer), how)
            spread += (T / base).tolist() if rule else []
            expected = (logits / T[:, None]).log_softmax(-1)
            for t, token in enumerate(answer):
                given = out.outputs[0].logprobs[t][token].logprob
                off = abs(given - expected[t, token].item())
                worst[bool(rule)] = max(worst[bool(rule)], off)
                if not base:
                    assert token == int(logits[t].argmax())
        print(
            f"largest difference {worst[True]:.1e} at T, {worst[False]:.1e} for other requests; "
            f"T / T_base {min(spread):.2f} to {max(spread):.2f}"
        )
        assert max(worst.values()) <= TOLERANCE and min(spread) < 0.6 and max(spread) > 1.4
    assert metric(engine, "vllm:num_preemptions") > 0
    assert metric(engine, "vllm:prefix_cache_hits") > 0


def p_value(counts, probabilities):
    """Pearson's chi-square test; ids that are expected fewer than five times are pooled."""
    n = sum(counts.values())
    observed = torch.zeros_like(probabilities)
    for token, count in counts.items():
        observed[token] = count
    rare = probabilities * n < 5
    pool = lambda x: torch.cat([x[~rare], x[rare].sum()[None]])
    o, e = pool(observed), pool(probabilities * n)
    o, e = o[e > 0], e[e > 0]
    statistic, freedom = ((o - e) ** 2 / e).sum() / 2, torch.tensor((len(e) - 1) / 2)
    return torch.special.gammaincc(freedom.double(), statistic.double()).item()


def test_draws_have_the_distribution_at_t(engine, reference):
    prompt, draws = prompt_of(reference, "What is 3 + 4?"), 16_000
    stats, settings = statistics(-3.0), dict(n=draws, temperature=1.0, max_tokens=1)
    hot = settings | {"extra_args": request_arguments(stats, tau=0.6)}
    heated, plain = (
        Counter(output.token_ids[0] for output in out.outputs)
        for out in generate(engine, [prompt] * 2, [hot, settings])
    )
    logits, T = temperatures(reference, [*prompt, 0], 1, dict(stats=stats, tau=0.6))
    assert T > 1.3
    at_t, at_1 = ((logits[0] / t).double().softmax(-1) for t in (T, 1.0))
    found = [p_value(c, p) for c, p in ((heated, at_t), (plain, at_1), (heated, at_1))]
    print(f"chi-square: p {found[0]:.2f} at T, {found[1]:.2f} plain at 1, {found[2]:.1e} at 1")
    assert found[0] > 0.01 and found[1] > 0.01 and found[2] < 1e-6


def test_other_requests_are_untouched_to_the_last_bit(engine, reference, monkeypatch):
    made = mixed_requests(reference, 24, seed=4)
    prompts = [m[0] for m in made]
    settings = [m[1] | dict(seed=n, ignore_eos=True, max_tokens=12) for n, m in enumerate(made)]
    beside = generate(engine, prompts, settings)
    monkeypatch.setattr(AdaptiveTemperature, "apply", lambda self, logits, context=None: logits)
    alone = generate(engine, prompts, settings)
    changed = 0
    for (_, _, rule), one, other in zip(made, beside, alone):
        one, other = one.outputs[0], other.outputs[0]
        logprobs = [
            [{k: v.logprob for k, v in d.items()} for d in o.logprobs] for o in (one, other)
        ]
        same = one.token_ids == other.token_ids and logprobs[0] == logprobs[1]
        assert same or rule
        changed += not same
    assert changed > 6 and sum(rule is None for _, _, rule in made) > 6


@pytest.mark.parametrize(
    "given",
    [[1, 2], {"pivot": 1}, "hot", [0, 1, 1, -1, 0.1, 1, "warm"], [0, 1, 1, 1, 0.1, 1, "bounded"]],
)
def test_a_malformed_request_is_refused_and_the_engine_keeps_running(engine, given):
    settings = dict(temperature=1.0, max_tokens=2, extra_args={"hapo": given})
    with pytest.raises(Exception, match=r"extra_args\['hapo'\] must be a list of pivot, sigma"):
        generate(engine, [[5, 6]], [settings])
    (out,) = generate(engine, [[5, 6]], [dict(temperature=1.0, max_tokens=2, ignore_eos=True)])
    assert len(out.outputs[0].token_ids) == 2


def test_the_probe_tells_whether_a_is_applied(engine, monkeypatch):
    check_engine(engine)
    monkeypatch.setattr(AdaptiveTemperature, "apply", lambda self, logits, context=None: logits)
    with pytest.raises(ValueError, match="does not apply HAPO's adaptive temperature"):
        check_engine(engine)


def test_a_second_object_of_an_engine_does_nothing(engine):
    config = engine.llm_engine.vllm_config
    second = AdaptiveTemperature(config, torch.device("cpu"))
    logits, entry = torch.randn(2, 384), vllm_temperature.request_arguments(statistics(-3.0))
    params = type("Params", (), {"extra_args": entry, "temperature": 1.0})
    second.add_request(0, params)
    assert not second.acts and torch.equal(second.apply(logits.clone()), logits)


SPECULATIVE = """
import sys
from vllm import LLM
from bridges.vllm_temperature import check_engine

if __name__ == "__main__":
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
              gpu_memory_utilization=0.3, speculative_config=ngram | {"prompt_lookup_min": 2})
    try:
        check_engine(llm)
    except ValueError as error:
        print("refused:", error)
"""


def test_an_engine_with_speculative_decoding_is_refused(folder, tmp_path):
    (tmp_path / "speculative.py").write_text(SPECULATIVE, encoding="utf-8")
    env = os.environ | ROOM | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "speculative.py", str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert "refused: this vLLM engine does not apply" in done.stdout, done.stderr[-2000:]


@pytest.fixture(scope="module")
def server(folder):
    """The address of a vLLM server, whose workers are spawned and find the entry point."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", "8123"]
    command += ["--model", str(folder), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--max-num-seqs", "16"]
    command += ["--logprobs-mode", "processed_logprobs"]
    command += ["--gpu-memory-utilization", "0.3"]
    spawned = ROOM | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, cwd="/", env=os.environ | spawned)
    address = "http://127.0.0.1:8123"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{address}/health")
            break
        except OSError:
            assert process.poll() is None
            time.sleep(1)
    yield address
    process.terminate()
    process.wait()


def post(address, **body):
    """(status, answer) of a completion."""
    body = dict(prompt=[5, 6, 7, 8], seed=3, return_tokens_as_token_ids=True) | body
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        return 200, json.load(urllib.request.urlopen(request))
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.skipif(REGISTER != "entry", reason="a server finds the class by its entry point")
def test_statistics_travel_over_http(server, reference, folder):
    stats = statistics(-3.0)
    for sent in (None, request_arguments(stats, tau=0.9)):
        body = dict(model=str(folder), max_tokens=6, temperature=1.0, logprobs=1)
        status, answer = post(server, **body, **({"vllm_xargs": sent} if sent else {}))
        given = answer["choices"][0]["logprobs"]
        ids = [int(token.removeprefix("token_id:")) for token in given["tokens"]]
        rule = dict(stats=stats if sent else None, tau=0.9)
        logits, T = temperatures(reference, [5, 6, 7, 8, *ids], len(ids), rule)
        expected = (logits / T[:, None]).log_softmax(-1)[range(len(ids)), ids]
        assert torch.allclose(torch.tensor(given["token_logprobs"]), expected, atol=TOLERANCE)
        assert not sent or T.max() > 1.5
    status, text = post(server, **body, vllm_xargs={"hapo": [1, 2]})
    assert status == 400 and "must be a list of pivot" in text
    drawn = []
    for probe in vllm_temperature.probe_requests():
        probe["vllm_xargs"] = probe.pop("extra_args")
        _, answer = post(server, model=str(folder), logprobs=1, **probe)
        drawn.append([choice["logprobs"]["tokens"][0] for choice in answer["choices"]])
    assert [len(tokens) for tokens in drawn] == [64, 64]
    vllm_temperature.check_draws(*drawn)
