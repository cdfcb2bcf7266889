"""The built-in addition task for verl: python tests/engines/verl_addition.py FILE.parquet ROWS"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from problems.grading import grade
from tasks import Problem, load_problems


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **more):
    """verl's reward function: 1 for a right answer, by this project's rule for integers."""
    return float(grade(Problem("", ground_truth, "integer"), solution_str).lenient)


def main():
    import pandas

    path, count = sys.argv[1], int(sys.argv[2])
    rows = [
        {
            "data_source": "addition",
            "prompt": [{"role": "user", "content": problem.question}],
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"index": n},
        }
        for n, problem in enumerate(load_problems("addition")[0][:count])
    ]
    pandas.DataFrame(rows).to_parquet(path)


if __name__ == "__main__":
    main()
