"""Hard answers, by hand: what a reader of a response would say is the answer that it states."""

import time

import pytest

from problems.files import Row
from problems.grading import grade
from problems.latex import LATEX
from problems.numbers import parse_number
from tasks import Problem, _problem_of

# A reference answer as a file holds it, and what kind of answer it is. Below it stand responses,
# parted by bars: `strict` (right where the answer was asked for, and so right), `lenient` (right,
# but only in a sentence), `wrong`.
TABLE = r"""
gold 5 (number)
strict: 5 | 5. | 5.0 | +++ \boxed{5} | #### 5 | #### $5.00 | #### 5 apples | #### 5% | x = 5
strict: \boxed{x=5} in 3 steps | \boxed{5\text{ cm}^2} | \boxed{5 \mathrm{~m/s}} | \boxed{5^\circ}
strict: \boxed{5\%} | \boxed{\$5} | \boxed{\text{5 dollars}} | $5$ | \(5\) | **5** | 5 kg | 5kg
strict: 5 square meters | 5 dollars per hour | 10/2 | \frac{10}{2} | <answer>5</answer> | +5
strict: \boxed{+5} | x = +5 | US$5 | #### US$5.00 | \boxed {5} | \boxed 5 | so \boxed 5.
strict: \boxed<newline>{5} | \boxed{{5}} | \boxed{{{5}}} | \fbox{5} | \boxed{5} and \boxed{}
strict: #### 5<newline>#### | #### 5<newline>and \boxed{ }
strict: #### Step 1: add<newline>2 + 3<newline>#### 5 | <think>is it 4? #### 4</think>5
strict: <think>\boxed{4}</think>#### 5 | it may be 4</think>#### 5
lenient: The answer is 5. | The answer is 5! | The answer is **5**. | The answer is $5$.
lenient: The answer is *5* | so 7 - 2 = 5 | it weighs 5kg | an area of 5 cm^2 | an area of 5 cm²
lenient: an area of 5 square feet, roughly | she has $5 left | \boxed{5 | 3 + 4 is 7 and 7 - 2 is 5
lenient: that makes 5 (five) | Answer - 5 | Answer: 5 | Answer — 5 | a 5-day trip
lenient: \boxed{} so it is 5 | \boxed{}<newline>so it is 5 | It starts at 5 p.m.
lenient: so she packs 5 t-shirts | it is 5 i.e. five | that is US$5 | that is US$5 in all | it is +5
lenient: it is = +5. | #### Step 2: multiply by 2<newline>it is 10<newline>So the answer is 5.
lenient: #### Conclusion<newline>It is 5 | #### 2. Divide<newline>It is 5
lenient: \boxed{the answer is 5}, in 3 steps
wrong: x=4 or x=5 | x=5 or x=4 | x = 4 or x = 5. | x=4, x=5 | \boxed{x=4 \text{ or } x=5} | 3 +5
wrong: 3 + 5 | apples + 5 | it is not 5 | 5 or not | sin 5 | so it is 5\theta | <think>5</think>
wrong: <think>#### 5</think> | <think>\boxed{5}</think> It is clear. | <think>so it is 5
wrong: #### 5 <think>or is it | <think>a</think> #### 5 <think> | #### 5<newline>#### 4
wrong: \boxed{5}, no, \boxed 4 | \boxed{{5}, {4}} | 4 | -5 | −5 | – 5 | it is - 5 | 5! | 5x | 5 x
wrong: 5xy | 5 - x | n - 5 | n-5 | so it is n-5 | x < 5 | x ≤ 5 | x \leq 5 | x ≠ 5 | √5 | \sqrt{5}
wrong: the root is \sqrt{5} | 5π | 5\pi | 2^5 | so 2^5 | 5^2 | 5² | x_5 | 5,5 | 5.5.5 | 5e5
wrong: log 5 or 4 | 4-5 | between 4 and 5 | 4 to 5 | 4 or 5 | 5 or 6 | either 4 or 5 | 4, 5
wrong: \boxed{4, 5} | \boxed{4 \text{ or } 5} | \boxed{4} and then 5 | #### 4 or rather 5 | (4, 5)
wrong: f(5) | 12:05 | at 4:5 | the 5th | 3 × 5 | 3*5 | 3 x 5 | 5 million | 5 thousand | 5 and a half
wrong: 5 1/2 | 5½ | 5/6 | five
gold -4 (number)
strict: -4 | −4 | –4 | - 4 | $-4$ | -$4 | $-4.00 | \boxed{-4} | \boxed{x = -4} | \boxed{- 4} | x=−4
strict: #### – 4 | -\frac{8}{2}
lenient: so x = - 4 | it is −4 | it is - 4 | the result equals -4. | minus eight plus four (-4)
wrong: 4 | 7 - 4 | 7 -4 | 7-4 | x - 4 | x-4 | Answer - 4 | GPT-4 | --4
gold 7/2 (number)
strict: 7/2 | 7/2. | 7 / 2 | 3.5 | 3 1/2 | 3½ | 3\frac{1}{2} | \frac{7}{2} | \dfrac72 | \tfrac{7}{2}
strict: 7⁄2 | \boxed{\frac{7}{2}\text{ cups}} | 3 1/2 cups
lenient: that is \frac{7}{2} | that is 7/2. | so we get 3 1/2 hours | so we get 3½ hours
wrong: -7/2 | 7/2.5 | 7/3 | 7/20 | 7/2/2 | 7/2x | 2 | 7 | 3-1/2 | 1/2
gold 1/2 (number)
strict: ½ | 0.5 | .5 | 0.50 | \frac12 | \boxed{\cfrac{1}{2}}
lenient: the chance is \frac{1}{2} | the chance is ½.
wrong: -½ | -\frac{1}{2} | the chance is -\frac{1}{2} | 50% | 1/20 | 1:2 | \frac{1}{2}x
wrong: \sqrt{\frac{1}{2}}
gold 10,000 (number)
strict: 10000 | 10,000 | 10 000 | 10~000 | 10{,}000 | 10\,000 | 10'000 | 10,000.00 | $10,000
strict: 10 thousand | \boxed{10{,}000} | \boxed{10\,000\text{ people}} | #### 10 000
lenient: they earn $10,000 a year | they earn 10 000 dollars
wrong: 10 | 0 | 10,00 | 1,0000 | 10 0000 | so 10 0000 | 10,000,000 | 10.000 | 100,00
gold 1,200,000 (number)
strict: $1.2 million | 1.2 million dollars | 1200 thousand | 1 200 000
lenient: it cost $1.2 million. | it cost $1,200,000 in all
wrong: 1.2 | $1.2 | 1.2 billion
gold 1969 (number)
strict: 1969 | 1,969
lenient: in July 1969 | It was in 1969, they say
wrong: 1969-07-20 | 20/7/1969 | 1968/1969 | 1960-1969 | 1969 BC or 1970
gold 12:30 (text)
wrong: 30 | 12 | 12.5
gold 50% (number)
strict: 50% | 50 % | 50\% | 50 percent | 50 | $$50\%$$ | \boxed{50}\%
lenient: so 50% of them
wrong: 0.5 | 50% or 60% | 1/2
gold 370 (number)
strict: 370g | 370 g | \boxed{370g}
lenient: it weighs 370g
wrong: 370x | 370gx
gold 130 (number)
strict: 130miles | 130 miles
lenient: they drove 130miles | they drove 130km in all
wrong: 130xy | 130log(2) | 130sqrt(2)
gold 0 (number)
strict: 0 | 0.0 | -0 | f = 0
wrong: 10 000 | x < 0 | 0!
gold Yes (text)
strict: Yes | yes. | #### **Yes** | \boxed{\text{Yes}}
lenient: Yes, since 3 > 2. | The answer is yes. | Yes.<newline>The proof is long | Yes (since 3 > 2)
lenient: No doubt about it: yes | Is it so? Yes | #### Conclusion<newline>So yes.
lenient: I think so.<newline>Yes. | \boxed{the answer is yes}
wrong: No | Yesterday | \boxed{No} Yes | It is not yes | No, though many say yes and no | Yes. No.
wrong: Yes, no | Yes or no | Yes/No | Yes, or no | Yes, or not | Yes or not | yes no | Yes! | -Yes
wrong: 1/Yes | non-yes | not yes | maybe yes | Maybe it is yes
wrong: I do not think that the answer is yes | yes, maybe no | <think>Yes</think> | <think>Yes
gold No (text)
strict: No
lenient: No, it is not. | No, since it may be odd
wrong: No. Yes. | Not no
gold True (text)
strict: true
lenient: so it is true
wrong: so it is not true | untrue | it isn't true | True, False | true or false
wrong: It is false that it is true
gold B (text)
strict: B | (B) | #### B. | \boxed{\textbf{B}}
lenient: The answer is (B). | B: because 3 > 2 | B) a risk score | (B) a risk score
lenient: B - a risk score | B. a risk score | Answer: B. a risk score | I choose B | so option B
lenient: #### (B) a risk score | \boxed{B) a risk score}
wrong: A | AB | (A) or (C) | A or B or C | A, B, C, D | A) or B) | B) or C) | not (B)
wrong: It is not (B). | B! | -B | a group | B<newline>C | not \boxed{B}
wrong: The answer is not \boxed{B} | \boxed{B}? No, A | \boxed{A} or maybe \boxed{B}
wrong: The answer is (A).<newline><newline>(B) is incorrect since it is too large.
wrong: A) is right<newline>B) is wrong | B? | It could be B
gold Abelian (text)
strict: abelian | #### Abelian.
lenient: The group is Abelian. | So the group is: **abelian** | Since ab = ba, it is abelian
wrong: non-abelian | nonabelian | not abelian | The group is non-abelian | The group is not abelian
wrong: It isn't abelian | Abelian or not | Abelian! | It may be that it is abelian
gold Even (text)
strict: even
lenient: It is even
wrong: Neither odd nor even | It is neither odd nor even | odd, even | It is odd or even | odd
gold \text{Evelyn} (text)
strict: Evelyn | evelyn
lenient: It is Evelyn
wrong: Carla
gold Vitamin C (text)
strict: vitamin C
lenient: It is vitamin C.
wrong: vitamin | C
gold e (text)
strict: e | $e$ | $e$. | \boxed{e} | \boxed{\mathrm{e}} | \boxed{\text{e}}
lenient: So it is $e$. | So the answer is e.
wrong: #### \exp(1) | 1/e | -e | e! | not e | non-e | e or not | \boxed{e \text{ or not}}
wrong: It is not $e$ | It isn't $e$ | It is $e$ or not | It is $e$ or $-e$ | It is $-e$ or $e$
wrong: It is $-e$, $e$ | The answer is -e. | The answer is not e. | <think>e</think>
gold i (text)
strict: \boxed{\mathrm{i}} | \text{i}
wrong: -i | 1/i
gold n (text)
strict: n | \boxed{n}
wrong: n! | 2^n | n or not
gold \sin x (latex)
strict: $\sin x$ | \sin(x)
wrong: -\sin x | \sin^{-1} x
gold sin x (text)
strict: sin x
wrong: -sin x
gold xy (text)
strict: xy
lenient: The product is $xy$.
wrong: yx | y x | -xy
gold 2^{-60} (latex)
strict: 2^{-60} | \frac{2}{2^{61}} | \frac{1}{1152921504606846976}
wrong: 2^{-61} | 2^{-55} | \frac{1}{2^{61}}
gold \frac{\pi}{2^{60}} (latex)
strict: \pi 2^{-60}
wrong: \frac{\pi}{2^{61}}
gold \infty (latex)
strict: \infty | +\infty
wrong: -\infty
gold (3, 4) (text)
strict: (3,4) | \left(3, 4\right)
lenient: The point is $(3, 4)$.
wrong: (4, 3)
gold \frac{\pi}{2} (latex)
strict: \boxed{\dfrac{\pi}{2}} | \boxed{{\frac{\pi}{2}}} | \fbox{\pi/2}
wrong: \pi
gold 72 (number)
strict: \boxed{\displaystyle 72} | \boxed{\boldsymbol{72}} | \boxed{\bm{72}} | \boxed{\bf 72}
strict: Thus, \(x = \boxed{72}\). | $$\boxed{72}$$ | **\boxed{72}**
strict: the answer is \boxed{72}. This is not hard. | \boxed{72}\text{ apples} | Answer: \boxed{72}
strict: 答案是\boxed{72} | 72个。 | #### 72元 | ７２ | ٧٢
lenient: So it is 72, since 8 * 9 = 72 | There are 72 left. | She has 72 apples in total.
lenient: Since she does not eat any, she has 72. | 答案是72 | 정답은 72개입니다 | это 72
wrong: \(\boxed{71}\) or \(\boxed{72}\) | \[\boxed{71} \quad \text{and} \quad \boxed{72}\]
wrong: \boxed{71}\quad\boxed{72} | **\boxed{71}** or **\boxed{72}**
wrong: $x_{1}=\boxed{71}$, $x_{2}=\boxed{72}$ | - \boxed{71}<newline>- \boxed{72}
wrong: (a) \boxed{71}<newline>(b) \boxed{72} | \boxed{71} 或 \boxed{72} | \boxed{71} oder \boxed{72}
wrong: $-\boxed{72}$ | $x = -\boxed{72}$ | $\frac{1}{\boxed{72}}$ | $\sqrt{\boxed{72}}$
wrong: $2\boxed{72}$ | $\boxed{72}^2$ | $\boxed{72}\pi$ | $\boxed{72}!$ | \boxed{72} million
wrong: 71 or \boxed{72} | \boxed{72} or 73 | not \boxed{72}
wrong: \boxed{72} is incorrect. The answer is 71. | 72ではありません | 72でない | 72とは限らない
wrong: 72は間違いです | 72以上 | 72未満 | 72分之一 | 72是错的 | 72 이상 | 72는 오답입니다
wrong: 72 неверно | 72 ist falsch | 72 nicht | 72 est faux | 72 dozen | 72 lakh
wrong: The answer cannot be 72 | It is not equal to 72 | 72 is not the answer | 72 is wrong
wrong: 72 isn't right | neither 71 nor 72 | 71, or 72 | 71; 72 | 71 rather than 72 | 72 or more
wrong: at least 72 | less than 72 | minus 72 | negative 72 | twice 72 | square root of 72
wrong: Is it 72? | 答案不可能是72 | 答案是71或者72 | 71以及72 | 至少72 | 大于72 | 负72 | 71または72
wrong: マイナス72 | 답은 72가 아닙니다 | не равно 72 | минус 72 | nunca 72 | menos 72 | kein 72
wrong: nicht gleich 72 | jamais 72 | ليس 72 | não é 72 | 72 değil | \boxed{-(72)} | \boxed{(72)!}
wrong: \boxed{\text{at least } 72} | \boxed{72?} | \boxed{71;72} | \boxed{71\\72} | 不是72 | 72或73
wrong: 第72 | 72万 | 72가 아니다 | 72じゃない | 4 oder 72 | nicht 72 | не 72 | 72 или 73 | 3分之72
wrong: 72不是
gold 2 (number)
wrong: \boxed{x=1,y=2} | \boxed{1;2} | \boxed{x^2=2} | \boxed{2x=2} | \boxed{-x=2}
wrong: \boxed{\sin x=2}
gold x^2 (latex)
wrong: -\boxed{x^2} | \boxed{x^2}+1 | \boxed{x^2}\text{ or }2x | \boxed{2x = x^2} | $2x$; $x^2$
wrong: It is $2x$ or $x^2$ | It is $2x$, $x^2$ | It is not $x^2$ | \boxed{\text{maybe } x^2}
wrong: \boxed{x^2 \text{ or not}} | \boxed{\text{not } x^2} | \boxed{x^2 \text{ or } x^2}
gold a \equiv 1 \pmod 3 (latex)
wrong: \boxed{a \equiv 2 \pmod 3}
gold 0.\overline{3} (latex)
wrong: \boxed{0.\overline{4}}
gold \ge 5 (latex)
wrong: \boxed{\le 5} | \boxed{5}
gold x \in (1,2) (latex)
wrong: \boxed{\{1,2\}}
gold x \in \{1,2\} (latex)
wrong: \boxed{(1,2)}
gold \frac{dy}{dx} (latex)
wrong: \boxed{\frac{dx}{dy}}
gold f(x)=2x (latex)
wrong: \boxed{f'(x)=2x}
gold 4\pi \text{ cm}^2 (latex)
wrong: \boxed{4\pi \text{ cm}^3} | \boxed{4\pi \text{ m}^2}
gold \sin 30^\circ (latex)
wrong: \boxed{\sin 30}
gold x<1 or x>2 (latex)
wrong: \boxed{x<1 and x>2}
gold A^T (latex)
wrong: \boxed{A}
gold \Delta (latex)
wrong: \boxed{\delta}
gold X^2 (latex)
wrong: \boxed{x^2}
gold \{1\},\{2\} (latex)
wrong: \boxed{\{1,2\}}
gold 5 m/s (number)
wrong: \boxed{5 s/m}
gold 5 degrees north (number)
wrong: \boxed{5 degrees south}
gold 3시간 (number)
wrong: \boxed{3시}
gold mW (text)
wrong: \boxed{MW}
gold Co (text)
wrong: \boxed{CO}
gold x' (text)
wrong: \boxed{x}
gold B' (text)
wrong: \boxed{B}
gold {1, 2} (text)
wrong: \boxed{[1, 2]}
gold a, b (text)
wrong: \boxed{(a, b)}
gold 1, 0 (text)
wrong: \boxed{1,000}
gold \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} (latex)
strict: \boxed{\begin{pmatrix}<newline>1 & 2 \\<newline>3 & 4<newline>\end{pmatrix}}
gold 45^\circ (number)
strict: $$45^\circ$$ | \boxed{45}^\circ | \boxed{45度}
gold (0, 1) (text)
strict: **(0, 1)** | \boxed{\text{(0, 1)}} | \boxed{(x,y)=(0,1)} | \boxed{x \in (0,1)}
strict: \boxed{（0，1）} | \boxed{\big(0,1\big)}
lenient: The answer is **(0, 1)**.
gold 4,6,14,15 (text)
lenient: The answer is 4, 6, 14, and 15.
gold 15 cm^2 (number)
lenient: The area is 15 cm^2. | The area is 15 cm². | The answer is $15\text{ cm}^2$.
gold 15 cubic meters (number)
lenient: The volume is 15 cubic meters.
gold 15\mbox{ cm}^2 (number)
lenient: The answer is $15\text{ cm}^2$.
gold 北京 (text)
lenient: 答案是“北京”。 | 答案是北京
gold A (text)
lenient: 答案是A | 故选A。
gold 5 kg (number)
strict: \boxed{5公斤}
"""


def problem_of(gold):
    """As a row of a file with this answer; None where no rule can check it."""
    problem = _problem_of(Row("", "q", (), gold, {}), any_answer=True)
    return None if problem.kind == "unchecked" else problem


def verdict_of(problem, text, **how):
    strict, lenient = grade(problem, text, **how)
    return "strict" if strict else "lenient" if lenient else "wrong"


def blocks():
    """[(reference answer, its kind, [(verdict, response)])] of TABLE."""
    found = []
    for line in TABLE.strip().splitlines():
        head, _, rest = line.partition(" " if line.startswith("gold ") else ": ")
        if head == "gold":
            gold, _, kind = rest[:-1].rpartition(" (")
            found.append((gold, kind, []))
        else:
            texts = rest.replace("<newline>", "\n").split(" | ")
            found[-1][2].extend((head, text) for text in texts)
    return found


BLOCKS = blocks()


def test_the_table_is_long_and_no_response_stands_twice():
    rows = [(gold, text) for gold, _, rows in BLOCKS for _, text in rows]
    assert len(rows) == len(set(rows)) >= 600


def needs(latex):
    return pytest.mark.optional("math_verify") if latex else ()


@pytest.mark.parametrize(
    "gold, kind, rows", [pytest.param(*b, id=b[0], marks=needs(b[1] == "latex")) for b in BLOCKS]
)
def test_hard_answers(gold, kind, rows):
    problem = problem_of(gold)
    assert problem.kind == kind
    assert [row for row in rows if verdict_of(problem, row[1]) != row[0]] == []


NO_NUMBER = (
    "n-1|5 - x|2\u03c0|\u221a2|5!|x - y = 1|xy - 1|Less than 2|2 - i|e - 1|3-4|12:30|2^{10}|2k|"
    "x\u22645|4343_6|2k+2|3 or 4|(3, 4)|5 squared|2L|2l|3m|two|x > 5|1,2,3|3/0|1 2|\\sqrt{2}|"
    "5 + 2i|"
)


def test_reference_answers_that_are_no_number():
    """They are words or LaTeX: no number may be made of a part of them."""
    for gold in NO_NUMBER.split("|"):
        problem = problem_of(gold)
        assert parse_number(gold) is None and (problem is None or problem.kind != "number"), gold


def test_reference_answers_with_a_name_or_a_unit():
    numbers = {"n = 1": 1, "x=\u22124": -4, "b=4": 4, "x=5": 5, "72 apples": 72, "$18.90": 18.9}
    numbers |= {"90^\\circ": 90, "1.5\\text{ hours}": 1.5, "1,234 m^2": 1234, "\\theta = 3": 3}
    for gold, value in numbers.items():
        assert float(parse_number(gold)) == value and problem_of(gold).kind == "number", gold


def test_formulas_are_no_words():
    for gold in ("p - q", "x^2", "\\pi", "ab + bc", "$pq$", "\\(n!\\)", "2 - i"):
        problem = problem_of(gold)
        assert problem is None or problem.kind == "latex", gold


# ------------------------------------------------------------- the built-in tasks: integers alone

INTEGERS = r"""
strict: 385 | 7+8=15,4+3+1=8,2+1=3 #### 385 | #### 385<newline> | \boxed{385} | **385** | $385.
strict: 386<newline>#### 385
lenient: The sum is 385. | 247 + 138 = **385** | It is 385, of course. | #### 385 apples
lenient: 17 is not it, and 385 is
wrong: 385.5 | 3385 | -385 | 1,385 | 0.385 | 385 + 1 | 1 + 385 | 770/2 or 385/1 | 7:385 | x385
wrong: 384 or 385 | between 17 and 385 somewhere | from 0 to 385 | #### 386<newline>so 385
"""


def test_integers():
    problem = Problem("What is 247 + 138?", "385", "integer")
    rows = [("wrong", ""), ("wrong", "9" * 400)]
    for line in INTEGERS.strip().splitlines():
        verdict, _, texts = line.partition(": ")
        rows += [(verdict, text) for text in texts.replace("<newline>", "\n").split(" | ")]
    assert [row for row in rows if verdict_of(problem, row[1]) != row[0]] == []
    problem = Problem("What is 9000 + 3345?", "12345", "integer")
    for text in ("12345", "12,345", "#### 12,345", "It is 12,345."):
        assert grade(problem, text).lenient, text
    assert not grade(problem, "12,34,5").lenient


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


@pytest.mark.parametrize(
    "latex",
    [
        pytest.param(x, id=name, marks=needs(x))
        for x, name in ((False, "words"), (True, "formulas"))
    ],
)
def test_signs_and_doubts_are_part_of_an_answer(latex):
    assert len(set(WORDS_AND_SYMBOLS.split("|"))) >= 40
    for gold in WORDS_AND_SYMBOLS.split("|"):
        problem = problem_of(gold)
        if (problem is None or problem.kind == "latex") != latex:
            continue
        assert any(grade(problem, f"The answer is {gold}."))
        for shape in ("-{}", "1/{}", "{}!", "not {}", "non-{}", "{} or not"):
            for stated in ("{}", "\\boxed{{{}}}", "#### {}", "${}$", "It is {}."):
                text = stated.format(shape.format(gold))
                assert grade(problem, text) == (False, False), (gold, text)


# --------------------------------------------------------- text is text, mathematics is mathematics

# Two reference answers of a pair exclude each other: a response that states one is wrong for the
# other, in either direction and in every form.
OTHERS = r"""
on|no   US|SU   3x4|2x6   9 a.m.|9 p.m.   192.168.0.1|192.168.0.2   2020-12-25|1983   3-2|5-4
A1|1A   (1,2)|\{1,2\}   2516_8|2516_9   3,4|(4,3)   5 R 3|3 R 5   3,4|4,3   (1,2)|(2,1)
[0,1]|(0,1)   (0,1]|[0,1)   (1,2,2)|(1,2)   \{1,2\}|\{1,2,2\}   5 kg|5 g   5 cm|5 m
5 dollars|5 euros   10_2|2   1.2.3|1.2.4   12/25/2020|25/12/2020   2:3|3:2   1:2|0.5
x=2, y=3|y=2, x=3   x = 5|y = 5   AB|BA is   ABD|AB   ABD|ABCD   ABD|ABDD   A+|A   A+|+A   A-|-A
C++|C   B2|2B   H2O|2HO   F=ma|F=mb   room 101|room 110   101010|010101   (2, 3)|2, 3   [2,3]|2,3
3 or 5|3   7th|7   1st|first place   Co|oC   7pm|7am   7:30 pm|7:30 am   no one|one no
dog bites man|man bites dog   +5-3|2   10-4|6   3/4/2021|4/3/2021   a-b|b-a   2^{10}|2^{11}
\frac{1}{2}|\frac{1}{3}   x_1|x_2   F_3|F_4   \sqrt{2}|\sqrt{3}   n-1|n+1   1,000|1   6:00|600
(555) 123-4567|(555) 123-4568   A4|A5   3D|D3   2D|D2   x2|2x   k2|2k   0x1F|0x1E   1e3|1e4
50%|0.5   I|II   IV|VI   left|right   true|false   East|West   12 R 1|1 R 12   10 mod 3|3 mod 10
5!|120!   N/A|A/N   AC/DC|DC/AC   1 2 3|3 2 1   1;2|2;1   (A)|(B)   A and C|A and B
(-\infty, 1]|(-\infty, 1)   [0,1] \cup [2,3]|(0,1) \cup (2,3)   \{0\}|0   (0)|0 or 1   72人|72元
三|四   北京|南京   5 m/s|5 m   90^\circ|90 radians
\frac{\pi}{2} \text{ cm}|\frac{\pi}{2} \text{ m}
"""
# The second text of a pair states the first one's answer.
SAME = r"""
on|on   US|US   3x4|3 x 4   9 a.m.|9 a.m.   192.168.0.1|192.168.0.1   2020-12-25|2020-12-25
3-2|3-2   (1,2)|(1, 2)   (1,2)|\left(1, 2\right)   \{1,2\}|\{2,1\}   2516_8|2516_{8}   3,4|3, 4
5 R 3|5 R 3   ABD|ADB   ABD|A, B, D   1,-2|1, -2
\left( 3, \frac{\pi}{2} \right)|(3, \frac{\pi}{2})   (3,4]|(3, 4]   p - q|p-q   p - q|-q+p
2k+2|2(k+1)   x^2|x \cdot x   \text{(C)}|C   \text{(C)}|(C)   5 kg|5   5 kg|5 kilograms   5|5 kg
$18.90|18.90   $18.90|\$18.90   $18.90|18.90 dollars   50%|50\%   90^\circ|90   90^\circ|90 degrees
(0,9) \cup (9,36)|(0, 9) \cup (9, 36)   x \in [-2,7]|[-2,7]   y = 2x + 3|y=2x+3   F_n|F_{n}
\mathbb{R}|\mathbb{R}
\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}|\begin{pmatrix}-2\\-14\\-7\end{pmatrix}
1 \pm \sqrt{19}|1\pm\sqrt{19}   \frac9{19}|\frac{9}{19}   Neither odd nor even|neither odd nor even
\frac{270}7\text{ degrees}|\frac{270}{7}   6 - 5i|6-5i   6 - 5i|-5i+6
\{1\pm\sqrt{5},-2\}|\{-2, 1\pm\sqrt{5}\}   1 \text{ or } 3|1 or 3   H2O|H2O   O(n^2)|O(n^2)
北京|北京   [0, 2\pi]|[0,2\pi]   (x_0, y_0)|(x_0, y_0)   n!|n!
"""
STATED = ("{}", "\\boxed{{{}}}", "#### {}", "The answer is {}.", "It is ${}$.", "So it is {}")


def pairs_of(table):
    pairs = [pair for line in table.strip().splitlines() for pair in line.split("   ")]
    return [tuple(pair.split("|")) for pair in pairs]


@pytest.mark.optional("math_verify")
def test_a_response_is_right_for_one_of_two_answers_alone():
    assert len(pairs_of(OTHERS)) == 96
    for one, other in pairs_of(OTHERS):
        for gold, stated in ((one, other), (other, one)):
            for form in STATED:
                assert not any(grade(problem_of(gold), form.format(stated))), (gold, form)


@pytest.mark.optional("math_verify")
def test_other_ways_to_state_an_answer():
    assert len(pairs_of(SAME)) == 53
    for gold, stated in pairs_of(SAME):
        for form in STATED:
            assert any(grade(problem_of(gold), form.format(stated))), (gold, stated, form)


def right_for(problem, texts, verdict, **how):
    for text in texts:
        assert grade(problem, text, **how) == (verdict, verdict), text


def test_a_reference_answer_of_two_boxes_has_two_values():
    two = problem_of(r"x=\boxed{3} or x=\boxed{5}")
    right = [two.answer, r"\boxed{5} and \boxed{3}", r"\boxed{3, 5}"]
    right_for(two, [*right, r"\boxed{3 \text{ or } 5}"], True)
    wrong = [r"\boxed{3}", r"\boxed{5}", r"\boxed{3}, \boxed{3}"]
    wrong += [r"\boxed{3}, \boxed{5}, \boxed{7}", r"\boxed{3} is one. The other is \boxed{5}"]
    right_for(two, wrong, False)


def test_a_response_of_three_boxes_states_none_of_them():
    for gold in "357":
        right_for(problem_of(gold), [r"\boxed{3}, \boxed{5}, \boxed{7}"], False)
    right_for(problem_of("7"), [r"first \boxed{3}, then I add \boxed{7}"], True)


def test_options_are_a_set_of_letters():
    boxed = lambda texts: [f"\\boxed{{{text}}}" for text in texts]
    right_for(problem_of("ABD"), boxed(["ABD", "ADB", "A, B, D", "A,B,D", "\\text{ABD}"]), True)
    others = ["AB", "ABCD", "ABDD", "A B D", "A or B or D", "abd", "A; B; D"]
    right_for(problem_of("ABD"), boxed(others), False)


def test_a_response_that_was_cut_states_what_is_marked_and_whole():
    right = [r"So \boxed{12}.", r"So $\boxed{12}$", "#### 12\n"]
    wrong = ["7 + 5 is 12", "12", r"\boxed{12} as a first guess, but wait", r"\boxed{12"]
    wrong += [r"\boxed 12", "#### 12", "#### 12\nbut", r"<think>\boxed{12}"]
    for problem in (problem_of("12"), Problem("What is 7 + 5?", "12", "integer")):
        right_for(problem, right, True, finished=False)
        right_for(problem, wrong, False, finished=False)
    not_at_the_end = [r"\boxed{12},", r"\boxed{\boxed{12}", r"\frac{\boxed{12}", "#### 12 or\n"]
    right_for(problem_of("12"), not_at_the_end, False, finished=False)


def test_thinking_may_begin_in_the_prompt_and_has_several_names():
    right, wrong = "7+5=12 or so</think>13", ["13", "#### 13"]
    for prompt in ("<think>\n", ""):
        right_for(problem_of("13"), [right], True, prompt=prompt)
    right_for(problem_of("13"), wrong, False, prompt="<think>\n")
    right_for(problem_of("13"), ["#### 13"], True, prompt="<think>\n\n</think>\n\n")
    right_for(problem_of("13"), ["<think>#### 13"], False, prompt="</think>")
    for tag in ("think", "Think", "thinking", "reasoning", "thought"):
        inside = f"<{tag}>\\boxed{{13}}"
        right_for(problem_of("13"), [inside, f"{inside}</{tag}>"], False)
        right_for(problem_of("13"), [f"<{tag}>x</{tag}>\\boxed{{13}}"], True)


# -------------------------------------------------------------------------------------------- costs


@pytest.mark.optional("math_verify")
def test_degenerate_formulas_cost_their_time_once(monkeypatch):
    assert grade(problem_of(r"\pi"), r"\boxed{\pi}").strict  # the process has started
    monkeypatch.setattr("problems.latex.LATEX_SECONDS", 0.3)
    text, asked, ask = r"\boxed{9^{9^{9^{9}}}}", [], LATEX.apart.ask
    monkeypatch.setattr(LATEX.apart, "ask", lambda *given: asked.append(given) or ask(*given))
    for _ in range(20):
        assert grade(problem_of(r"\frac{\pi}{4}"), text) == (False, False)
    assert LATEX.known["9^{9^{9^{9}}}", r"\frac{\pi}{4}"] in (None, False)
    assert len(asked) <= 1  # remembered


@pytest.mark.parametrize("piece", ["\u00bd,", "1\u00b0,", "x^\u00bd,", "1\\%,", "\uff11,"])
def test_long_lists_cost_little(piece):
    started = time.process_time()
    for gold in ("1, 2", "(1, 2)", "1 or 2"):
        grade(problem_of(gold), piece * (20_000 // len(piece)))
    assert time.process_time() - started < 2.0
