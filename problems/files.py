"""Read data sets: JSONL, a JSON array, CSV or parquet (each also as .gz), and folders or data sets
of the hub through `datasets`, an optional library."""

import csv
import gzip
import io
import json
import math
import pathlib
import zlib
from collections.abc import Iterator
from decimal import Decimal
from typing import NamedTuple

from common.errors import UserError
from common.hub import check_network

QUESTIONS = ("question", "prompt", "messages")  # where nobody says which column it is
ANSWERS = ("answer", "reward_model.ground_truth")


class DatasetSpec(NamedTuple):
    """What the user says of his data."""

    split: str = "train"  # of a data set that has several
    question: str = ""  # columns; "a.b" is b inside a
    answer: str = ""


DEFAULT_SPEC = DatasetSpec()


class Row(NamedTuple):
    """One question as it stands in the data."""

    place: str  # "line 3"
    question: str
    history: tuple  # ((role, text), ...): the system message and turns before the question
    answer: str
    columns: dict  # the whole row


class Unusable(ValueError):
    """Why a row cannot be used, in a few words."""


def rows_of(name, flag="--data", split="train") -> Iterator[tuple[str, dict]]:
    """(place, row) of everything in a file, a folder or a hub's data set. UserError names `flag`,
    file and line of whatever cannot be read."""
    check_exists(name, flag)
    path = pathlib.Path(name)
    if path.is_file():
        kind = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
        reader = {".json": _json, ".csv": _csv, ".parquet": _parquet}.get(kind, _jsonl)
        yield from reader(path, flag)
    else:
        yield from _dataset(name, flag, split)


def check_exists(name, flag="--data"):
    """Raise UserError where a name is no file, no folder and no data set's name on the hub."""
    if not pathlib.Path(name).exists() and not _is_hub_name(name):
        raise UserError(f"{flag} {name}: no such file")


def row_of(place: str, columns: dict, form: DatasetSpec = DEFAULT_SPEC) -> Row:
    """A row's question and answer, as texts; Unusable says why there are none."""
    asked = _first(columns, [form.question] if form.question else QUESTIONS, "question")
    answer = _first(columns, [form.answer] if form.answer else ANSWERS, "answer")
    if isinstance(asked, str):
        history, question = (), asked.strip()
    else:
        *history, (role, question) = _messages(asked)
        if role != "user":
            raise Unusable(f"its last message is the {role}'s, not the user's")
        history, question = tuple(history), question.strip()
    answer = _as_text(answer)
    if not question:
        raise Unusable("its question is empty")
    for text in (question, answer, *(text for _, text in history)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unusable("it holds half a character (a lone surrogate)") from None
    return Row(place, question, history, answer, columns)


def _first(columns, names, what):
    """Return the first of some columns that holds something; if all are empty, an empty one."""
    found = []
    for name in names:
        value = columns
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found.append(value)
    if found:
        return next((value for value in found if value not in ("", [])), found[0])
    there = ", ".join(sorted(str(name) for name, value in columns.items() if value is not None))
    raise Unusable(f"it has no {what} (no {' or '.join(names)}; it has {there or 'nothing'})")


def _messages(asked):
    """((role, text), ...) of a chat; a content of several parts is joined where all are texts."""
    if not isinstance(asked, (list, tuple)) or not asked:
        raise Unusable(f"its question is {_kind(asked)}, neither a text nor a chat")
    found = []
    for message in asked:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, (list, tuple)):
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            whole = len(texts) == len(content) and all(isinstance(t, str) for t in texts)
            content = "".join(texts) if whole else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise Unusable("its question is a list, but not of messages with role and text")
        found.append((message["role"], content))
    return found


def _as_text(answer):
    """A number in digits: 1e-05 is 0.00001."""
    if isinstance(answer, (float, Decimal)) and math.isfinite(answer):
        return format(Decimal(str(answer)), "f")
    if isinstance(answer, (bool, float, Decimal)) or not isinstance(answer, (str, int)):
        raise Unusable(f"its reference answer is {_kind(answer)}, neither a text nor a number")
    return str(answer)


def _kind(value):
    kinds = {dict: "an object", list: "a list", bool: "true or false"}
    return kinds.get(type(value), repr(value)[:40])


# ------------------------------------------------------------------------------------------ readers


def _opened(path):
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def _text_of(path, flag):
    """A whole file as text; a byte-order mark goes."""
    try:
        with _opened(path) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not UTF-8 ({error}); save it as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{flag} {path}: not a whole .gz file ({error})") from None


def _jsonl(path, flag):
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield f"line {number}", _object(line, f"{flag} {path}, line {number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{flag} {path}: not a whole .gz file ({error})") from None


def _object(line, where):
    try:
        row = json.loads(line.decode("utf-8").strip())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an endless number
        raise UserError(
            f"{where}: not JSON ({error}); every line must be one JSON object"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object with the keys question (or prompt) and answer")
    return row


def _json(path, flag):
    """An array of objects; many a .json file holds lines of JSON instead."""
    text = _text_of(path, flag)
    if not text.lstrip().startswith("["):
        yield from _jsonl(path, flag)
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path}: not JSON ({error})") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{flag} {path}, row {number}: not a JSON object")
        yield f"row {number}", row


def _csv(path, flag):
    csv.field_size_limit(2**31 - 1)
    lines = csv.DictReader(io.StringIO(_text_of(path, flag), newline=""), strict=True)
    try:
        for row in lines:
            where = f"{flag} {path}, line {lines.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: has another number of fields than the first line")
            yield f"line {lines.line_num}", row
    except csv.Error as error:
        raise UserError(f"{flag} {path}, line {lines.line_num}: not CSV ({error})") from None


def _parquet(path, flag):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{flag} {path}: reading parquet needs pyarrow; "
            "pip install pyarrow, or convert the file to JSONL"
        ) from None
    try:
        with _opened(path) as file:
            rows = pyarrow.parquet.read_table(io.BytesIO(file.read())).to_pylist()
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(
            f"{flag} {path}: not a readable parquet file ({str(error).splitlines()[0]})"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


# ---------------------------------------------------------------------------------------- data sets


def _is_hub_name(name):
    """owner/name, or owner/name:configuration, as a hub calls its data sets."""
    path = pathlib.Path(str(name).partition(":")[0])
    file = path.suffix.lower() in (".jsonl", ".json", ".csv", ".parquet", ".gz", ".txt")
    two = len(path.parts) == 2 and not path.is_absolute()
    return two and not file and not path.parent.is_dir()


def _dataset(name, flag, split):
    try:
        import datasets
    except ImportError:
        what = "a folder" if pathlib.Path(name).is_dir() else "no file; a hub's data set"
        raise UserError(
            f"{flag} {name}: {what} is read through datasets: pip install datasets, or name a file "
            "(.jsonl, .json, .csv, .parquet)"
        ) from None
    try:
        rows = _load(datasets, str(name), split, flag)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises many kinds, the hub's among them
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{flag} {name}: datasets cannot read its split {split!r} ({first})"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", dict(row)


def _load(datasets, name, split, flag):
    if pathlib.Path(name).is_dir():
        saved = any((pathlib.Path(name) / f).is_file() for f in ("state.json", "dataset_dict.json"))
        rows = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
        return rows[split] if isinstance(rows, dict) else rows
    name, _, configuration = name.partition(":")
    if not (pathlib.Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        check_network(f"{flag} {name}", name, kind="dataset")
    known = datasets.get_dataset_config_names(name)
    if not configuration and len(known) > 1:
        configuration = next((c for c in ("default", "main") if c in known), "")
        if not configuration:
            raise UserError(
                f"{flag} {name}: has the configurations {', '.join(known)[:200]}; name one of "
                f"them: {name}:{known[0]}"
            )
    return datasets.load_dataset(name, configuration or None, split=split)
