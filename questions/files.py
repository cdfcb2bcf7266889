"""Files of questions, row by row: JSONL with question (or prompt) and answer; verl's parquet."""

import json
import math
import pathlib
from decimal import Decimal

from program.errors import BadInput


def rows_of(path, flag="--data"):
    """(place, question, answer) of every row of a file; BadInput names `flag`, file and line."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise BadInput(f"{flag} {path}: no such file")
    return _parquet_rows(path, flag) if path.suffix == ".parquet" else _jsonl_rows(path, flag)


def _jsonl_rows(path, flag):
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{flag} {path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8").strip())
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an endless number
                raise BadInput(
                    f"{where}: not JSON ({error}); every line must be one JSON object"
                ) from None
            if not isinstance(row, dict):
                raise BadInput(
                    f"{where}: not a JSON object with the keys question (or prompt) and answer"
                )
            question = row.get("question", row.get("prompt"))
            if question is None or "answer" not in row:
                raise BadInput(
                    f"{where}: needs the keys question (or prompt) and answer; "
                    f"it has {', '.join(sorted(map(str, row))) or 'none'}"
                )
            if not isinstance(question, str) or not question.strip():
                raise BadInput(f"{where}: the question is empty; remove the line or fill it in")
            answer = row["answer"]
            yield f"line {number}", question.strip(), _as_text(answer, where)


def _as_text(answer, where):
    """A number in digits: 1e-05 is 0.00001."""
    if isinstance(answer, float) and math.isfinite(answer):
        return format(Decimal(repr(answer)), "f")
    if isinstance(answer, (bool, float)) or not isinstance(answer, (str, int)):
        raise BadInput(f"{where}: the answer is {answer!r}; it must be a text or a number")
    return str(answer)


def _parquet_rows(path, flag):
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadInput(
            f"{flag} {path}: reading parquet needs pyarrow; "
            "pip install pyarrow, or convert the file to JSONL"
        ) from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{flag} {path}: not a readable parquet file ({str(error).splitlines()[0]})"
        ) from None
    for number, row in enumerate(rows, 1):
        where = f"{flag} {path}, row {number}"
        try:
            question, answer = row["prompt"], row["reward_model"]["ground_truth"]
            if not isinstance(question, str):
                question = "\n\n".join(m["content"] for m in question if m["role"] != "system")
        except (KeyError, TypeError):
            raise BadInput(
                f"{where}: needs prompt (messages) and reward_model.ground_truth; "
                f"it has {', '.join(sorted(row))}"
            ) from None
        if not question.strip():
            raise BadInput(f"{where}: the question is empty; remove the row or fill it in")
        yield f"row {number}", question.strip(), _as_text(answer, where)
