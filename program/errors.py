"""The two errors that every program of this project ends with: one line, exit code 2."""


class BadInput(ValueError):
    """Something the user can mend: one line that names it and says what to do."""


class NonFinite(ArithmeticError):
    """A NaN or an infinity where a number must be: in logits, for example."""
