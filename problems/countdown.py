"""Evaluate Countdown expressions by walking a syntax tree with four operators, and generate random
Countdown problems."""

import ast
import operator
import re
from fractions import Fraction

LONGEST_EXPRESSION = 200  # characters

_EXPRESSION = re.compile(r"[0-9+\-*/() ]+")
_SIGNS = [  # other ways to write - * /, and what wraps a formula
    (r"[\u2010-\u2013\u2212]", "-"),
    (r"\u00d7|\u00b7|\\times(?![a-z])|\\cdot(?![a-z])", "*"),
    (r"\u00f7|\\div(?![a-z])", "/"),
    (r"\\[()\[\]]|\$|\*\*(?![0-9( ])|(?<![0-9) ])\*\*", " "),
]
_IN_TEXT = re.compile(
    r"(?<![0-9(])\(*[0-9]{1,9}(?![0-9]) ?\)*(?: ?[-+*/] ?\(*[0-9]{1,9}(?![0-9]) ?\)*)+"
)
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: a / b if b else None,
}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def evaluate_expression(text):
    """(value, numbers used) of an expression over + - * / and brackets, or None; never `eval`."""
    if len(text) > LONGEST_EXPRESSION or not _EXPRESSION.fullmatch(text) or text.count("(") > 20:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    numbers = []

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 10**6:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = value(node.left), value(node.right)
            if left is not None and right is not None:
                return _OPERATORS[type(node.op)](left, right)
        return None  # **, //, unary signs, names, calls: not part of the game

    result = value(tree)
    return None if result is None else (result, numbers)


def plain_signs(text):
    """One kind of minus, times and divided by."""
    for pattern, sign in _SIGNS:
        text = re.sub(pattern, sign, text)
    return text


def last_expression(text):
    """The last expression with an operator in a text, without brackets that are the sentence's
    own, or None: "(so 1+2)" holds 1+2."""
    *_, last = [None, *_IN_TEXT.finditer(text)]
    if last is None or re.search(r"(?:^|[ (=])-\Z", text[: last.start()]):
        return None  # -3+5: a sign is no operator here
    found = last[0].strip()
    while found.count("(") > found.count(")") and found.startswith("("):
        found = found[1:]
    while found.count(")") > found.count("(") and found.endswith(")"):
        found = found[:-1].rstrip()
    return found


def random_expression(numbers, rng):
    """(text, value) of a random expression with + - * over all the numbers, each used once.

    With brackets where they are needed.
    """
    terms = [(str(n), "", n) for n in rng.sample(numbers, len(numbers))]
    while len(terms) > 1:
        left, right = terms.pop(rng.randrange(len(terms))), terms.pop(rng.randrange(len(terms)))
        sign = rng.choice("+-*")
        a, b = left[0], right[0]
        if left[1] in ("+", "-") and sign == "*":
            a = f"({a})"
        if right[1] and (sign == "*" or (sign == "-" and right[1] in "+-")):
            b = f"({b})"
        terms.append((f"{a}{sign}{b}", sign, _APPLY[sign](left[2], right[2])))
    return terms[0][0], terms[0][2]
