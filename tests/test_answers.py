"""Hard answers, by hand: what a reader of the answer would say is the answer it gives.

Each block names the gold answer as a file holds it; each line an answer and its verdicts: `strict`
(right where it was asked for, and so right), `lenient` (right, but only in a sentence), `wrong`.
"""

import pytest

from grading.answers import grade
from grading.numbers import parse_number
from tasks import Problem, _problem_of

TABLE = r"""
gold 5
strict  | 5
strict  | 5.
strict  | 5.0
strict  | +++ \boxed{5}
strict  | #### 5
strict  | #### $5.00
strict  | #### 5 apples
strict  | #### 5%
strict  | x = 5
strict  | \boxed{x=5} in 3 steps
strict  | \boxed{5\text{ cm}^2}
strict  | \boxed{5 \mathrm{~m/s}}
strict  | \boxed{5^\circ}
strict  | \boxed{5\%}
strict  | \boxed{\$5}
strict  | \boxed{\text{5 dollars}}
strict  | $5$
strict  | \(5\)
strict  | **5**
strict  | 5 kg
strict  | 5kg
strict  | 5 square meters
strict  | 5 dollars per hour
strict  | 10/2
strict  | \frac{10}{2}
lenient | The answer is 5.
lenient | The answer is 5!
lenient | The answer is **5**.
lenient | The answer is $5$.
lenient | The answer is *5*
lenient | so 7 - 2 = 5
strict  | <answer>5</answer>
lenient | it weighs 5kg
lenient | an area of 5 cm^2
lenient | an area of 5 cm²
lenient | an area of 5 square feet, roughly
lenient | she has $5 left
lenient | \boxed{5
lenient | 3 + 4 is 7 and 7 - 2 is 5
lenient | that makes 5 (five)
lenient | Answer - 5
lenient | Answer: 5
lenient | Answer — 5
lenient | a 5-day trip
lenient | \boxed{} so it is 5
lenient | \boxed{the answer is 5}, in 3 steps
wrong   | 4
wrong   | -5
wrong   | −5
wrong   | – 5
wrong   | it is - 5
wrong   | 5!
wrong   | 5x
wrong   | 5 x
wrong   | 5xy
wrong   | 5 - x
wrong   | n - 5
wrong   | n-5
wrong   | so it is n-5
wrong   | x < 5
wrong   | x ≤ 5
wrong   | x \leq 5
wrong   | x ≠ 5
wrong   | √5
wrong   | \sqrt{5}
wrong   | the root is \sqrt{5}
wrong   | 5π
wrong   | 5\pi
wrong   | 2^5
wrong   | so 2^5
wrong   | 5^2
wrong   | 5²
wrong   | x_5
wrong   | 5,5
wrong   | 5.5.5
wrong   | 5e5
wrong   | log 5 or 4
wrong   | 4-5
wrong   | between 4 and 5
wrong   | 4 to 5
wrong   | 4 or 5
wrong   | 5 or 6
wrong   | either 4 or 5
wrong   | 4, 5
wrong   | \boxed{4, 5}
wrong   | \boxed{4 \text{ or } 5}
wrong   | \boxed{4} and then 5
wrong   | #### 4 or rather 5
wrong   | (4, 5)
wrong   | f(5)
wrong   | 12:05
wrong   | at 4:5
wrong   | the 5th
wrong   | 3 × 5
wrong   | 3*5
wrong   | 3 x 5
wrong   | 5 million
wrong   | 5 thousand
wrong   | 5 and a half
wrong   | 5 1/2
wrong   | 5½
wrong   | 5/6
wrong   | five
gold -4
strict  | -4
strict  | −4
strict  | –4
strict  | - 4
strict  | $-4$
strict  | -$4
strict  | $-4.00
strict  | \boxed{-4}
strict  | \boxed{x = -4}
strict  | \boxed{- 4}
strict  | x=−4
strict  | #### – 4
strict  | -\frac{8}{2}
lenient | so x = - 4
lenient | it is −4
lenient | it is - 4
lenient | the result equals -4.
lenient | minus eight plus four (-4)
wrong   | 4
wrong   | 7 - 4
wrong   | 7 -4
wrong   | 7-4
wrong   | x - 4
wrong   | x-4
wrong   | Answer - 4
wrong   | GPT-4
wrong   | --4
gold 7/2
strict  | 7/2
strict  | 7/2.
strict  | 7 / 2
strict  | 3.5
strict  | 3 1/2
strict  | 3½
strict  | 3\frac{1}{2}
strict  | \frac{7}{2}
strict  | \dfrac72
strict  | \tfrac{7}{2}
strict  | 7⁄2
strict  | \boxed{\frac{7}{2}\text{ cups}}
strict  | 3 1/2 cups
lenient | that is \frac{7}{2}
lenient | that is 7/2.
lenient | so we get 3 1/2 hours
lenient | so we get 3½ hours
wrong   | -7/2
wrong   | 7/2.5
wrong   | 7/3
wrong   | 7/20
wrong   | 7/2/2
wrong   | 7/2x
wrong   | 2
wrong   | 7
wrong   | 3-1/2
wrong   | 1/2
gold 1/2
strict  | ½
strict  | 0.5
strict  | .5
strict  | 0.50
strict  | \frac12
lenient | the chance is \frac{1}{2}
lenient | the chance is ½.
wrong   | -½
wrong   | -\frac{1}{2}
wrong   | the chance is -\frac{1}{2}
wrong   | 50%
wrong   | 1/20
wrong   | 1:2
wrong   | \frac{1}{2}x
wrong   | \sqrt{\frac{1}{2}}
gold 10,000
strict  | 10000
strict  | 10,000
strict  | 10 000
strict  | 10~000
strict  | 10{,}000
strict  | 10\,000
strict  | 10'000
strict  | 10,000.00
strict  | $10,000
strict  | 10 thousand
strict  | \boxed{10{,}000}
strict  | \boxed{10\,000\text{ people}}
strict  | #### 10 000
lenient | they earn $10,000 a year
lenient | they earn 10 000 dollars
wrong   | 10
wrong   | 0
wrong   | 10,00
wrong   | 1,0000
wrong   | 10 0000
wrong   | so 10 0000
wrong   | 10,000,000
wrong   | 10.000
wrong   | 100,00
gold 1,200,000
strict  | $1.2 million
strict  | 1.2 million dollars
strict  | 1200 thousand
strict  | 1 200 000
lenient | it cost $1.2 million.
lenient | it cost $1,200,000 in all
wrong   | 1.2
wrong   | $1.2
wrong   | 1.2 billion
gold 1969
strict  | 1969
strict  | 1,969
lenient | in July 1969
lenient | It was in 1969, they say
wrong   | 1969-07-20
wrong   | 20/7/1969
wrong   | 1968/1969
wrong   | 1960-1969
wrong   | 1969 BC or 1970
gold 12:30
wrong   | 30
wrong   | 12
wrong   | 12.5
gold 50%
strict  | 50%
strict  | 50 %
strict  | 50\%
strict  | 50 percent
strict  | 50
lenient | so 50% of them
wrong   | 0.5
wrong   | 50% or 60%
wrong   | 1/2
gold 0
strict  | 0
strict  | 0.0
strict  | -0
strict  | f = 0
wrong   | 10 000
wrong   | x < 0
wrong   | 0!
"""

ROWS, GOLD = [], None
for line in TABLE.strip().splitlines():
    if line.startswith("gold "):
        GOLD = line.removeprefix("gold ")
    else:
        VERDICT, TEXT = line.split("|", 1)
        ROWS.append((GOLD, TEXT[1:], VERDICT.strip()))


def test_the_table_is_long_and_no_row_stands_twice():
    assert len(ROWS) == len(set(ROWS)) >= 150


@pytest.mark.parametrize("gold, text, verdict", ROWS)
def test_hard_answers(gold, text, verdict):
    strict, lenient = grade(Problem("q", gold), text)
    assert (strict, lenient) == (verdict == "strict", verdict != "wrong")


NO_NUMBER = (
    "n-1|5 - x|2\u03c0|\u221a2|5!|x - y = 1|xy - 1|Less than 2|2 - i|e - 1|3-4|12:30|2^{10}|2k|"
    "x\u22645|4343_6|2k+2|1e20|3 or 4|(3, 4)|5 squared|2L|2l|3m|two|x > 5|1,2,3|3/0|1 2|\\sqrt{2}|"
    "5 + 2i|"
)


@pytest.mark.parametrize("gold", NO_NUMBER.split("|"))
def test_gold_answers_that_are_no_number(gold):
    """They are words or LaTeX: no number may be made of a part of them."""
    assert parse_number(gold) is None
    problem = _problem_of("q", gold)
    assert problem is None or problem.kind != "number"


@pytest.mark.parametrize(
    "gold, value",
    [
        *[("n = 1", 1), ("x=\u22124", -4), ("b=4", 4), ("x=5", 5), ("72 apples", 72)],
        *[("$18.90", 18.9), ("90^\\circ", 90), ("1.5\\text{ hours}", 1.5), ("1,234 m^2", 1234)],
        ("\\theta = 3", 3),
    ],
)
def test_gold_answers_with_a_name_or_a_unit(gold, value):
    assert float(parse_number(gold)) == value
    assert _problem_of("q", gold).kind == "number"


WORDS = r"""
gold Yes
strict  | Yes
strict  | yes.
strict  | #### **Yes**
strict  | \boxed{\text{Yes}}
lenient | Yes, since 3 > 2.
lenient | The answer is yes.
lenient | I think so.<newline>Yes.
lenient | \boxed{the answer is yes}
wrong   | No
wrong   | Yesterday
wrong   | \boxed{No} Yes
wrong   | It is not yes
wrong   | No, though many say yes and no
gold True
strict  | true
lenient | so it is true
wrong   | so it is not true
wrong   | untrue
wrong   | it isn't true
gold B
strict  | B
strict  | (B)
strict  | #### B.
strict  | \boxed{\textbf{B}}
lenient | The answer is (B).
lenient | B: because 3 > 2
wrong   | A
wrong   | AB
wrong   | (A) or (C)
wrong   | A or B or C
gold \text{Evelyn}
strict  | Evelyn
strict  | evelyn
lenient | It is Evelyn
wrong   | Carla
gold Vitamin C
strict  | vitamin C
lenient | They lack vitamin C.
wrong   | vitamin
wrong   | C
"""


def word_rows():
    gold = None
    for line in WORDS.strip().splitlines():
        if line.startswith("gold "):
            gold = line.removeprefix("gold ")
        else:
            verdict, text = line.split("|", 1)
            yield gold, text[1:].replace("<newline>", "\n"), verdict.strip()


@pytest.mark.parametrize("gold, text, verdict", list(word_rows()))
def test_answers_that_are_words(gold, text, verdict):
    problem = _problem_of("q", gold)
    assert problem.kind == "text"
    assert grade(problem, text) == (verdict == "strict", verdict != "wrong")


@pytest.mark.parametrize("gold", ["n!", "-i", "p - q", "(3, 4)", "x^2", "\\pi", "ab + bc", "pq"])
def test_formulas_are_no_words(gold):
    problem = _problem_of("q", gold)
    assert problem is None or problem.kind == "latex"


# ------------------------------------------------------------- the built-in tasks: integers alone

INTEGERS = [
    ("385", "RR"),
    ("7+8=15,4+3+1=8,2+1=3 #### 385", "RR"),
    ("#### 385\n", "RR"),
    ("\\boxed{385}", "RR"),
    ("**385**", "RR"),
    ("$385.", "RR"),
    ("The sum is 385.", "wR"),
    ("247 + 138 = **385**", "wR"),
    ("It is 385, of course.", "wR"),
    ("#### 385 apples", "wR"),
    ("385.5", "ww"),
    ("3385", "ww"),
    ("-385", "ww"),
    ("1,385", "ww"),
    ("0.385", "ww"),
    ("385 + 1", "ww"),
    ("1 + 385", "ww"),
    ("770/2 or 385/1", "ww"),
    ("7:385", "ww"),
    ("x385", "ww"),
    ("384 or 385", "ww"),
    ("between 17 and 385 somewhere", "ww"),
    ("from 0 to 385", "ww"),
    ("17 is not it, and 385 is", "wR"),
    ("#### 386\nso 385", "ww"),  # what is marked counts
    ("386\n#### 385", "RR"),
    ("", "ww"),
    ("9" * 400, "ww"),
]


@pytest.mark.parametrize("text, verdict", INTEGERS)
def test_integers(text, verdict):
    problem = Problem("What is 247 + 138?", "385", "integer")
    assert "".join("Rw"[not right] for right in grade(problem, text)) == verdict


def test_integers_with_thousands():
    problem = Problem("What is 9000 + 3345?", "12345", "integer")
    for text in ("12345", "12,345", "#### 12,345", "It is 12,345."):
        assert grade(problem, text).lenient, text
    assert not grade(problem, "12,34,5").lenient
