"""The house: which room may import which, how long a line and a function may be."""

import ast
import pathlib
import re
import sys

import pytest
from conftest import ROOT, named_beside_equations

NOT_OURS = {"runs", *(p.parent.name for p in ROOT.glob("*/pyvenv.cfg"))}  # environments
FILES = sorted(
    p.relative_to(ROOT) for p in ROOT.rglob("*.py") if not NOT_OURS & set(p.relative_to(ROOT).parts)
)
# Imports point down: a file imports only from floors below its own, or from its own room. A few
# files of a room lie below the rest of it, for others to build upon.
FLOORS = [
    {"program"},
    {"questions", "scripts/page"},
    {"engine/rows", "grading"},
    {"engine/logprobs"},
    {"losses", "tasks"},
    {"hapo", "sampling"},
    {"internals"},
    {"fast", "bupo"},
    {"evaluate"},
    {"engine/engine"},
    {"scale"},
    {"run"},
    {"train"},
    {"bridges"},
]
# python internals.py and the curves of a run start a program of scripts/, guarded
GUARDED = {("internals", "scripts"), ("run", "scripts")}
FLOOR = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}


def room(path):
    """The room of a file, or of a module's dotted name."""
    parts = [part.removesuffix(".py") for part in pathlib.Path(path).parts]
    whole = "/".join(parts[:2])
    return whole if whole in FLOOR else parts[0]


def imports(path):
    """(room, whether the import stands inside a function or block) of everything a file imports."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            names = [f"{module}/{alias.name}" if module else alias.name for alias in node.names]
            for name in names:
                yield room(name.replace(".", "/")), node.col_offset > 0


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in FLOOR], ids=str)
def test_imports_point_down(path):
    own = room(path)
    for other, inside in imports(path):
        if (own, other) in GUARDED:
            assert inside
        elif other in FLOOR and other != own:
            assert FLOOR[other] < FLOOR[own], f"{path} imports {other}"
            assert not inside or own == "internals", f"{path} imports {other} inside a function"
        else:
            assert other not in ("train", "scripts", "tests", "benchmarks", "experiments")


def test_every_room_has_a_floor():
    rooms = {room(p) for p in FILES} - {"tests", "benchmarks", "experiments", "scripts", "lessons"}
    assert rooms == FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_line_has_at_most_100_columns_and_a_function_50_lines(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert max(map(len, text.splitlines()), default=0) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 50, node.name


@pytest.mark.parametrize("path", [p for p in FILES if len(p.parts) == 1], ids=str)
def test_public_functions_of_the_top_level_are_annotated(path):
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        methods = [node] if isinstance(node, ast.FunctionDef) else getattr(node, "body", [])
        for f in methods:
            if not isinstance(f, ast.FunctionDef) or f.name.startswith("_"):
                continue
            arguments = [*f.args.args, *f.args.kwonlyargs]
            missing = [a.arg for a in arguments if a.annotation is None and a.arg != "self"]
            assert not missing and f.returns is not None, (f.name, missing)


def test_the_readme_is_short_and_its_files_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1800
    assert max(map(len, text.splitlines())) <= 120
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
            if not link.startswith("http"):
                there = page.parent / link if link else page
                assert there.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(there), f"{page.name}: {link}#{anchor}"


def anchors(page):
    """Of a page's headings, as a link names them."""
    titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_marks_are_counted_right():
    """# HAPO A to D in train.py; # BuPO 1 to N wherever it differs, N as the README says."""
    texts = {p: source(p) for p in FILES if "tests" not in p.parts}
    hapo = [m for text in texts.values() for m in re.findall(r"# HAPO ([A-D])\b", text)]
    assert sorted(hapo) == list("ABCD")
    assert len(re.findall(r"# HAPO ([A-D])\b", source("train.py"))) == 4
    bupo = {int(m) for text in texts.values() for m in re.findall(r"# BuPO (\d+)\b", text)}
    assert bupo == set(range(1, max(bupo) + 1))
    assert f"`# BuPO 1` to `# BuPO {max(bupo)}`" in source("README.md")
    assert f"BuPO 1 to {max(bupo)}" in source("train.py")


def test_every_planted_fault_has_its_place():
    """What a fault of experiments/mutations.diff replaces is in its file."""
    sys.path.insert(0, str(ROOT / "experiments"))
    import mutations

    faults = mutations.read_faults(mutations.FAULTS.read_text(encoding="utf-8"))
    assert len(faults) > 200
    lost = [(file, piece) for file, piece, _, _ in faults if piece not in source(file)]
    assert not lost


def test_every_function_named_in_the_equations_exists():
    """docs/equations.md: `module.function` is there, and so is each `test_file.py::test_name`."""
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    for module, name in re.findall(r"`([a-z]+)\.([a-z_]\w+)`", text):
        if name != "py":
            assert re.search(rf"(def|class) {name}\b|^{name} =", source(f"{module}.py"), re.M), name
    tests = named_beside_equations()
    assert len(tests) > 40
    for file, name in tests:
        assert name is None or f"def {name}(" in source(pathlib.Path("tests") / file), (file, name)


def source(path):
    return (ROOT / path).read_text(encoding="utf-8")
