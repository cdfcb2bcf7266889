"""Do the tests see faults? Plants one at a time in a copy of the project and runs the tests that should fail: python experiments/mutations.py

Each line of FAULTS: file, a piece of its code, what replaces it, the tests that are run (arguments of pytest). A fault that
survives is printed as such, and the program ends with 1.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAULTS = [
    (
        "losses.py",
        "torch.maximum(-advantages * ratio",
        "torch.minimum(-advantages * ratio",
        "tests/test_losses.py",
    ),
    (
        "losses.py",
        "torch.clamp(ratio, 1 - low, 1 + high)",
        "torch.clamp(ratio, 1 - high, 1 + low)",
        "tests/test_losses.py",
    ),
    (
        "losses.py",
        "advantages < 0, torch.minimum",
        "advantages > 0, torch.minimum",
        "tests/test_losses.py",
    ),
    ("losses.py", "torch.exp(d) - d - 1", "torch.exp(-d) + d - 1", "tests/test_losses.py"),
    (
        "losses.py",
        "groups.std(1, keepdim=True)",
        "groups.std(1, keepdim=True, correction=0)",
        "tests/test_losses.py",
    ),
    (
        "losses.py",
        "grad_logits.scatter_add_(-1, targets[rows, None], grad_logp[rows, None])",
        "pass",
        "tests/test_losses.py",
    ),
    ("losses.py", "mask.sum(1).clamp_min(1)", "mask.shape[1]", "tests/test_losses.py"),
    ("losses.py", "scale.sub_(grad_logp[rows, None])", "pass", "tests/test_losses.py"),
    ("hapo.py", "-h / stats.h_min", "h / stats.h_min", "tests/test_hapo.py"),
    (
        "hapo.py",
        "(ratio >= low) & (ratio <= high)",
        "(ratio > low) & (ratio < high)",
        "tests/test_hapo.py",
    ),
    (
        "hapo.py",
        "clip_low * (1 - h.clamp_max(0.0)), clip_high * (1 + h.clamp_min(0.0))",
        "clip_low * (1 + h.clamp_min(0.0)), clip_high * (1 - h.clamp_max(0.0))",
        "tests/test_hapo.py",
    ),
    ("hapo.py", "round(rho * (x.numel() - 1))", "int(rho * (x.numel() - 1))", "tests/test_hapo.py"),
    ("hapo.py", "centred.square() * weight", "centred.square()", "tests/test_hapo.py"),
    ("hapo.py", "h.square().mean()", "(h - h.mean()).square().mean()", "tests/test_hapo.py"),
    ("hapo.py", "abs() >= 5", "abs() >= 50", "tests/test_golden.py"),
    (
        "sampling.py",
        "self.filled = end",
        "self.filled = end if end < 6 else end - 1",
        "tests/test_sampling.py",
    ),
    ("sampling.py", "order[holes] = movers", "pass", "tests/test_sampling.py"),
    (
        "sampling.py",
        "logits, position = out.logits[:, -1], position + 1",
        "logits = out.logits[:, -1]",
        "tests/test_sampling.py",
    ),
    (
        "sampling.py",
        "right=True).clamp_max(weights",
        "right=False).clamp_max(weights",
        "tests/test_sampling.py",
    ),
    ("sampling.py", "lengths[alive] = t + 1", "lengths[alive] = t", "tests/test_sampling.py"),
    ("sampling.py", "probs.mul_(logits)", "logits.mul_(probs)", "tests/test_sampling.py"),
    (
        "scale/rollout.py",
        "((owner == -1) | (owner == owner[:, None]))",
        "True",
        "tests/test_internals.py",
    ),
    (
        "scale/rollout.py",
        "(length + in_answer).repeat",
        "(0 * length + S + in_answer).repeat",
        "tests/test_internals.py",
    ),
    (
        "scale/rollout.py",
        "visible & ~padding[:, None, None]",
        "visible.expand(len(lines), 1, -1, -1)",
        "tests/test_internals.py",
    ),
    (
        "scale/rollout.py",
        "place.append(count[p] % per_line)",
        "place.append(0)",
        "tests/test_internals.py",
    ),
    (
        "scale/rollout.py",
        "length[line] - 1, S",
        "length[line] * 0 + S - 1, S",
        "tests/test_internals.py",
    ),
    (
        "internals.py",
        "if not norm:\n            body.norm = nn.Identity()",
        "if norm:\n            body.norm = nn.Identity()",
        "tests/test_internals.py",
    ),
    (
        "internals.py",
        "states[:, :-1][response_mask[:, 1:]",
        "states[:, 1:][response_mask[:, 1:]",
        "tests/test_internals.py",
    ),
    ("internals.py", "int(positive[-1]) + 1", "int(positive[-1])", "tests/test_internals.py"),
    ("internals.py", "body.layers = layers[:layer]", "pass", "tests/test_internals.py"),
    (
        "internals.py",
        "self.feed_forward - self.feed_forward_input",
        "self.feed_forward - self.attention_input",
        "tests/test_internals.py",
    ),
    ("internals.py", "if shared < sum(counts) * (S + T)", "if True", "tests/test_internals.py"),
    ("internals.py", 'config._attn_implementation == "sdpa"', "True", "tests/test_internals.py"),
    ("bupo.py", "step <= inter_steps", "step < inter_steps", "tests/test_bupo.py"),
    (
        "train.py",
        "mean_loss(per_token, batch.mask[part], tokens, responses, o) * real",
        "mean_loss(per_token, batch.mask[part], int(batch.mask[part].sum()), len(part), o) * real",
        "tests/test_train.py -k micro",
    ),
    ("train.py", "o.dual_clip or None", "None", "tests/test_train.py -k by_hand"),
    (
        "train.py",
        "zone = (low, high) if o.released else (o.clip_low, o.clip_high)",
        "zone = (o.clip_low, o.clip_high)",
        "tests/test_train.py -k by_hand",
    ),
    (
        "train.py",
        "per_token + o.kl * losses.kl_k3(logp, batch.ref_logp[part])",
        "per_token",
        "tests/test_train.py -k by_hand",
    ),
    (
        "train.py",
        "min(1.0, step / max(1, o.warmup_steps))",
        "1.0",
        "tests/test_train.py -k warm_up",
    ),
    (
        "train.py",
        "if accepted:\n        run.optimizer.step()",
        "if True:\n        run.optimizer.step()",
        "tests/test_train.py -k nan",
    ),
    ("scale/run.py", '"drawn": self.drawn', '"drawn": 0', "tests/test_train.py -k four_steps"),
    (
        "scale/run.py",
        '"stats": self.stats and [float(x) for x in self.stats]',
        '"stats": None',
        "tests/test_train.py -k four_steps",
    ),
    (
        "scale/checkpoint.py",
        "if _sha256(folder / name) != expected",
        "if False",
        "tests/test_train.py -k damaged",
    ),
    (
        "scale/checkpoint.py",
        "folders(run.out, step)[run.options.keep :]",
        "folders(run.out)[run.options.keep :]",
        "tests/test_train.py -k damaged",
    ),
    (
        "scale/shard.py",
        "return self._reduce(x, dist.ReduceOp.SUM)",
        "return torch.as_tensor(x)",
        "tests/test_shard.py",
    ),
    ("train.py", "(loss * world.size).backward()", "loss.backward()", "tests/test_shard.py"),
    (
        "scale/report.py",
        "by_question.setdefault(question, [])",
        "by_question.setdefault((question, len(by_question)), [])",
        "tests/test_train.py -k twice",
    ),
    (
        "evaluate.py",
        "failure *= (n - c - i) / (n - i)",
        "failure *= (n - c) / n",
        "tests/test_evaluate.py -k pass_at",
    ),
    ("tasks.py", "Counter(found[1]) == Counter(problem.numbers)", "True", "tests/test_tasks.py"),
    ("scale/numbers.py", "|[eE][+-]?\\d)", ")", "tests/test_tasks.py"),
]


def main():
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "project"
        shutil.copytree(
            ROOT,
            copy,
            ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache"),
        )
        for file, piece, fault, tests in FAULTS:
            original = (copy / file).read_text()
            if original.count(piece) != 1:
                sys.exit(f"{file}: {piece!r} occurs {original.count(piece)} times; mend FAULTS")
            (copy / file).write_text(original.replace(piece, fault))
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-q",
                    "-x",
                    "-p",
                    "no:cacheprovider",
                    *tests.split(),
                ],
                cwd=copy,
                capture_output=True,
                text=True,
            )
            (copy / file).write_text(original)
            verdict = {0: "SURVIVED", 1: "caught"}.get(
                done.returncode, f"pytest ended with {done.returncode}"
            )
            survived += [(file, fault)] if verdict != "caught" else []
            print(f"{verdict:9s} {file:20s} {fault.splitlines()[0][:90]}", flush=True)
    print(f"{len(FAULTS) - len(survived)} of {len(FAULTS)} faults were caught")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
