"""Hard answers, by hand: what a reader of the answer would say is the answer it gives.

Each block names the gold answer as a file holds it; each line an answer and its verdicts: `strict`
(right where it was asked for, and so right), `lenient` (right, but only in a sentence), `wrong`.
"""

import time

import pytest

from problems.files import Row
from problems.grading import grade
from problems.latex import LATEX
from problems.numbers import parse_number
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
strict  | +5
strict  | \boxed{+5}
strict  | x = +5
strict  | US$5
strict  | #### US$5.00
strict  | \boxed {5}
strict  | \boxed 5
strict  | so \boxed 5.
strict  | \boxed<newline>{5}
strict  | \boxed{{5}}
strict  | \boxed{{{5}}}
strict  | \fbox{5}
strict  | \boxed{5} and \boxed{}
strict  | #### 5<newline>####
strict  | #### 5<newline>and \boxed{ }
strict  | #### Step 1: add<newline>2 + 3<newline>#### 5
strict  | <think>is it 4? #### 4</think>5
strict  | <think>\boxed{4}</think>#### 5
strict  | it may be 4</think>#### 5
lenient | \boxed{}<newline>so it is 5
lenient | It starts at 5 p.m.
lenient | so she packs 5 t-shirts
lenient | it is 5 i.e. five
lenient | that is US$5
lenient | that is US$5 in all
lenient | it is +5
lenient | it is = +5.
lenient | #### Step 2: multiply by 2<newline>it is 10<newline>So the answer is 5.
lenient | #### Conclusion<newline>It is 5
lenient | #### 2. Divide<newline>It is 5
wrong   | x=4 or x=5
wrong   | x=5 or x=4
wrong   | x = 4 or x = 5.
wrong   | x=4, x=5
wrong   | \boxed{x=4 \text{ or } x=5}
wrong   | 3 +5
wrong   | 3 + 5
wrong   | apples + 5
wrong   | it is not 5
wrong   | 5 or not
wrong   | sin 5
wrong   | so it is 5\theta
wrong   | <think>5</think>
wrong   | <think>#### 5</think>
wrong   | <think>\boxed{5}</think> It is clear.
wrong   | <think>so it is 5
wrong   | #### 5 <think>or is it
wrong   | <think>a</think> #### 5 <think>
wrong   | #### 5<newline>#### 4
wrong   | \boxed{5}, no, \boxed 4
wrong   | \boxed{{5}, {4}}
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
gold 370
strict  | 370g
strict  | 370 g
strict  | \boxed{370g}
lenient | it weighs 370g
wrong   | 370x
wrong   | 370gx
gold 130
strict  | 130miles
strict  | 130 miles
lenient | they drove 130miles
lenient | they drove 130km in all
wrong   | 130xy
wrong   | 130log(2)
wrong   | 130sqrt(2)
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
        ROWS.append((GOLD, TEXT[1:].replace("<newline>", "\n"), VERDICT.strip()))


def test_the_table_is_long_and_no_row_stands_twice():
    assert len(ROWS) == len(set(ROWS)) >= 150


@pytest.mark.parametrize("gold, text, verdict", ROWS)
def test_hard_answers(gold, text, verdict):
    strict, lenient = grade(Problem("q", gold), text)
    assert (strict, lenient) == (verdict == "strict", verdict != "wrong")


NO_NUMBER = (
    "n-1|5 - x|2\u03c0|\u221a2|5!|x - y = 1|xy - 1|Less than 2|2 - i|e - 1|3-4|12:30|2^{10}|2k|"
    "x\u22645|4343_6|2k+2|3 or 4|(3, 4)|5 squared|2L|2l|3m|two|x > 5|1,2,3|3/0|1 2|\\sqrt{2}|"
    "5 + 2i|"
)


@pytest.mark.parametrize("gold", NO_NUMBER.split("|"))
def test_gold_answers_that_are_no_number(gold):
    """They are words or LaTeX: no number may be made of a part of them."""
    assert parse_number(gold) is None
    problem = problem_of(gold)
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
    assert problem_of(gold).kind == "number"


WORDS = r"""
gold Yes
strict  | Yes
strict  | yes.
strict  | #### **Yes**
strict  | \boxed{\text{Yes}}
lenient | Yes, since 3 > 2.
lenient | The answer is yes.
lenient | Yes.<newline>The proof is long
lenient | Yes (since 3 > 2)
lenient | No doubt about it: yes
lenient | Is it so? Yes
lenient | #### Conclusion<newline>So yes.
lenient | I think so.<newline>Yes.
lenient | \boxed{the answer is yes}
wrong   | No
wrong   | Yesterday
wrong   | \boxed{No} Yes
wrong   | It is not yes
wrong   | No, though many say yes and no
wrong   | Yes. No.
wrong   | Yes, no
wrong   | Yes or no
wrong   | Yes/No
wrong   | Yes, or no
wrong   | Yes, or not
wrong   | Yes or not
wrong   | yes no
wrong   | Yes!
wrong   | -Yes
wrong   | 1/Yes
wrong   | non-yes
wrong   | not yes
wrong   | maybe yes
wrong   | Maybe it is yes
wrong   | I do not think that the answer is yes
wrong   | yes, maybe no
wrong   | <think>Yes</think>
wrong   | <think>Yes
gold No
strict  | No
lenient | No, it is not.
lenient | No, since it may be odd
wrong   | No. Yes.
wrong   | Not no
gold True
strict  | true
lenient | so it is true
wrong   | so it is not true
wrong   | untrue
wrong   | it isn't true
wrong   | True, False
wrong   | true or false
wrong   | It is false that it is true
gold B
strict  | B
strict  | (B)
strict  | #### B.
strict  | \boxed{\textbf{B}}
lenient | The answer is (B).
lenient | B: because 3 > 2
lenient | B) a risk score
lenient | (B) a risk score
lenient | B - a risk score
lenient | B. a risk score
lenient | Answer: B. a risk score
lenient | I choose B
lenient | so option B
lenient | #### (B) a risk score
lenient | \boxed{B) a risk score}
wrong   | A
wrong   | AB
wrong   | (A) or (C)
wrong   | A or B or C
wrong   | A, B, C, D
wrong   | A) or B)
wrong   | B) or C)
wrong   | not (B)
wrong   | It is not (B).
wrong   | B!
wrong   | -B
wrong   | a group
wrong   | B<newline>C
gold Abelian
strict  | abelian
strict  | #### Abelian.
lenient | The group is Abelian.
lenient | So the group is: **abelian**
lenient | Since ab = ba, it is abelian
wrong   | non-abelian
wrong   | nonabelian
wrong   | not abelian
wrong   | The group is non-abelian
wrong   | The group is not abelian
wrong   | It isn't abelian
wrong   | Abelian or not
wrong   | Abelian!
wrong   | It may be that it is abelian
gold Even
strict  | even
lenient | It is even
wrong   | Neither odd nor even
wrong   | It is neither odd nor even
wrong   | odd, even
wrong   | It is odd or even
wrong   | odd
gold \text{Evelyn}
strict  | Evelyn
strict  | evelyn
lenient | It is Evelyn
wrong   | Carla
gold Vitamin C
strict  | vitamin C
lenient | It is vitamin C.
wrong   | vitamin
wrong   | C
"""


def word_rows(table):
    gold = None
    for line in table.strip().splitlines():
        if line.startswith("gold "):
            gold = line.removeprefix("gold ")
        else:
            verdict, text = line.split("|", 1)
            yield gold, text[1:].replace("<newline>", "\n"), verdict.strip()


@pytest.mark.parametrize("gold", ["p - q", "x^2", "\\pi", "ab + bc", "$pq$", "\\(n!\\)", "2 - i"])
def test_formulas_are_no_words(gold):
    problem = problem_of(gold)
    assert problem is None or problem.kind == "latex"


def problem_of(gold):
    """As a row of a file with this answer; None where no rule can check it."""
    problem = _problem_of(Row("", "q", (), gold, {}), any_answer=True)
    return None if problem.kind == "unchecked" else problem


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


FORMULAS = r"""
gold e
strict  | e
strict  | $e$
strict  | $e$.
strict  | \boxed{e}
strict  | \boxed{\mathrm{e}}
strict  | \boxed{\text{e}}
wrong   | #### \exp(1)
lenient | So it is $e$.
lenient | So the answer is e.
wrong   | 1/e
wrong   | -e
wrong   | e!
wrong   | not e
wrong   | non-e
wrong   | e or not
wrong   | \boxed{e \text{ or not}}
wrong   | It is not $e$
wrong   | It isn't $e$
wrong   | It is $e$ or not
wrong   | It is $e$ or $-e$
wrong   | It is $-e$ or $e$
wrong   | It is $-e$, $e$
wrong   | The answer is -e.
wrong   | The answer is not e.
wrong   | <think>e</think>
gold i
strict  | \boxed{\mathrm{i}}
strict  | \text{i}
wrong   | -i
wrong   | 1/i
gold n
strict  | n
strict  | \boxed{n}
wrong   | n!
wrong   | 2^n
wrong   | n or not
gold \sin x
strict  | $\sin x$
strict  | \sin(x)
wrong   | -\sin x
wrong   | \sin^{-1} x
gold sin x
strict  | sin x
wrong   | -sin x
gold xy
strict  | xy
lenient | The product is $xy$.
wrong   | yx
wrong   | y x
wrong   | -xy
gold 2^{-60}
strict  | 2^{-60}
strict  | \frac{2}{2^{61}}
strict  | \frac{1}{1152921504606846976}
wrong   | 2^{-61}
wrong   | 2^{-55}
wrong   | \frac{1}{2^{61}}
gold \frac{\pi}{2^{60}}
strict  | \pi 2^{-60}
wrong   | \frac{\pi}{2^{61}}
gold \infty
strict  | \infty
strict  | +\infty
wrong   | -\infty
gold (3, 4)
strict  | (3,4)
strict  | \left(3, 4\right)
lenient | The point is $(3, 4)$.
wrong   | (4, 3)
gold \frac{\pi}{2}
strict  | \boxed{\dfrac{\pi}{2}}
strict  | \boxed{{\frac{\pi}{2}}}
strict  | \fbox{\pi/2}
wrong   | \pi
"""


LETTERS = {"e", "i", "n", "xy", "sin x", "(3, 4)"}  # no marks of mathematics
READ_AS = [(row, "text") for row in word_rows(WORDS)] + [
    (row, "text" if row[0] in LETTERS else "latex") for row in word_rows(FORMULAS)
]


@pytest.mark.parametrize("row, kind", READ_AS)
def test_answers_that_are_words_or_formulas(row, kind):
    gold, text, verdict = row
    if kind == "latex":
        pytest.importorskip("math_verify")
    problem = problem_of(gold)
    assert problem.kind == kind
    assert grade(problem, text) == (verdict == "strict", verdict != "wrong")


# --------------------------------------------------------------- no text is right for two answers

EXCLUSIVE = [
    ["Yes", "No"],
    ["True", "False"],
    ["A", "B", "C", "D", "E"],
    ["Even", "Odd", "Neither odd nor even"],
    ["positive", "negative"],
    ["Abelian", "non-abelian"],
    ["convergent", "divergent", "not convergent"],
    ["Evelyn", "Carla"],
    ["5", "4", "-5", "5/4"],
]
ONE = """{a}|{a}.|({a})|{a}!|-{a}|not {a}|non-{a}|1/{a}|un{a}|**{a}**|\\boxed{{{a}}}|#### {a}|${a}$|
it is {a}|it is not {a}|it isn't {a}|The answer is {a}.|the answer is ({a})|Answer: {a}|so {a}|
{a}) is it|{a} - so it is|{a}: it is|{a}, since 3 > 2|{a}, as it is not clear|perhaps {a}|a {a} one|
I doubt it is {a}|it is false that it is {a}|either way: {a}|{a} or not|{a}, or not|{a}, maybe|
#### Step\n{a}|#### {a}\n####|<think>{a}</think>|<think>{a}|neither {a}|{a} {a}|\\text{{{a}}}"""
TWO = """\
{a} {b}|{a}. {b}.|{a}, {b}|{a}; {b}|{a} or {b}|{a} and {b}|{a}/{b}|{a}|{b}|{a}\n{b}|({a}) ({b})|
{a}) or {b})|({a}) or ({b})|not {a}, {b}|{a}, not {b}|not {a} but {b}|neither {a} nor {b}|
{a} - {b}|either {a} or {b}|it is {a} or {b}|it is {a}, {b}|it is {a}. it is {b}.|
The answer is {a}, {b}.|The answer is {a} or {b}|The answer is {a}. No, {b}.|{a}: {b}|{a} ({b})|
\\boxed{{{a}, {b}}}|\\boxed{{{a}}} \\boxed{{{b}}}|\\boxed{{{a}}} or {b}|
\\boxed{{{a} \\text{{ or }} {b}}}|#### {a} {b}|#### {a}\n#### {b}|#### {a}\n{b}|#### {a} or {b}|
{a}, so it is {b}|so it is {a}, {b}|{a} is {b}|{a}? {b}|{a} = {b}|x = {a} or x = {b}|
x = {a}, x = {b}|<think>{a}</think>{b}|{a}<think>{b}</think>|${a}$ or ${b}$|${a}$, ${b}$|
**{a}** **{b}**|\\boxed{{{{{a}}}, {{{b}}}}}|{a} \\boxed {b}|{a}, or {b}|{a}. Or {b}.|
maybe {a}, maybe {b}|if not {a} then {b}|{a} unless it is {b}|{a} is it, or {b} is|
it is {a}\nit is {b}|- {a}\n- {b}|1. {a}\n2. {b}|{a}\n\n#### {b}|
Options: ({a}) x, ({b}) y. So ({a})"""


def contradictions():
    for golds in EXCLUSIVE:
        for a in golds:
            for shape in ONE.replace("|\n", "|").split("|"):
                yield golds, shape.replace("\\n", "\n").format(a=a)
            for b in golds:
                for shape in TWO.replace("|\n", "|").split("|"):
                    yield golds, shape.replace("\\n", "\n").format(a=a, b=b)
                    yield golds, "I think.\n" + shape.format(a=a.lower(), b=b.upper())


def test_no_text_is_right_for_two_answers_that_exclude_each_other():
    count = 0
    problems = {g: problem_of(g) for golds in EXCLUSIVE for g in golds}
    for golds, text in contradictions():
        right = [gold for gold in golds if any(grade(problems[gold], text))]
        assert len(right) <= 1, (text, right)
        count += 1
    assert count >= 5_000


WORDS_AND_SYMBOLS = (
    "Yes|No|True|False|A|B|C|D|E|Even|Odd|Abelian|positive|negative|Evelyn|east|ellipse|Monday|"
    "convergent|divergent|Correct|infinite|unique|compression|e|i|n|a|x|k|p|z|xy|\\pi|\\sin x|e^2|"
    "\\sqrt{2}|\\ln 3|x^2|\\frac{\\pi}{2}|\\gamma|n^2"
)


@pytest.mark.parametrize("gold", WORDS_AND_SYMBOLS.split("|"))
def test_signs_and_doubts_are_part_of_an_answer(gold):
    assert len(set(WORDS_AND_SYMBOLS.split("|"))) >= 40
    problem = problem_of(gold)
    if problem is None or problem.kind == "latex":
        pytest.importorskip("math_verify")
    assert any(grade(problem, f"The answer is {gold}."))
    for shape in ("-{}", "1/{}", "{}!", "not {}", "non-{}", "{} or not"):
        wrong = shape.format(gold)
        for text in (
            wrong,
            f"\\boxed{{{wrong}}}",
            f"#### {wrong}",
            f"${wrong}$",
            f"It is {wrong}.",
        ):
            assert grade(problem, text) == (False, False), text


# --------------------------------------------------------- text is text, mathematics is mathematics

# Two reference answers in a line exclude each other: a response that states one is wrong for the
# other, in either direction and in every form.
OTHERS = r"""
on|no
US|SU
3x4|2x6
9 a.m.|9 p.m.
192.168.0.1|192.168.0.2
2020-12-25|1983
3-2|5-4
A1|1A
(1,2)|\{1,2\}
2516_8|2516_9
3,4|(4,3)
5 R 3|3 R 5
3,4|4,3
(1,2)|(2,1)
[0,1]|(0,1)
(0,1]|[0,1)
(1,2,2)|(1,2)
\{1,2\}|\{1,2,2\}
5 kg|5 g
5 cm|5 m
5 dollars|5 euros
10_2|2
1.2.3|1.2.4
12/25/2020|25/12/2020
2:3|3:2
1:2|0.5
x=2, y=3|y=2, x=3
x = 5|y = 5
AB|BA is
ABD|AB
ABD|ABCD
ABD|ABDD
A+|A
A+|+A
A-|-A
C++|C
B2|2B
H2O|2HO
F=ma|F=mb
room 101|room 110
101010|010101
(2, 3)|2, 3
[2,3]|2,3
3 or 5|3
7th|7
1st|first place
Co|oC
7pm|7am
7:30 pm|7:30 am
no one|one no
dog bites man|man bites dog
+5-3|2
10-4|6
3/4/2021|4/3/2021
a-b|b-a
2^{10}|2^{11}
\frac{1}{2}|\frac{1}{3}
x_1|x_2
F_3|F_4
\sqrt{2}|\sqrt{3}
n-1|n+1
1,000|1
6:00|600
(555) 123-4567|(555) 123-4568
A4|A5
3D|D3
2D|D2
x2|2x
k2|2k
0x1F|0x1E
1e3|1e4
50%|0.5
I|II
IV|VI
left|right
true|false
East|West
12 R 1|1 R 12
10 mod 3|3 mod 10
5!|120!
N/A|A/N
AC/DC|DC/AC
1 2 3|3 2 1
1;2|2;1
(A)|(B)
A and C|A and B
(-\infty, 1]|(-\infty, 1)
[0,1] \cup [2,3]|(0,1) \cup (2,3)
\{0\}|0
(0)|0 or 1
72人|72元
三|四
北京|南京
5 m/s|5 m
90^\circ|90 radians
\frac{\pi}{2} \text{ cm}|\frac{\pi}{2} \text{ m}
"""
# The second text of a line states the first one's answer.
SAME = r"""
on|on
US|US
3x4|3 x 4
9 a.m.|9 a.m.
192.168.0.1|192.168.0.1
2020-12-25|2020-12-25
3-2|3-2
(1,2)|(1, 2)
(1,2)|\left(1, 2\right)
\{1,2\}|\{2,1\}
2516_8|2516_{8}
3,4|3, 4
5 R 3|5 R 3
ABD|ADB
ABD|A, B, D
1,-2|1, -2
\left( 3, \frac{\pi}{2} \right)|(3, \frac{\pi}{2})
(3,4]|(3, 4]
p - q|p-q
p - q|-q+p
2k+2|2(k+1)
x^2|x \cdot x
\text{(C)}|C
\text{(C)}|(C)
5 kg|5
5 kg|5 kilograms
5|5 kg
$18.90|18.90
$18.90|\$18.90
$18.90|18.90 dollars
50%|50\%
90^\circ|90
90^\circ|90 degrees
(0,9) \cup (9,36)|(0, 9) \cup (9, 36)
x \in [-2,7]|[-2,7]
y = 2x + 3|y=2x+3
F_n|F_{n}
\mathbb{R}|\mathbb{R}
\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}|\begin{pmatrix}-2\\-14\\-7\end{pmatrix}
1 \pm \sqrt{19}|1\pm\sqrt{19}
\frac9{19}|\frac{9}{19}
Neither odd nor even|neither odd nor even
\frac{270}7\text{ degrees}|\frac{270}{7}
6 - 5i|6-5i
6 - 5i|-5i+6
\{1\pm\sqrt{5},-2\}|\{-2, 1\pm\sqrt{5}\}
1 \text{ or } 3|1 or 3
H2O|H2O
O(n^2)|O(n^2)
北京|北京
[0, 2\pi]|[0,2\pi]
(x_0, y_0)|(x_0, y_0)
n!|n!
"""
STATED = ("{}", "\\boxed{{{}}}", "#### {}", "The answer is {}.", "It is ${}$.", "So it is {}")


def lines_of(table):
    return [tuple(line.split("|")) for line in table.strip().splitlines()]


@pytest.mark.parametrize("one, other", lines_of(OTHERS))
def test_a_response_is_right_for_one_of_two_answers_alone(one, other):
    pytest.importorskip("math_verify")
    for gold, stated in ((one, other), (other, one)):
        for form in STATED:
            assert not any(grade(problem_of(gold), form.format(stated))), (gold, form)


@pytest.mark.parametrize("gold, stated", lines_of(SAME))
def test_other_ways_to_state_an_answer(gold, stated):
    pytest.importorskip("math_verify")
    for form in STATED:
        assert any(grade(problem_of(gold), form.format(stated))), form


TWO_VALUES = r"x=\boxed{3} or x=\boxed{5}"


@pytest.mark.parametrize(
    "text, right",
    [
        (TWO_VALUES, True),
        (r"\boxed{5} and \boxed{3}", True),
        (r"\boxed{3, 5}", True),
        (r"\boxed{3 \text{ or } 5}", True),
        (r"\boxed{3}", False),
        (r"\boxed{5}", False),
        (r"\boxed{3}, \boxed{3}", False),
        (r"\boxed{3}, \boxed{5}, \boxed{7}", False),
        (r"\boxed{3} is one. The other is \boxed{5}", False),
    ],
)
def test_a_reference_answer_of_two_boxes_has_two_values(text, right):
    assert grade(problem_of(TWO_VALUES), text) == (right, right)


def test_a_response_of_three_boxes_states_none_of_them():
    for gold in "357":
        text = r"\boxed{3}, \boxed{5}, \boxed{7}"
        assert grade(problem_of(gold), text) == (False, False)
    assert grade(problem_of("7"), r"first \boxed{3}, then I add \boxed{7}") == (True, True)


@pytest.mark.parametrize("text", ["ABD", "ADB", "A, B, D", "A,B,D", "\\text{ABD}"])
def test_options_are_a_set_of_letters(text):
    assert grade(problem_of("ABD"), f"\\boxed{{{text}}}") == (True, True)


@pytest.mark.parametrize("text", ["AB", "ABCD", "ABDD", "A B D", "A or B or D", "abd", "A; B; D"])
def test_nothing_else_is_these_options(text):
    assert grade(problem_of("ABD"), f"\\boxed{{{text}}}") == (False, False)


@pytest.mark.parametrize(
    "text, right",
    [
        ("7 + 5 is 12", False),
        ("12", False),
        ("\\boxed{12} as a first guess, but wait", False),
        ("So \\boxed{12}.", True),
        ("So $\\boxed{12}$", True),
        ("\\boxed{12", False),
        ("\\boxed 12", False),
        ("#### 12\n", True),
        ("#### 12", False),
        ("#### 12\nbut", False),
        ("<think>\\boxed{12}", False),
    ],
)
def test_a_response_that_was_cut_states_what_is_marked_and_whole(text, right):
    assert grade(problem_of("12"), text, finished=False) == (right, right)
    integer = Problem("What is 7 + 5?", "12", "integer")
    assert grade(integer, text, finished=False) == (right, right)


@pytest.mark.parametrize(
    "prompt, text, right",
    [
        ("<think>\n", "7+5=12 or so</think>13", True),
        ("<think>\n", "13", False),
        ("<think>\n", "#### 13", False),
        ("<think>\n\n</think>\n\n", "#### 13", True),
        ("", "7+5=12 or so</think>13", True),
        ("</think>", "<think>#### 13", False),
    ],
)
def test_thinking_may_begin_in_the_prompt(prompt, text, right):
    assert grade(problem_of("13"), text, prompt=prompt) == (right, right)


@pytest.mark.parametrize(
    "text, strict",
    [
        *[("\u7b54\u6848\u662f72", False), ("72\u4e2a\u3002", True), ("#### 72\u5143", True)],
        ("\uc815\ub2f5\uc740 72\uac1c\uc785\ub2c8\ub2e4", False),
        *[("\uff17\uff12", True), ("\u0667\u0662", True), ("\u044d\u0442\u043e 72", False)],
    ],
)
def test_digits_and_units_of_other_scripts(text, strict):
    assert grade(problem_of("72"), text) == (strict, True)


DENIED = (
    "\u4e0d\u662f72|72\u621673|\u7b2c72|72\u4e07|72\uac00 \uc544\ub2c8\ub2e4|"
    "72\u3058\u3083\u306a\u3044|"
    "4 oder 72|nicht 72|\u043d\u0435 72|72 \u0438\u043b\u0438 73|3\u5206\u4e4b72|"
    "72\u4e0d\u662f"
)


@pytest.mark.parametrize("text", DENIED.split("|"))
def test_numbers_that_are_denied_or_another_in_other_languages(text):
    assert grade(problem_of("72"), text) == (False, False)


def test_degenerate_formulas_cost_their_time_once(monkeypatch):
    pytest.importorskip("math_verify")
    assert grade(problem_of(r"\pi"), r"\boxed{\pi}").strict  # the process has started
    monkeypatch.setattr("problems.latex.LATEX_SECONDS", 0.5)
    text = r"\boxed{9^{9^{9^{9}}}}"
    started = time.perf_counter()
    for _ in range(20):
        assert grade(problem_of(r"\frac{\pi}{4}"), text) == (False, False)
    assert LATEX.known["9^{9^{9^{9}}}", r"\frac{\pi}{4}"] in (None, False)
    assert time.perf_counter() - started < 10  # 20 comparisons of 0.5 s, if it were forgotten


# ------------------------------------------------ what stands around an answer, and what it leaves

# (reference answer, responses that state something else)
NOT_STATED = [
    (
        "72",
        [
            "\\(\\boxed{71}\\) or \\(\\boxed{72}\\)",
            "\\[\\boxed{71} \\quad \\text{and} \\quad \\boxed{72}\\]",
            "\\boxed{71}\\quad\\boxed{72}",
            "**\\boxed{71}** or **\\boxed{72}**",
            "$x_{1}=\\boxed{71}$, $x_{2}=\\boxed{72}$",
            "- \\boxed{71}\n- \\boxed{72}",
            "(a) \\boxed{71}\n(b) \\boxed{72}",
            "\\boxed{71} \u6216 \\boxed{72}",
            "\\boxed{71} oder \\boxed{72}",
            "$-\\boxed{72}$",
            "$x = -\\boxed{72}$",
            "$\\frac{1}{\\boxed{72}}$",
            "$\\sqrt{\\boxed{72}}$",
            "$2\\boxed{72}$",
            "$\\boxed{72}^2$",
            "$\\boxed{72}\\pi$",
            "$\\boxed{72}!$",
            "\\boxed{72} million",
            "71 or \\boxed{72}",
            "\\boxed{72} or 73",
            "not \\boxed{72}",
            "\\boxed{72} is incorrect. The answer is 71.",
            "72\u3067\u306f\u3042\u308a\u307e\u305b\u3093",
            "72\u3067\u306a\u3044",
            "72\u3068\u306f\u9650\u3089\u306a\u3044",
            "72\u306f\u9593\u9055\u3044\u3067\u3059",
            "72\u4ee5\u4e0a",
            "72\u672a\u6e80",
            "72\u5206\u4e4b\u4e00",
            "72\u662f\u9519\u7684",
            "72 \uc774\uc0c1",
            "72\ub294 \uc624\ub2f5\uc785\ub2c8\ub2e4",
            "72 \u043d\u0435\u0432\u0435\u0440\u043d\u043e",
            "72 ist falsch",
            "72 nicht",
            "72 est faux",
            "72 dozen",
            "72 lakh",
            "The answer cannot be 72",
            "It is not equal to 72",
            "72 is not the answer",
            "72 is wrong",
            "72 isn't right",
            "neither 71 nor 72",
            "71, or 72",
            "71; 72",
            "71 rather than 72",
            "72 or more",
            "at least 72",
            "less than 72",
            "minus 72",
            "negative 72",
            "twice 72",
            "square root of 72",
            "Is it 72?",
            "\u7b54\u6848\u4e0d\u53ef\u80fd\u662f72",
            "\u7b54\u6848\u662f71\u6216\u800572",
            "71\u4ee5\u53ca72",
            "\u81f3\u5c1172",
            "\u5927\u4e8e72",
            "\u8d1f72",
            "71\u307e\u305f\u306f72",
            "\u30de\u30a4\u30ca\u30b972",
            "\ub2f5\uc740 72\uac00 \uc544\ub2d9\ub2c8\ub2e4",
            "\u043d\u0435 \u0440\u0430\u0432\u043d\u043e 72",
            "\u043c\u0438\u043d\u0443\u0441 72",
            "nunca 72",
            "menos 72",
            "kein 72",
            "nicht gleich 72",
            "jamais 72",
            "\u0644\u064a\u0633 72",
            "n\xe3o \xe9 72",
            "72 de\u011fil",
            "\\boxed{-(72)}",
            "\\boxed{(72)!}",
            "\\boxed{\\text{at least } 72}",
            "\\boxed{72?}",
            "\\boxed{71;72}",
            "\\boxed{71\\\\72}",
        ],
    ),
    (
        "2",
        [
            "\\boxed{x=1,y=2}",
            "\\boxed{1;2}",
            "\\boxed{x^2=2}",
            "\\boxed{2x=2}",
            "\\boxed{-x=2}",
            "\\boxed{\\sin x=2}",
        ],
    ),
    (
        "B",
        [
            "not \\boxed{B}",
            "The answer is not \\boxed{B}",
            "\\boxed{B}? No, A",
            "\\boxed{A} or maybe \\boxed{B}",
            "The answer is (A).\n\n(B) is incorrect since it is too large.",
            "A) is right\nB) is wrong",
            "B?",
            "It could be B",
        ],
    ),
    (
        "x^2",
        [
            "-\\boxed{x^2}",
            "\\boxed{x^2}+1",
            "\\boxed{x^2}\\text{ or }2x",
            "\\boxed{2x = x^2}",
            "$2x$; $x^2$",
        ],
    ),
    (
        "a \\equiv 1 \\pmod 3",
        [
            "\\boxed{a \\equiv 2 \\pmod 3}",
        ],
    ),
    (
        "0.\\overline{3}",
        [
            "\\boxed{0.\\overline{4}}",
        ],
    ),
    (
        "\\ge 5",
        [
            "\\boxed{\\le 5}",
            "\\boxed{5}",
        ],
    ),
    (
        "x \\in (1,2)",
        [
            "\\boxed{\\{1,2\\}}",
        ],
    ),
    (
        "x \\in \\{1,2\\}",
        [
            "\\boxed{(1,2)}",
        ],
    ),
    (
        "\\frac{dy}{dx}",
        [
            "\\boxed{\\frac{dx}{dy}}",
        ],
    ),
    (
        "f(x)=2x",
        [
            "\\boxed{f'(x)=2x}",
        ],
    ),
    (
        "4\\pi \\text{ cm}^2",
        [
            "\\boxed{4\\pi \\text{ cm}^3}",
            "\\boxed{4\\pi \\text{ m}^2}",
        ],
    ),
    (
        "\\sin 30^\\circ",
        [
            "\\boxed{\\sin 30}",
        ],
    ),
    (
        "x<1 or x>2",
        [
            "\\boxed{x<1 and x>2}",
        ],
    ),
    (
        "A^T",
        [
            "\\boxed{A}",
        ],
    ),
    (
        "\\Delta",
        [
            "\\boxed{\\delta}",
        ],
    ),
    (
        "X^2",
        [
            "\\boxed{x^2}",
        ],
    ),
    (
        "\\{1\\},\\{2\\}",
        [
            "\\boxed{\\{1,2\\}}",
        ],
    ),
    (
        "5 m/s",
        [
            "\\boxed{5 s/m}",
        ],
    ),
    (
        "5 degrees north",
        [
            "\\boxed{5 degrees south}",
        ],
    ),
    (
        "3\uc2dc\uac04",
        [
            "\\boxed{3\uc2dc}",
        ],
    ),
    (
        "mW",
        [
            "\\boxed{MW}",
        ],
    ),
    (
        "Co",
        [
            "\\boxed{CO}",
        ],
    ),
    (
        "x'",
        [
            "\\boxed{x}",
        ],
    ),
    (
        "B'",
        [
            "\\boxed{B}",
        ],
    ),
    (
        "{1, 2}",
        [
            "\\boxed{[1, 2]}",
        ],
    ),
    (
        "a, b",
        [
            "\\boxed{(a, b)}",
        ],
    ),
    (
        "1, 0",
        [
            "\\boxed{1,000}",
        ],
    ),
]
# (reference answer, responses that state it)
USUAL_FORMS = [
    (
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
        [
            "\\boxed{\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}}",
        ],
    ),
    (
        "72",
        [
            "\\boxed{\\displaystyle 72}",
            "\\boxed{\\boldsymbol{72}}",
            "\\boxed{\\bm{72}}",
            "\\boxed{\\bf 72}",
        ],
    ),
    (
        "45^\\circ",
        [
            "$$45^\\circ$$",
            "\\boxed{45}^\\circ",
            "\\boxed{45\u5ea6}",
        ],
    ),
    (
        "50%",
        [
            "$$50\\%$$",
            "\\boxed{50}\\%",
        ],
    ),
    (
        "(0, 1)",
        [
            "**(0, 1)**",
            "The answer is **(0, 1)**.",
            "\\boxed{\\text{(0, 1)}}",
            "\\boxed{(x,y)=(0,1)}",
            "\\boxed{x \\in (0,1)}",
            "\\boxed{\uff080\uff0c1\uff09}",
            "\\boxed{\\big(0,1\\big)}",
        ],
    ),
    (
        "4,6,14,15",
        [
            "The answer is 4, 6, 14, and 15.",
        ],
    ),
    (
        "15 cm^2",
        [
            "The area is 15 cm^2.",
            "The area is 15 cm\xb2.",
            "The answer is $15\\text{ cm}^2$.",
        ],
    ),
    (
        "15 cubic meters",
        [
            "The volume is 15 cubic meters.",
        ],
    ),
    (
        "15\\mbox{ cm}^2",
        [
            "The answer is $15\\text{ cm}^2$.",
        ],
    ),
    (
        "\u5317\u4eac",
        [
            "\u7b54\u6848\u662f\u201c\u5317\u4eac\u201d\u3002",
            "\u7b54\u6848\u662f\u5317\u4eac",
        ],
    ),
    (
        "A",
        [
            "\u7b54\u6848\u662fA",
            "\u6545\u9009A\u3002",
        ],
    ),
    (
        "1/2",
        [
            "\\boxed{\\cfrac{1}{2}}",
        ],
    ),
    (
        "5 kg",
        [
            "\\boxed{5\u516c\u65a4}",
        ],
    ),
    (
        "72",
        [
            "So it is 72, since 8 * 9 = 72",
            "There are 72 left.",
            "She has 72 apples in total.",
            "Since she does not eat any, she has 72.",
            "Thus, \\(x = \\boxed{72}\\).",
            "$$\\boxed{72}$$",
            "**\\boxed{72}**",
            "the answer is \\boxed{72}. This is not hard.",
            "\\boxed{72}\\text{ apples}",
            "Answer: \\boxed{72}",
            "\u7b54\u6848\u662f\\boxed{72}",
        ],
    ),
]


@pytest.mark.parametrize(
    "gold, text", [(gold, text) for gold, texts in NOT_STATED for text in texts]
)
def test_a_response_that_states_something_else_is_wrong(gold, text):
    pytest.importorskip("math_verify")
    assert grade(problem_of(gold), text) == (False, False)


@pytest.mark.parametrize(
    "gold, text", [(gold, text) for gold, texts in USUAL_FORMS for text in texts]
)
def test_usual_forms_of_the_right_answer(gold, text):
    pytest.importorskip("math_verify")
    assert any(grade(problem_of(gold), text))


CUT_SHORT = ["\\boxed{12},", "\\boxed{\\boxed{12}", "\\frac{\\boxed{12}", "#### 12 or\n"]


@pytest.mark.parametrize("text", CUT_SHORT)
def test_a_mark_before_the_cut_must_be_the_end(text):
    assert grade(problem_of("12"), text, finished=False) == (False, False)


@pytest.mark.parametrize("tag", ["think", "Think", "thinking", "reasoning", "thought"])
def test_thinking_has_several_names(tag):
    assert grade(problem_of("12"), f"<{tag}>\\boxed{{12}}") == (False, False)
    assert grade(problem_of("12"), f"<{tag}>\\boxed{{12}}</{tag}>") == (False, False)
    assert grade(problem_of("12"), f"<{tag}>x</{tag}>\\boxed{{12}}") == (True, True)


@pytest.mark.parametrize("piece", ["\u00bd,", "1\u00b0,", "x^\u00bd,", "1\\%,", "\uff11,"])
def test_long_lists_cost_little(piece):
    started = time.process_time()
    for gold in ("1, 2", "(1, 2)", "1 or 2"):
        grade(problem_of(gold), piece * (20_000 // len(piece)))
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize("text", ["It is $2x$ or $x^2$", "It is $2x$, $x^2$", "It is not $x^2$"])
def test_a_formula_that_is_one_of_two_or_denied_is_no_answer(text):
    pytest.importorskip("math_verify")
    assert grade(problem_of("x^2"), text) == (False, False)
