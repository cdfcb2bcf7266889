"""The model card of final/: what it states, and that it names no folder of this machine."""

import json

from run import option_checks
from run.model_card import card, given

METRICS = [
    {"step": 0, "eval_accuracy": 0.25, "eval_greedy": 0.125, "eval_length": 8.5},
    {"step": 1, "reward": 0.3},
    {"step": 1, "eval_accuracy": 0.375, "eval_greedy": 0.5, "eval_length": 9.0},
    {"step": 2, "eval_accuracy": 0.5, "eval_greedy": 0.75, "eval_length": 20.0},
]


def header_of(text):
    start, block, _ = text.split("---\n", 2)
    assert start == ""
    return {k: json.loads(v) for k, v in (line.split(": ", 1) for line in block.splitlines())}


def test_a_default_run(tmp_path):
    o = option_checks.parse(["--estimate", "--out", str(tmp_path / "secret")], "")
    text = card(o, METRICS)
    assert header_of(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reinforcement-learning", "hapo", "arxiv:2509.16591"],
    }
    assert "# tiny-qwen3, trained with HAPO\n" in text
    assert "Data: the built-in task addition, level 3. Method: HAPO, 40 steps of 256 resp" in text
    assert "| 0 | 0.250 | 0.125 | 8.5 |\n| 2 | 0.500 | 0.750 | 20.0 |" in text
    assert "```bash\npython train.py\n```" in text and "secret" not in text


def test_a_run_of_a_hub_model_on_a_file(tmp_path):
    (tmp_path / "questions.jsonl").touch()
    given = "--estimate --model Qwen/Qwen3-0.6B --algo dapo --bupo-layer 9 --lr 1e-6 --steps 200"
    paths = ["--data", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "run")]
    more = ["--instruction", "Say 'it'", "--threads", "1"]
    o = option_checks.parse([*given.split(), *paths, *more], "")
    text = card(o, METRICS)
    header = header_of(text)
    assert header["base_model"] == "Qwen/Qwen3-0.6B" and "datasets" not in header
    assert header["tags"][1:] == ["dapo", "bupo", "arxiv:2503.14476", "arxiv:2512.19673"]
    assert "# Qwen/Qwen3-0.6B, trained with DAPO with BUPO" not in text
    assert "# Qwen/Qwen3-0.6B, trained with DAPO and BuPO\n" in text
    assert str(tmp_path) not in text and "threads" not in text
    command = text.split("```bash\n")[1].split("\n```")[0]
    assert command == (
        "python train.py --model Qwen/Qwen3-0.6B --data questions.jsonl --instruction "
        "'Say '\"'\"'it'\"'\"'' --steps 200 --algo dapo --bupo-layer 9 --lr 1e-06"
    )


def test_only_options_that_change_the_result_are_listed():
    parse = lambda words: option_checks.parse(["--estimate", *words.split()], "")
    o = parse(
        "--algo grpo --no-capture --micro-batch 8 --offload --loss-mean token --eval-prompts 64"
    )
    assert given(o) == {"algo": "grpo", "loss_mean": "token", "eval_prompts": 64}
    o = parse("--no-adaptive-clip --temperature-form zscore")
    assert given(o) == {"adaptive_clip": False, "temperature_form": "zscore"}
