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
from run import first_look, report
from run.batch import MicroBatchResult, Update, rollout_of
from run.setup import open_run
from sampling import NonFinite
from tasks import load_problems


def given(path, rows):
    """A file of questions, as text of its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def all_right(right, count=2):
    return [Response("", Grade(right, right), 3, True)] * count


def weights_of(run):
    return [p.detach().clone() for p in run.policy.parameters()]


def moved(run, before):
    return [not torch.equal(a, b) for a, b in zip(before, run.policy.parameters())]


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
    run, rounds = opened("--dynamic-sampling", "--max-rounds", "2"), []
    draw = train.generate_and_grade

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
    right = []
    monkeypatch.setattr("train.grade", lambda *args: Grade(*[right.pop()] * 2))
    run = opened("--kl", "0.1", "--dynamic-sampling", "--max-rounds", "1", "--lr", "1e-2")
    right[:] = [True, False] * 4
    assert train.train_step(1, run).updates[0].outcome == "applied"  # AdamW has its moments
    before, right[:] = weights_of(run), [False] * 8
    assert train.train_step(2, run).updates == [train.Update()]
    assert not any(moved(run, before))


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


def test_kl_old_of_an_update(opened, monkeypatch):
    """k3 under the old policy's samples, exp(d) - d - 1 with d = new - old, has the mean KL(old ||
    new)."""
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


def test_expected_live_groups_are_counted_not_computed_from_a_mean(opened, monkeypatch, capsys):
    """Half the prompts always right, half never: no group is live, though 1 - p^G - (1-p)^G says
    half of them. All or none of them right is a warning."""
    run = opened()
    for right in ([True, False], [True], [False]):
        half = lambda run, problems, *args: [all_right(right[i % len(right)]) for i in range(24)]
        monkeypatch.setattr(report, "evaluate_over", half)
        first_look.first_look(run)
    rows = (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["pass_rate"] for row in rows] == [0.5, 1, 0]
    assert [json.loads(row)["expected_live_groups"] for row in rows] == [0, 0, 0]
    warnings = [line for line in capsys.readouterr().out.splitlines() if "is almost" in line]
    assert ["almost always" in line for line in warnings] == [True, False]
    assert warnings[1].startswith("warning: the model is almost never correct")


def test_the_probe_is_drawn(opened, monkeypatch):
    run, asked = opened("--data", "", "--task", "countdown"), []

    def remember(run, problems, *args):
        asked.append([p.question for p in problems])
        return [all_right(True, 1)] * 2

    monkeypatch.setattr(report, "evaluate_over", remember)
    first_look.first_look(run)
    order = [p.question for p, _ in run.train_examples]
    places = [order.index(q) for q in asked[-1]]
    assert len(places) == 64 and max(places) > len(order) // 2


def test_rows_at_once_change_no_draw(opened):
    run = opened()
    problems = [p for p, _ in run.train_examples[:7]]
    args, texts = (run.engine.generate, run.tokenizer), []
    for rows in (2, 6, 100):
        answers = evaluate.sample_responses(*args, problems, 2, 6, seed=3, rows_at_once=rows)
        texts.append([a.text for row in answers for a in row])
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 7
    # two processes that share the problems out draw what one draws
    draw = lambda mine, numbers: evaluate.sample_responses(
        *args, mine, 2, 6, seed=3, numbers=numbers
    )
    parts = [draw(problems[r::2], range(r, 7, 2)) for r in (0, 1)]
    merged = [parts[i % 2][i // 2] for i in range(7)]
    assert [a.text for row in merged for a in row] == texts[0]


def test_eval_prompts_do_not_change_the_split(tmp_path, opened):
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(100)]
    path = given(tmp_path / "many.jsonl", rows)
    few, many = (opened("--data", path, "--eval-prompts", n) for n in ("4", "400"))
    assert [p for p, _ in few.train_examples] == [p for p, _ in many.train_examples]
    assert len(few.train_examples) == 80


def test_the_rows_of_eval_data_are_drawn_and_those_trained_on_reported(tmp_path, opened, capsys):
    """The first --eval-prompts of them are asked, and a file may be sorted by difficulty."""
    rows = [{"question": f"number {n}?", "answer": n} for n in range(50)]
    rows[7]["question"] = "What is 3 plus 1?"
    path = given(tmp_path / "held.jsonl", rows)
    asked, again = ([int(p.answer) for p in opened("--eval-data", path).held_out] for _ in "ab")
    assert sorted(asked) == list(range(50)) != asked == again
    assert "1 of the 50 questions of --eval-data" in capsys.readouterr().out


def test_evaluate_says_what_was_trained_on(tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(50)]
    data, out, later = tmp_path / "q.jsonl", tmp_path / "run", tmp_path / "later"
    given(data, rows)
    usual = dict(prompts_per_step=4, eval_data="", task="countdown", difficulty=3, data=str(data))

    def run_in(folder, **more):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(usual | more), encoding="utf-8")

    trained_on = lambda folder, problems: evaluate.trained_on(str(folder / "final"), problems)
    run_in(out, model="assets/tiny-qwen3")
    problems = tasks.read_problems(data)
    train_set, held_out = load_problems("countdown", str(data))
    assert "40 of the 50" in trained_on(out, problems)
    assert trained_on(out, held_out) is None
    assert evaluate.trained_on(str(tmp_path), problems) is None
    # a run that was started from this one has trained on its questions, too
    run_in(later, model=str(out / "final"), data="", task="arithmetic", difficulty=1)
    assert "40 of the 50" in trained_on(later, problems)
    spaced = [tasks.Problem("  0  +  1? ", "1"), tasks.Problem("1 + 1 ?", "2")]
    asked = sum(p.question == "0 + 1?" for p in train_set)
    assert (trained_on(later, spaced) or "0 of")[:4] == f"{asked} of"
    swapped = []
    for p in load_problems("arithmetic", difficulty=1)[0][:9]:
        _, _, a, _, b = p.question.rstrip("?").split()
        swapped.append(tasks.Problem(f"What is {b} plus {a}?", p.answer, p.kind))
    assert "9 of the 9" in trained_on(later, swapped)
    run_in(out, model=str(later / "final"))
    assert "40 of the 50" in trained_on(later, problems)  # a circle ends
    data.unlink()
    assert "cannot tell" in trained_on(out, problems)


def test_evaluate_asks_what_the_run_held_out(tmp_path):
    """And says so: its task and level, or its file; --task and --data come first."""
    data = given(tmp_path / "q.jsonl", [{"question": "1 + 1?", "answer": 2}] * 2)
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
    of_file = run | {"data": data, "eval_data": data}
    assert asked(of_file | columns).form == DatasetSpec("test", "q", "a")
    assert asked(of_file)[2:4] == (data, data)
    args = types.SimpleNamespace(**args)
    problems = evaluate.held_out_questions(args, evaluate.evaluation_set(args, of_file))
    assert [p.question for p in problems] == ["1 + 1?"] * 2
    problems = evaluate.held_out_questions(args, evaluate.evaluation_set(args, run))
    assert problems == load_problems("arithmetic", difficulty=3)[1]


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


def test_another_model_is_refused(started, tmp_path):
    """With a reference model of the run, and without."""
    out, model, _ = started("--kl", "0.1")
    other = shutil.copytree(model, tmp_path / "other")
    assert resumed(out, "--model", other)[1] == 0  # the same model in another place
    nudge(other)
    with pytest.raises(UserError, match="its weights are not those that the run"):
        resumed(out, "--model", other)
    plain, _, _ = started()
    with pytest.raises(UserError, match="name that model"):
        resumed(plain, "--model", other)
    assert json.loads((plain / "config.json").read_text(encoding="utf-8"))["model"] == str(model)
    nudge(model)
    with pytest.raises(UserError, match="its weights are not those"):
        resumed(out)
    shutil.rmtree(model)
    assert resumed(plain)[1] == 0  # nothing needs it


def test_changed_questions_are_refused(started, monkeypatch):
    out, _, data = started()
    text = open(data, encoding="utf-8").read()
    open(data, "w", encoding="utf-8").write(text.replace('"answer": "5"', '"answer": "6"'))
    with pytest.raises(UserError, match="the questions in use are not those"):
        resumed(out)
    open(data, "w", encoding="utf-8").write(text)
    assert resumed(out)[1] == 0


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
