"""Define UserError, for mistakes that the user can correct: one line, exit code 2."""


class UserError(ValueError):
    """Something the user can mend: one line that names it and says what to do."""
