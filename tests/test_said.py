"""What a run says is what it did: faults that once gave plausible numbers and no error."""

import json
import math
import shutil
import types

import pytest
import torch
from conftest import verdicts
from safetensors.torch import load_file, save_file

import bupo
import evaluate
import losses
import tasks
import train
from common.errors import UserError
from engine.engine import SingleProcess
from evaluate import Response
from problems.files import DatasetSpec
from problems.grading import Grade
from problems.prompts import FILE_INSTRUCTION
from run import report
from run.batch import MicroBatchResult, Update, rollout_of
from run.setup import open_run
from sampling import NonFinite
from tasks import load_problems


def weights_of(run):
    return [p.detach().clone() for p in run.policy.parameters()]


def moved(run, before):
    return [not torch.equal(a, b) for a, b in zip(before, run.policy.parameters())]


# ------------------------------------------------------------------------------ which groups live


def test_a_length_penalty_wakes_no_dead_group(opened, monkeypatch):
    """All wrong, one of them long: the small penalty is not blown up to unit variance."""
    verdicts(monkeypatch, False, False, True, False, False, False, True, True)
    for more in ("--algo dapo", "--algo hapo", "--algo dapo --baseline edge"):
        run = opened("--overlong-buffer", "6", *more.split())
        batch = train.train_step(1, run).batch
        penalised = batch.rewards.view(-1, 2)
        assert any(penalised[i, 0] != penalised[i, 1] for i in (0, 2, 3))
        assert batch.has_reward_variance.tolist() == [False, False, True, True] + [False] * 4
        assert batch.advantages[[0, 1, 4, 5, 6, 7]].abs().max() == 0 < batch.advantages.abs().max()


def test_live_groups_are_dealt_out_to_the_updates(opened, monkeypatch):
    """Two rounds of 4 groups, live ones 1, 3 | 4: of four places the first three are live, and the
    two updates get two and one of them, not the first all."""
    live, dead = (True, False), (False, False)
    verdicts(monkeypatch, *dead, *live, *dead, *live, *live, *dead, *dead, *dead)
    more = "--dynamic-sampling --max-rounds 2 --updates-per-rollout 2"
    run = opened("--algo", "dapo", *more.split())
    rounds, real = [], train.generate_and_grade
    keep = lambda *args: rounds.append(real(*args)) or rounds[-1]
    monkeypatch.setattr(train, "generate_and_grade", keep)
    step = train.train_step(1, run)
    drawn = [p.question for part in rounds for p in part.problems]
    # dealt out in turn: places 0 and 2 of the list to the first update, 1 and 3 to the second
    expected = [drawn[i] for i in (1, 4, 3, 0)]
    assert [p.question for p in step.batch.problems] == expected
    assert step.batch.in_loss.tolist() == [True] * 6 + [False] * 2
    assert [u.outcome for u in step.updates] == ["applied", "applied"]
    assert report.step_metrics(step, report.weight_sample(run), run)["groups"] == 8


def test_a_nan_reward_is_not_replaced_by_dynamic_sampling(opened, monkeypatch):
    """A reward function that failed: its group has no variance that could be told, and the step is
    refused, whether or not the group would have been replaced."""
    verdicts(monkeypatch, True, False)
    run, draw, rounds = (
        opened("--dynamic-sampling", "--max-rounds", "2"),
        train.generate_and_grade,
        [],
    )

    def with_a_fault(*args):
        batch = draw(*args)
        if not rounds:
            batch.rewards[0] = math.nan
            batch.has_reward_variance[:2] = False
        rounds.append(batch)
        return batch

    monkeypatch.setattr(train, "generate_and_grade", with_a_fault)
    with pytest.raises(NonFinite, match="a reward is NaN"):
        train.train_step(1, run)
    assert len(rounds) == 2


def test_an_update_without_a_token_moves_nothing(opened, monkeypatch):
    """KL and dynamic sampling, all groups dead: no momentum, no decay."""
    right = [True]
    monkeypatch.setattr(
        "train.grade", lambda problem, text, *more: Grade(*[right.pop() or False] * 2)
    )
    run = opened("--kl", "0.1", "--dynamic-sampling", "--max-rounds", "1", "--lr", "1e-2")
    right[:] = [True, False] * 4
    assert train.train_step(1, run).updates[0].outcome == "applied"  # AdamW has its moments
    before, right[:] = weights_of(run), [False] * 8
    assert train.train_step(2, run).updates == [train.Update()]
    assert not any(moved(run, before))


# ------------------------------------------------------------------------------------------- steps


def test_a_step_with_one_skipped_update_is_a_step(opened, monkeypatch):
    verdicts(monkeypatch, True, False)
    run = opened("--updates-per-rollout", "2", "--eval-every", "1")
    count, original = [0], losses.masked_mean

    def mean_loss(*args):
        count[0] += 1
        return original(*args) * (math.nan if count[0] in (1, 3, 4) else 1.0)

    monkeypatch.setattr(losses, "masked_mean", mean_loss)
    metrics, bad = train.guarded_step(1, run)
    assert bad is None and "eval_greedy" in metrics
    assert (metrics["updates"], metrics["skipped_updates"]) == (1, 1)
    numbers = [x for x in metrics.values() if isinstance(x, float)]
    assert all(map(math.isfinite, numbers)) and metrics["grad_norm"] > 0
    _, bad = train.guarded_step(2, run)
    assert bad == "no update applied, 2 were not finite"


def test_kl_old_is_the_kl_of_old_and_new():
    """k3 under the old policy's samples: exp(d) - d - 1 with d = new - old has the mean KL(old ||
    new). By hand over a distribution of three."""
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    expected = (old * (old / new).log()).sum().item()
    estimate = (old * losses.kl_k3(old.log(), new.log())).sum().item()
    assert estimate == pytest.approx(expected, rel=1e-6)
    other = (old * losses.kl_k3(new.log(), old.log())).sum().item()
    assert other != pytest.approx(expected, rel=0.1)


def test_kl_old_of_an_update(opened, monkeypatch):
    verdicts(monkeypatch, True, False)
    run = opened("--algo", "dapo")
    batch = train.train_step(1, run).batch
    rows = list(range(8))
    mask = batch.loss_mask.float()
    logp = batch.old.logp + 0.5 * mask
    loss = train.policy_loss(logp, batch, rows, run)
    update = Update("applied", 0.0, 0.0, [MicroBatchResult(rows, logp, loss)])
    expected = (math.exp(0.5) - 0.5 - 1) * mask.sum().item()
    counts = report.clip_counts([update], batch)
    assert counts["kl_old"] == pytest.approx(expected, rel=1e-4)
    # e^0.5 is beyond 1.28: clipped where the advantage is positive, outside everywhere
    right = (batch.advantages > 0).sum().item()
    assert counts["clip_high"] == right > 0 == counts["clip_low"] == counts["clamped"]
    assert counts["outside"] == counts["tokens"] == mask.sum().item()
    ((largest, off),) = report.largest_ratios([update], batch, run)
    assert (largest, off) == pytest.approx((math.exp(0.5), math.exp(0.5) - 1))


# -------------------------------------------------------------------------------------------- BuPO


def test_the_final_norm_is_applied_and_not_trained(opened, monkeypatch):
    verdicts(monkeypatch, True, False)
    run = opened(*"--bupo-layer 2 --bupo-steps 1 --bupo-norm".split())
    start = run.policy.model.norm.weight.detach().clone()
    train.train_step(1, run)
    assert torch.equal(run.policy.model.norm.weight, start)
    assert run.policy.model.norm.weight not in run.engine.optimizer.state
    train.train_step(2, run)
    assert not torch.equal(run.policy.model.norm.weight, start)


def test_the_boundary_layer_weighs_processes_by_their_tokens(opened, monkeypatch):
    """Process 0 has 3 tokens and a change of -1 in layer 2; another has 1 token and +2."""
    change = torch.tensor([1.0, -1.0, -1.0])
    entropy = type("E", (), {"feed_forward_change": change})
    monkeypatch.setattr(bupo, "internal_entropy", lambda *args, **kwargs: entropy)

    class Two(SingleProcess):
        size = 2

        def all_reduce_sum(self, *numbers):
            other = (1.0, 2.0, -1.0, 1)  # three changes times one token, and the token
            return [float(a) + b for a, b in zip(numbers, other)]

    answers = rollout_of([[1]], [[2, 3, 4]]).with_response_mask(1)
    found = bupo.measure_boundary(None, *answers, None, Two("cpu"))
    # layer 2: (3 x -1 + 1 x 2) / 4 < 0; unweighted it would be (-1 + 2) / 2 > 0
    assert found.layer == 1 and found.found
    assert found.change.tolist() == [1.0, -0.25, -1.0]


def test_answers_for_a_measurement_are_spread_over_the_batch():
    rollout = rollout_of([[i] for i in range(100)], [[i] for i in range(100)])
    ids, _, _ = rollout.with_response_mask(64)
    firsts = ids[:, 0].tolist()
    assert len(set(firsts)) == 64 and max(firsts) > 95
    assert rollout_of([[1], [2]], [[3], [4]]).with_response_mask(64)[0].shape == (2, 2)


# ------------------------------------------------------------------------------------- evaluations


def test_expected_live_groups_are_counted_not_computed_from_a_mean(opened, monkeypatch):
    """Half the prompts always right, half never: no group is live, though 1 - p^G - (1-p)^G says
    half of them."""
    run = opened()

    def half(run, problems, *args):
        groups = [
            [Response("", Grade(*[i % 2 == 0] * 2), 3, True)] * 2 for i in range(len(problems))
        ]
        return groups

    monkeypatch.setattr(report, "evaluate_over", half)
    report.first_look(run)
    first = json.loads((run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["pass_rate"] == pytest.approx(0.5, abs=0.03)
    assert first["expected_live_groups"] == 0


def test_the_probe_is_drawn(opened, monkeypatch):
    run, asked = opened("--data", "", "--task", "countdown"), []

    def remember(run, problems, *args):
        asked.append([p.question for p in problems])
        return [[Response("", Grade(True, True), 3, True)]] * 2

    monkeypatch.setattr(report, "evaluate_over", remember)
    report.first_look(run)
    order = [p.question for p, _ in run.train_examples]
    places = [order.index(q) for q in asked[-1]]
    assert len(places) == 64 and max(places) > len(order) // 2


def test_rows_at_once_change_no_draw(opened):
    run = opened()
    problems = [p for p, _ in run.train_examples[:7]]
    texts = []
    for rows in (2, 6, 100):
        how = dict(seed=3, rows_at_once=rows)
        args = (run.engine.generate, run.tokenizer, problems, 2, 6)
        answers = evaluate.sample_responses(*args, **how)
        texts.append([a.text for row in answers for a in row])
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 7
    # two processes that share the problems out draw what one draws
    parts = [
        evaluate.sample_responses(
            *args[:2], problems[r::2], *args[3:], seed=3, numbers=range(r, 7, 2)
        )
        for r in (0, 1)
    ]
    merged = [parts[i % 2][i // 2] for i in range(7)]
    assert [a.text for row in merged for a in row] == texts[0]


def test_eval_prompts_do_not_change_the_split(tmp_path, opened):
    path = tmp_path / "many.jsonl"
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    few, many = (opened("--data", str(path), "--eval-prompts", n) for n in ("4", "400"))
    assert [p for p, _ in few.train_examples] == [p for p, _ in many.train_examples]
    assert len(few.train_examples) == 80


def test_held_out_questions_that_are_trained_on_are_reported(tmp_path, opened, capsys):
    path = tmp_path / "held.jsonl"
    rows = [{"question": "What is 3 plus 1?", "answer": "4"}, {"question": "new", "answer": "1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    opened("--eval-data", str(path))
    assert "1 of the 2 questions of --eval-data" in capsys.readouterr().out


def test_the_rows_of_eval_data_are_drawn(tmp_path, opened):
    """The first --eval-prompts of them are asked, and a file may be sorted by difficulty."""
    path = tmp_path / "held.jsonl"
    rows = [{"question": f"number {n}?", "answer": n} for n in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked, again = (
        [int(p.answer) for p in opened("--eval-data", str(path)).held_out] for _ in "ab"
    )
    assert sorted(asked) == list(range(50)) != asked == again


def test_evaluate_says_what_was_trained_on(tmp_path, capsys):
    data, out = tmp_path / "q.jsonl", tmp_path / "run"
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(50)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out.mkdir()
    config = dict(prompts_per_step=4, data=str(data), eval_data="", task="countdown", difficulty=3)
    (out / "config.json").write_text(
        json.dumps(config | {"model": "assets/tiny-qwen3"}), encoding="utf-8"
    )
    problems = tasks.read_problems(data)
    held_out = load_problems("countdown", str(data))[1]
    assert "40 of the 50" in evaluate.trained_on(str(out / "final"), problems)
    assert evaluate.trained_on(str(out / "final"), held_out) is None
    assert evaluate.trained_on(str(tmp_path), problems) is None
    # a run that was started from this one has trained on its questions, too
    later, own = tmp_path / "later", {"model": str(out / "final"), "data": "", "task": "arithmetic"}
    later.mkdir()
    (later / "config.json").write_text(
        json.dumps(config | own | {"difficulty": 1}), encoding="utf-8"
    )
    assert "40 of the 50" in evaluate.trained_on(str(later / "final"), problems)
    spaced = [tasks.Problem("  0  +  1? ", "1"), tasks.Problem("1 + 1 ?", "2")]
    train_set = load_problems("countdown", str(data))[0]
    asked = sum(p.question == "0 + 1?" for p in train_set)
    assert (evaluate.trained_on(str(later / "final"), spaced) or "0 of")[:4] == f"{asked} of"
    sums = load_problems("arithmetic", difficulty=1)[0]
    swapped = [
        tasks.Problem(
            "What is {4} plus {2}?".format(
                *p.question.rstrip("?").split(),
            ),
            p.answer,
            p.kind,
        )
        for p in sums[:9]
    ]
    assert "9 of the 9" in evaluate.trained_on(str(later / "final"), swapped)
    (out / "config.json").write_text(
        json.dumps(config | {"model": str(later / "final")}), encoding="utf-8"
    )
    assert "40 of the 50" in evaluate.trained_on(str(later / "final"), problems)  # a circle ends
    data.unlink()
    assert "cannot tell" in evaluate.trained_on(str(out / "final"), problems)


def test_evaluate_asks_what_the_run_held_out(tmp_path):
    """And says so: its task and level, or its file; --task and --data come first."""
    data = tmp_path / "q.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": 2}\n' * 2, encoding="utf-8")
    run = dict(task="arithmetic", difficulty=3, data="", eval_data="", instruction="Short.")
    run |= {"max_new_tokens": 9}
    args = dict(task=None, difficulty=None, data=None, instruction=None, max_new_tokens=None)
    args |= dict(data_split="test", question_column="", answer_column="")
    asked = lambda run, **given: evaluate.evaluation_set(types.SimpleNamespace(**args | given), run)
    assert asked(run)[:6] == ("arithmetic", 3, "", "", "Short.", 9)
    assert asked(run, difficulty=2, instruction="", max_new_tokens=5)[1:5:3] == (2, "")
    assert asked(run, task="addition")[:6] == ("addition", 3, "", "", "Short.", 40)
    assert asked(run, data="f.jsonl")[:6] == ("addition", None, "f.jsonl", "", "Short.", 512)
    older = {"task": "addition", "difficulty": 2, "max_new_tokens": 9}  # of before --instruction
    assert asked(older)[:6] == ("addition", 2, "", "", "", 9)
    assert asked(None)[:6] == ("addition", 3, "", "", "", 40)
    of_a_file = ("addition", None, "f.jsonl", "", FILE_INSTRUCTION, 512)
    assert asked(None, data="f.jsonl")[:6] == of_a_file
    columns = dict(question_column="q", answer_column="a", data_split="dev")
    assert asked(None, data="f.jsonl", **columns).form == DatasetSpec("dev", "q", "a")
    assert asked(run | columns).form == DatasetSpec("dev", "q", "a")
    of_file = run | {"data": str(data), "eval_data": str(data)}
    assert asked(of_file | columns).form == DatasetSpec("test", "q", "a")
    assert asked(of_file)[2:4] == (str(data), str(data))
    args = types.SimpleNamespace(**args)
    problems = evaluate.held_out_questions(args, evaluate.evaluation_set(args, of_file))
    assert [p.question for p in problems] == ["1 + 1?"] * 2
    problems = evaluate.held_out_questions(args, evaluate.evaluation_set(args, run))
    assert problems == load_problems("arithmetic", difficulty=3)[1]


# ------------------------------------------------------------------------------------------ resume


@pytest.fixture
def started(tmp_path, tiny_folder, opened, monkeypatch):
    """A run of one step whose model and questions may be changed: (its folder, both)."""
    verdicts(monkeypatch, True, False)
    model = shutil.copytree(tiny_folder, tmp_path / "start")

    def start(*more):
        run = opened("--model", str(model), *more)
        train.checkpoint.save(run, 0)
        run.lock.lock.release()
        return run.out, model, run.options.data

    return start


def resumed(out, *more):
    options = train.parse(["--out", str(out), "--resume", *map(str, more)], "")
    run, step = open_run(options, SingleProcess("cpu"))
    run.lock.lock.release()
    return run, step


def nudge(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_another_initial_model_is_refused(started, tmp_path):
    out, model, _ = started("--kl", "0.1")
    same = shutil.copytree(model, tmp_path / "same")
    assert resumed(out, "--model", same)[1] == 0  # the same model in another place
    nudge(same)
    with pytest.raises(UserError, match="its weights are not those that the run"):
        resumed(out, "--model", same)
    nudge(model)
    with pytest.raises(UserError, match="its weights are not those"):
        resumed(out)


def test_another_model_is_refused_without_a_reference_too(started, tmp_path):
    out, model, _ = started()
    other = shutil.copytree(model, tmp_path / "other")
    nudge(other)
    with pytest.raises(UserError, match="name that model"):
        resumed(out, "--model", other)
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["model"] == str(model)
    shutil.rmtree(model)
    assert resumed(out)[1] == 0  # nothing needs it


def test_changed_questions_are_refused(started, monkeypatch):
    out, _, data = started()
    text = open(data, encoding="utf-8").read()
    open(data, "w", encoding="utf-8").write(text.replace('"answer": "5"', '"answer": "6"'))
    with pytest.raises(UserError, match="the questions in use are not those"):
        resumed(out)
    open(data, "w", encoding="utf-8").write(text)
    assert resumed(out)[1] == 0


# ------------------------------------------------------------------------------------- instruction


def test_the_instruction_is_asked_saved_and_taken_over(opened, tmp_path):
    run = opened()
    assert all(p.question.endswith(f"\n{FILE_INSTRUCTION}") for p, _ in run.train_examples)
    assert all(p.question.endswith(FILE_INSTRUCTION) for p in run.held_out)
    assert FILE_INSTRUCTION in run.tokenizer.decode(run.train_examples[0][1])
    for text in ("", "Be brief."):
        other = opened("--instruction", text)
        question = other.train_examples[0][0].question
        assert question.endswith("plus 1?" if not text else "plus 1?\nBe brief.")
        saved = json.loads((other.out / "config.json").read_text(encoding="utf-8"))["instruction"]
        assert saved == text
    assert opened("--data", "", "--task", "arithmetic").options.instruction == ""
