"""The memory estimate: numbers worked by hand on a small shape, and which option it blames."""

import json
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, random_model

import internals
import train
from common.errors import UserError
from common.models import load_config
from engine import memory
from engine.logprobs import LOGIT_CHUNK_BYTES, chunk_of
from run import option_checks, setup
from run.batch import rollout_of

STEP = "--estimate --prompts-per-step 4 --num-generations 2 --updates-per-rollout 2"


def once(function):
    """The same function, which works once for each configuration."""
    known = {}

    def remembered(config, *more):
        key = (config.to_json_string(use_diff=False), *more)
        if key not in known:
            known[key] = function(config, *more)
        return known[key]

    return remembered


@pytest.fixture(autouse=True, scope="module")
def parameters_are_counted_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "parameter_count", once(memory.parameter_count))
        yield


@pytest.fixture
def benchmarks(monkeypatch):
    """benchmarks/gpu.py and fit_table.py; what they replace in train.py is put back."""
    monkeypatch.syspath_prepend(ROOT / "experiments" / "benchmarks")
    monkeypatch.setattr(train, "grade", train.grade)
    import fit_table
    import gpu

    return SimpleNamespace(gpu=gpu, fit_table=fit_table)


def some_options(*more):
    return option_checks.parse([*STEP.split(), "--max-new-tokens", "10", *more], "")


def test_parts_by_hand():
    model = random_model(layers=3, vocab=50, hidden=32)
    parameters = sum(p.numel() for p in model.parameters())

    def needs(*more):
        return memory.estimate(model.config, some_options(*more), prompt_tokens=6, cuda=True)

    e = needs()
    assert e.parameters == parameters
    assert e.weights == e.gradients == 4 * parameters
    assert e.moments == 8 * parameters and e.replica == 2 * parameters
    held = needs("--kl", "0.1")
    assert e.reference == 0 and held.reference == 4 * parameters == held.peak - e.peak
    # KV cache: 8 answers x 16 tokens x 3 layers x (keys, values) x 2 heads x head size x 2 bytes;
    # captured steps see whole blocks of 256 positions
    position = 8 * 3 * 2 * 2 * model.config.head_dim * 2
    assert e.kv_cache == 256 * position
    assert needs("--no-capture").kv_cache == 16 * position
    # a layer's work on the 4 prompts of 6 tokens, more than logits of 8 rows and three like them
    assert e.sampling == 24 * 2 * (3 * 64 + 4 * 32) > 8 * 50 * 4 * 4
    assert needs("--prefill-tokens", "6").sampling == 8 * 50 * 4 * 4
    few = needs("--no-capture", "--decode-rows", "5")  # two whole groups
    assert few.kv_cache == 16 * position // 2 and few.sampling == e.sampling // 2
    # the logits chunk is never larger than an update's answers, 4 x 10: logits and their gradient;
    # the unembedding's own gradient, twice
    assert e.logits == 40 * 50 * 8 + 2 * 4 * 50 * 32
    # 4 answers of 10 tokens, two to a line with their prompt of 6, and the lines' masks;
    # bfloat16 weights
    size = model.config.head_dim
    a_token = 2 * (4 * 64 + 2 * 4 * size + 2 * 2 * size) + 26 * 32
    assert e.activations == 3 * (2 * 26 * a_token + 2 * 26 * 26 * 2) + 2 * parameters
    # with checkpointing: one hidden state a layer; one layer's insides, behind the chunks
    less = needs("--gradient-checkpointing")
    insides = 52 * a_token + 2 * 26 * 26 * 2 - 40 * 50 * 8
    assert less.activations == 52 * 4 * 32 * 3 + insides + 2 * parameters
    # answers of 100 tokens stand alone: 4 lines of 106
    alone = needs("--max-new-tokens", "100")
    assert alone.activations == 3 * 4 * 106 * a_token + 2 * parameters
    # 52 real tokens are 4 answers and their two prompts, in two lines as above; one answer always
    # goes through, in a line of its own
    assert needs("--micro-tokens", "55").activations == e.activations
    assert needs("--micro-tokens", "1000").activations == e.activations
    one = 3 * 16 * a_token + 2 * parameters
    assert (
        needs("--micro-tokens", "5").activations == needs("--micro-batch", "1").activations == one
    )
    # answers that are too long for a shared line fill passes up to the limit, however long
    long = needs("--micro-tokens", "2200", "--max-new-tokens", "1050")
    assert long.activations == 3 * 2200 * a_token + 2 * parameters
    updating, sampling = e.gradients + e.activations + e.logits, e.kv_cache + e.sampling
    assert e.peak == e.weights + e.moments + e.replica + max(updating, sampling)


def test_masters_apart_by_hand():
    """16 bytes a parameter on the card, or 6 with the rest in main memory; no replica. Two
    processes hold a half each."""
    model = random_model(layers=3, vocab=50, hidden=32)
    parameters = sum(p.numel() for p in model.parameters())
    split = memory.estimate(model.config, some_options("--split-master"))
    assert split.weights == split.gradients == 4 * parameters and split.moments == 8 * parameters
    beside = memory.estimate(model.config, some_options("--offload"))
    assert beside.weights == 2 * parameters and beside.gradients == 4 * parameters
    assert beside.moments == split.replica == beside.replica == 0
    shared = memory.estimate(model.config, some_options(), world_size=2)
    assert shared.weights == shared.gradients == 2 * parameters


def test_a_chunk_of_logits_has_a_fixed_size():
    config = load_config(TINY)
    config.vocab_size = 151_936
    o = some_options("--max-new-tokens", "512")
    for device, chunk in (("cpu", 2**27), ("cuda", 2**30)):
        assert LOGIT_CHUNK_BYTES[device] == chunk
        e = memory.estimate(config, o, prompt_tokens=512, cuda=device == "cuda")
        rows = min(chunk // (4 * 151_936), 4 * 512)
        assert min(chunk_of(151_936, device), 4 * 512) == rows
        assert e.logits == rows * 151_936 * 8 + 2 * 4 * 151_936 * config.hidden_size


CASES = [
    "--micro-batch 8",
    "--micro-batch 16 --gradient-checkpointing",
    "--micro-batch 4 --dtype bfloat16",
    "--micro-batch 8 --split-master",
]


@pytest.mark.parametrize("more", CASES)
def test_the_estimate_is_what_the_allocator_sees(more, benchmarks, monkeypatch):
    """One whole step of a small shape, as benchmarks/gpu.py takes it, on a CPU: within 15 %."""
    gpu = benchmarks.gpu
    a = SimpleNamespace(prompts=8, answers=2, answer=8, prompt=56, rehearse=True)
    monkeypatch.setitem(gpu.SHAPES, "small", (64, 320, 4, 4, 2, True))
    config, o = gpu.config_of("small"), gpu.step_options(a, more.split())
    config.vocab_size = 2_000
    run = gpu.make_run(a, config, o)
    run.engine.eos_ids = []  # answers of full length, which the estimate is of
    run.train_examples = [
        (problem, [1] * (a.prompt - len(ids)) + ids) for problem, ids in run.train_examples
    ]
    with monkeypatch.context() as patch:  # the first step makes the moments; nobody looks
        patch.setattr(gpu, "peak_on_cpu", lambda step, *holders: (step(), 0))
        gpu.measured_step(1, run)
    step, peak = gpu.measured_step(2, run)
    assert step.updates[0].outcome == "applied"
    need = memory.estimate(config, o, a.prompt, 1, cuda=False)
    assert need.peak == pytest.approx(peak, rel=0.15)


def test_diagnostics_by_hand():
    """32 answers of 10 tokens behind 20, all measured together: every layer's states, then two
    layers' log-probabilities and what becomes of them; 64 answers and no divergence where the
    boundary layer is measured once."""
    config = random_model(layers=3, vocab=50, hidden=32).config
    sizes = ["--prompts-per-step", "32", "--num-generations", "4", "--bupo-layer"]
    watched = some_options(*sizes, "2", "--diagnose-every", "1", "--dtype", "float32")
    auto = some_options(*sizes, "auto", "--dtype", "float32")
    stream = 4 * (3 + 1) + 12 * 3 + 2 * 4 * 3  # bytes a number of the hidden size, float32
    for o, tokens, a_logit in ((watched, 320, 20), (auto, 640, 8)):
        found = memory.estimate(config, o, prompt_tokens=20).diagnostics
        assert found == tokens * (32 * stream + a_logit * 50)
    assert memory.estimate(config, some_options(), prompt_tokens=20).diagnostics == 0
    long = memory.estimate(config, watched, prompt_tokens=internals.DIAGNOSED_TOKENS).diagnostics
    assert long == 10 * (32 * stream + 20 * 50)  # one sequence at a time


def test_a_device_that_is_too_small_is_named_with_the_number_to_change(monkeypatch):
    import torch

    small = lambda device: SimpleNamespace(total_memory=10**6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", small)
    dist = SimpleNamespace(device=torch.device("cuda"), size=1, sharded=False)
    more = ["--max-new-tokens", "400"]
    for given, advice in [
        (more, "--gradient-checkpointing"),
        (["--prompts-per-step", "64", "--micro-batch", "2"], "--decode-rows 64 .fewer responses"),
        (["--max-new-tokens", "1", "--no-capture"], "--split-master .a fifth less., --offload, or"),
        (["--max-new-tokens", "1", "--no-capture", "--offload"], "more processes .torchrun"),
    ]:
        fake = SimpleNamespace(
            options=some_options(*given), train_examples=[(None, [1, 2])], dist=dist
        )
        message = f"this run needs 0.. GiB and the device has 0.0; try {advice}"
        with pytest.raises(UserError, match=message):
            setup.describe(fake, load_config(TINY), print)


def test_the_benchmark_rehearses_and_records(tmp_path, benchmarks, monkeypatch, capsys):
    """benchmarks/gpu.py as a user calls it, on a CPU; without a GPU and without --rehearse one
    line. Operators by phase of one step more."""
    gpu, record = benchmarks.gpu, tmp_path / "gpu.json"
    sizes = "--shape tiny --prompts 2 --answers 4 --answer 8 --prompt 12 --micro-batch 2".split()
    more = ["--steps", "1", "--profile", "--json", str(record), "--gradient-checkpointing"]
    monkeypatch.setattr("sys.argv", ["gpu.py", *sizes, "--rehearse", *more])
    gpu.main()
    row = json.loads(record.read_text(encoding="utf-8"))
    assert row["options"] == ["--micro-batch", "2", "--gradient-checkpointing"]
    assert row["rows"] == 8 and row["ratio_off"] == 0 and 0 < row["peak_gib"] < 0.1
    assert row["tokens"] > row["answer_tokens"] > 3
    assert row["updates"][0] in ("applied", "no_signal")
    out = capsys.readouterr().out
    assert "memory:" in out and "x aten::mm" in out
    for phase in ("generate", "score", "update"):
        assert re.search(rf"^{phase}: [1-9]\d* operators, \d+ waits, 0", out, re.M)
    monkeypatch.setattr("sys.argv", ["gpu.py", *sizes])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        gpu.main()


def test_the_benchmark_decodes_alone(benchmarks, monkeypatch, capsys):
    """Answers of given lengths, and the bytes that decoding must read, by hand."""
    gpu = benchmarks.gpu
    sizes = "--shape tiny --prompts 2 --answers 4 --answer 8 --prompt 12 --rehearse".split()
    monkeypatch.setattr("sys.argv", ["gpu.py", *sizes, "--decode-alone"])
    gpu.main()
    draw = gpu.random.Random(0)
    lengths = [(draw.randint(10, 64), draw.randint(10, 64)) for _ in range(8)]
    assert f"8 answers, {sum(n for _, n in lengths)} tokens in" in capsys.readouterr().out

    model = random_model()
    rollout = rollout_of([[1, 2], [3]], [[4, 5, 6], [7]])
    run = SimpleNamespace(policy=model, engine=SimpleNamespace(replica=None))
    # tokens 1 and 2 of an answer behind a prompt of 2 see 3 and 4 keys; 2 steps; 3 layers, 2 heads
    a_position = 2 * 3 * 2 * 128 * 4
    expected = 2 * 4 * sum(p.numel() for p in model.parameters()) + (3 + 4) * a_position
    assert gpu.bytes_of_decoding(run, rollout) == expected


def test_other_benchmarks_call_what_is_there(benchmarks, monkeypatch, tmp_path):
    import decode
    import step_vs_trl

    work = decode.Work(random_model(), [[5, 6], [7]], 2, 6, [3])
    assert 4 <= decode.ours(work, 1.0) <= 24
    monkeypatch.setitem(step_vs_trl.SIZES, "coin", (4, 8))
    step_vs_trl.random_model(tmp_path)
    assert len(step_vs_trl.ours(str(tmp_path), "coin", "grpo", 3)) == 1


def ways(*more):
    """{a way to run: GiB a process} of what --estimate prints."""
    lines = memory.overview(load_config(TINY), some_options(*more)).splitlines()
    named = {line[2:28].strip(): float(line[28:37]) for line in lines if "GiB a process" in line}
    return named | {"one": float(next(line for line in lines if "peak" in line).split()[1])}


def test_an_estimate_is_of_what_it_names_whatever_the_environment(monkeypatch):
    plain = ways("--max-new-tokens", "300")
    assert {"--split-master", "--offload", "torchrun, 2 processes", "torchrun, 1, --offload"} < {
        *plain
    }
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ways("--max-new-tokens", "300") == plain
    config, o = load_config(TINY), some_options("--offload")
    need = lambda **how: memory.estimate(config, o, **how).weights
    # one process: bfloat16 weights on the card; torchrun's: gathered layer by layer
    count = memory.parameter_count(config)[0]
    assert need(sharded=False) == 2 * count and need(sharded=True) == 0
    given = ("--max-new-tokens", "300", "--prompts-per-step", "64", "--num-generations", "8")
    usual = ways(*given)
    assert ways(*given, "--dtype", "float32")["one"] > 1.2 * usual["one"]
    assert ways(*given, "--dtype", "bfloat16") == usual


def test_no_way_is_printed_that_a_run_would_refuse():
    torchrun = {"torchrun, 2 processes", "torchrun, 1, --offload"}
    apart = {"--offload", "--split-master"}
    for given, refused in (
        ("--split-master", torchrun | apart),
        ("--dtype float16", torchrun | apart),
        ("--dtype float32", apart),
        ("--prompts-per-step 2", {"torchrun, 2 processes"}),
    ):
        assert not refused & {*ways(*given.split())}, given
    assert torchrun < {*ways("--dtype", "float32")}


def test_the_table_of_cards_is_what_its_command_prints(benchmarks, monkeypatch, capsys):
    """docs/scaling.md has its lines and settings; a card takes the first setting that fits it. The
    shapes have the published numbers of parameters."""
    fit_table = benchmarks.fit_table
    monkeypatch.setattr(fit_table, "peak_of", once(fit_table.peak_of))
    fit_table.main()
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page
    for way, given in fit_table.WAYS.items():
        assert f"| **{way}** | `{given}` |" in page

    config = fit_table.config_of("Qwen2.5-0.5B")
    peaks = {way: fit_table.peak_of(config, way) for way in fit_table.WAYS}
    assert peaks["a"] > 0.9 * 40 > peaks["b"] > 0.9 * 12  # GiB
    assert fit_table.cell(config, 40) == f"**b** {peaks['b']:.1f}"
    assert fit_table.cell(config, 4) == "–" and min(peaks.values()) > 0.9 * 4
    published = {
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen3-0.6B": 596_049_920,
        "Qwen2.5-7B": 7_615_616_512,
        "Qwen3-8B": 8_190_735_360,
    }
    for name, parameters in published.items():
        assert memory.parameter_count(fit_table.config_of(name))[0] == parameters, name
