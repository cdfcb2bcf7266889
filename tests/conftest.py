import json
import pathlib
import re
import sys

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tasks  # noqa: E402
import train  # noqa: E402
from common.command import run_main  # noqa: E402
from engine.engine import SingleProcess  # noqa: E402
from problems.grading import Grade  # noqa: E402
from run import option_checks  # noqa: E402
from run.setup import open_run  # noqa: E402

TINY = ROOT / "assets" / "tiny-qwen3"
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fewer_questions(monkeypatch):
    """A built-in task draws 20,000 questions; a run of two steps needs no more than these."""
    monkeypatch.setattr(tasks, "QUESTIONS", 1_000)


@pytest.fixture
def unchanged():
    """unchanged(f, *args): call f and hold it to the rule that no function alters its inputs."""

    def check(function, *args, **kwargs):
        before = [a.detach().clone() if torch.is_tensor(a) else a for a in args]
        result = function(*args, **kwargs)
        for old, new in zip(before, args):
            if torch.is_tensor(old):
                assert torch.equal(old, new), f"{function.__name__} changed an input"
        return result

    return check


ARCHITECTURES = ["Qwen2", "Qwen3", "Llama"]


def random_model(architecture="Qwen3", tied=True, layers=3, vocab=50, hidden=32, scale=3.0):
    """A small random decoder; `scale` sharpens the unembedding so that its distributions are far
    from uniform."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=None,
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(scale)
    return model


@pytest.fixture(
    params=[(a, t) for a in ARCHITECTURES for t in (True, False)],
    ids=lambda x: f"{x[0]}-{'tied' if x[1] else 'untied'}",
)
def any_model(request):
    return random_model(*request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A three-layer Qwen3 with random weights and the shipped tokenizer: train.py's path at a tenth
    of the price."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(2)
    model = random_model(layers=3, vocab=384, hidden=32, scale=4.0)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_questions(path):
    """A small file of questions that the shipped model answers with an expression; its last number
    is sometimes the answer."""
    with open(path, "w", encoding="utf-8") as file:
        for a in range(1, 7):
            for b in range(7, 12):
                task = f"Use {a}, {b}, {a + b} once each with + - * / to make {2 * a}."
                question = f"{task} Reply with the expression only."
                file.write(json.dumps({"question": question, "answer": str(a)}) + "\n")


def checkpoint_layers(model):
    # its name from transformers 5.20 on
    older = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})


def named_beside_equations():
    """The tests of docs/equations.md's last column: {(file, test)}; a file alone is all of it."""
    named = set()
    for line in (ROOT / "docs" / "equations.md").read_text(encoding="utf-8").splitlines():
        file = None
        for word in re.findall(r"`(test_\w+(?:\.py)?(?:::test_\w+)?)`", line.split("|")[-2:][0]):
            if word.endswith(".py"):
                named.add((word, None))
                continue
            file, name = word.split("::") if "::" in word else (file, word)
            named.add((file, name))
    return named


def pytest_runtest_setup(item):
    """A test marked optional("package") is skipped where the package is not installed."""
    for mark in item.iter_markers("optional"):
        for package in mark.args:
            pytest.importorskip(package)


def pytest_collection_modifyitems(items):
    """Tests beside equations are marked. First of all comes the test that starts other processes:
    they work beside the tests that follow."""
    named = named_beside_equations()
    for item in items:
        file, name = item.path.name, item.name.partition("[")[0]
        if (file, name) in named or (file, None) in named:
            item.add_marker("mathematics")
    items.sort(key=lambda item: item.name != "test_one_process_hands_over_to_two")


SMALL = (
    "--prompts-per-step 4 --num-generations 2 --updates-per-rollout 1 --max-new-tokens 6 "
    "--eval-prompts 4 --steps 3 --warmup-steps 1 --lr 1e-3 --device cpu --no-self-check"
).split()


def program(monkeypatch, main, name, *arguments):
    """Call main() of a program as `python NAME ARGUMENTS` does, in this process: its exit code."""
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    try:
        run_main(main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def opened(tmp_path, tiny_folder):
    """opened(*options): a run on a small random model, before its first step."""

    questions = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {n} plus 1?", "answer": str(n + 1)} for n in range(30)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def open_one(*more):
        out = str(tmp_path / str(len(list(tmp_path.iterdir()))))
        where = ["--model", str(tiny_folder), "--data", str(questions), "--out", out]
        arguments = [*SMALL, *where, *more]
        return open_run(option_checks.parse(arguments, ""), SingleProcess("cpu"))[0]

    return open_one


def sharpened(run):
    """The run with entropies of 0.1 to 2 nats, not 5.5; and one id in nine ends a response."""
    with torch.no_grad():
        for model in filter(None, (run.policy, run.reference)):
            model.model.norm.weight.mul_(12)
    run.engine.eos_ids = range(2, 384, 9)
    return run


def drawn(run, layer=None):
    """The batch of a step as it is before it is scored: responses drawn and graded."""
    return train.generate_and_grade(1, 0, layer, run.options.temperature, run)


def given_batch(monkeypatch, batch):
    """The next steps take this batch instead of drawing one."""
    monkeypatch.setattr(train, "generate_and_grade", lambda *args: batch)


def changed_scores(monkeypatch, run, change):
    """change(scores, model): the scores of a step before its updates are what it returns."""
    real = run.engine.batch_logprobs
    monkeypatch.setattr(
        run.engine,
        "batch_logprobs",
        lambda model, *args, **more: change(real(model, *args, **more), model),
    )


def verdicts(monkeypatch, *right):
    """The answers of every round are right as listed, over and over."""
    count = [-1]

    def grade(problem, text, *more):
        count[0] += 1
        return Grade(*[right[count[0] % len(right)]] * 2)

    monkeypatch.setattr("train.grade", grade)


class Asks(TorchDispatchMode):
    """Counts what would make Python wait for a GPU: numbers read one by one, masks as indices."""

    NAMES = "_local_scalar_dense nonzero is_nonzero masked_select equal unique".split()
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += masked or name in self.NAMES
        return function(*args, **(kwargs or {}))
