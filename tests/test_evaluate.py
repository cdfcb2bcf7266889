"""pass@k against counting, standard errors by hand, and the command line."""

import itertools
import json

import pytest
from conftest import TINY

import evaluate
from common.errors import UserError
from evaluate import Response, pass_at_k, summarise, valid_json
from problems.grading import Grade


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n, c in ((1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 3)):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12), (n, c, k)
    assert pass_at_k(256, 1, 256) == 1
    assert pass_at_k(256, 1, 1) == pytest.approx(1 / 256)
    assert pass_at_k(256, 128, 200) == 1
    with pytest.raises(ValueError):
        pass_at_k(4, 5, 1)


def test_summary_by_hand():
    # question 1: 2 of 2 lenient, 1 strict; question 2: none
    # means 1, 0: mean 0.5, error sqrt(1/2) / sqrt(2) = 0.5
    answers = [
        [Response("a", Grade(True, True), 3, True), Response("b", Grade(False, True), 5, True)],
        [Response("c", Grade(False, False), 4, False), Response("d", Grade(False, False), 4, True)],
    ]
    result = summarise(answers)
    assert result.lenient == 0.5 and result.strict == 0.25
    assert result.lenient_error == pytest.approx(0.5)
    assert result.finished == 0.75 and result.length == 4


def test_json_has_no_nan():
    values = {"a": [float("nan"), 1.5], "b": {"c": float("inf")}, "d": "NaN", "e": True}
    assert valid_json(values) == '{"a": [null, 1.5], "b": {"c": null}, "d": "NaN", "e": true}'


def test_questions_longer_than_the_context_are_reported(tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    rows = [{"question": "1 " * 600, "answer": "1"}, {"question": "1 + 1?", "answer": "2"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = ["--model", str(TINY), "--data", str(path), "--samples", "1", "--device", "cpu"]
    result = evaluate.main([*args, "--max-new-tokens", "4", "--out", str(tmp_path / "r.json")])
    assert result["questions"] == 1
    assert "1 of 2 prompts are longer than the model's context" in capsys.readouterr().out
    # one question has no standard error
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["lenient_error"] is None
    message = "--max-new-tokens 512: no prompt fits the model's context of 512 tokens"
    with pytest.raises(UserError, match=message):
        evaluate.main(args)
    with pytest.raises(UserError, match="--out .*: not a file that can be written"):
        evaluate.main([*args, "--out", str(tmp_path)])


def test_command_line(tmp_path):
    args = ["--model", str(TINY), "--samples", "4", "--limit", "8", "--device", "cpu"]
    result = evaluate.main([*args, "--out", str(tmp_path / "r.json")])
    assert result == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert result == evaluate.main([*args, "--no-self-check"])
    shares = [result[k] for k in ("strict", "lenient", "pass@2_lenient", "pass@4_lenient")]
    assert all(a <= b for a, b in zip([0, *shares], [*shares, 1]))
    mistakes = ("--samples 300", "--samples 300"), ("--temperature 0", "greedy"), ("--limit 0",) * 2
    for bad, message in mistakes:
        with pytest.raises(UserError, match=message):
            evaluate.main([*args, *bad.split()])
