"""Is every right answer of a file graded right? python experiments/verdicts.py FILE [FILE ...]

Takes each gold answer of a file of questions (JSONL or parquet) for a model's answer, in the forms
that models use, and prints the share that is graded right, strictly where the form is one that the
strict verdict accepts.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from problems.grading import grade
from tasks import read_problems

FORMS = {  # form: (the text, the verdict)
    "alone": ("{}", "strict"),
    "boxed": ("Let us see.\nSo it is \\boxed{{{}}}.", "strict"),
    "####": ("Let us see.\nIt follows.\n#### {}", "strict"),
    "sentence": ("Let us see.\nThe answer is {}.", "lenient"),
    "in dollars": ("Let us see.\nThe answer is ${}$.", "lenient"),
}


def main(paths):
    print(f"{'':24s}{'answers':>8s}" + "".join(f"{form:>12s}" for form in FORMS))
    for path in paths:
        problems, wrong = read_problems(path), {form: [] for form in FORMS}
        for problem in problems:
            for form, (text, verdict) in FORMS.items():
                bare = problem.answer.replace("$", "") if form == "in dollars" else problem.answer
                if not getattr(grade(problem, text.format(bare)), verdict):
                    wrong[form].append(problem.answer)
        shares = [1 - len(wrong[form]) / len(problems) for form in FORMS]
        name = pathlib.Path(path).name
        print(f"{name:24s}{len(problems):8d}" + "".join(f"{share:12.2%}" for share in shares))
        for form in FORMS:
            if wrong[form]:
                print(f"  {form}: {', '.join(map(repr, dict.fromkeys(wrong[form]).keys()))[:300]}")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__.splitlines()[0])
    main(sys.argv[1:])
