"""The layout: what may import what, how long a line and a function may be, what stands alone."""

import ast
import functools
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, named_beside_equations

NOT_OURS = {"runs", *(p.parent.name for p in ROOT.glob("*/pyvenv.cfg"))}  # environments
FILES = sorted(
    p.relative_to(ROOT) for p in ROOT.rglob("*.py") if not NOT_OURS & set(p.relative_to(ROOT).parts)
)
# Imports point down: a file imports only from levels below its own, or from its own folder. The
# five concept files are the lowest levels: they import no folder of the project.
LEVELS = [
    {"losses"},
    {"hapo", "sampling"},
    {"internals"},
    {"bupo"},
    {"bridges"},
    {"common"},
    {"problems", "scripts/page"},
    {"tasks", "engine"},
    {"run/evaluate_options"},
    {"evaluate"},
    {"run"},
    {"train"},
]
CONCEPTS = ("losses", "hapo", "sampling", "internals", "bupo")
LIBRARIES = {"losses": {"torch"}, "hapo": {"torch"}}  # the other three: transformers and tqdm, too
# python internals.py and the curves of a run start a program of scripts/, guarded
GUARDED = {("internals", "scripts"), ("internals", "common"), ("run", "scripts")}
LEVEL = {part: n for n, parts in enumerate(LEVELS) for part in parts}
LONGEST = {"train_step": 120}  # lines of code; one page is better than twelve hops
OTHERS = {"tests", "experiments", "scripts", "lessons"}


@functools.cache
def source(path):
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def tree(path):
    return ast.parse(source(path))


@functools.cache
def nodes(path):
    """All nodes of a file's syntax tree, in the order of ast.walk."""
    return list(ast.walk(tree(path)))


def functions(parent):
    return [node for node in parent if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def part_of(path):
    """The part of the project that a file, or a module's dotted name, belongs to."""
    parts = [part.removesuffix(".py") for part in pathlib.Path(path).parts]
    whole = "/".join(parts[:2])
    return whole if whole in LEVEL else parts[0]


def imports(path):
    """(dotted module with slashes, whether the import is guarded) of all imports of a file."""
    for node in nodes(path):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            names = [f"{module}/{alias.name}" if module else alias.name for alias in node.names]
            for name in names:
                yield name.replace(".", "/"), node.col_offset > 0


def test_imports_point_down():
    for path in FILES:
        own = part_of(path)
        for name, inside in imports(path) if own in LEVEL else ():
            other = part_of(name)
            said = f"{path} imports {name}"
            if (own, other) in GUARDED:
                assert inside, said
            elif other in LEVEL and other != own:
                assert LEVEL[other] < LEVEL[own], said
                assert not inside or own == "internals", f"{said} inside a function"
            else:
                assert other not in OTHERS | {"train"}, said


def test_there_are_at_most_eleven_folders_and_every_part_has_a_level():
    assert {part_of(p) for p in FILES} - OTHERS == LEVEL.keys()
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    folders = {path.partition("/")[0] for path in tracked if "/" in path}
    assert len([name for name in folders if not name.startswith(".")]) <= 11


def test_no_files_import_each_other_in_a_circle():
    known = {p.with_suffix("").as_posix(): p for p in FILES if "tests" not in p.parts}
    known |= {p.stem: p for p in FILES if p.parts[0] in ("experiments", "scripts")}
    edges = {p: set() for p in known.values()}
    for p in edges:
        for name, inside in imports(p):
            target = known.get(name) or known.get(name.rpartition("/")[0])
            entry = p.stem == "internals" and inside  # python internals.py starts its program
            if target and target != p and not entry:
                edges[p].add(target)
    while leaves := [p for p, targets in edges.items() if not targets]:
        for leaf in leaves:
            del edges[leaf]
        for targets in edges.values():
            targets -= set(leaves)
    assert not edges


def test_concept_files_import_libraries_and_each_other_alone():
    for name in CONCEPTS:
        allowed = LIBRARIES.get(name, {"torch", "transformers", "tqdm"}) | set(CONCEPTS)
        for module, guarded in imports(f"{name}.py"):
            first = module.partition("/")[0]
            entry = name == "internals" and guarded
            assert first in allowed or first in sys.stdlib_module_names or entry, module


ALONE = {
    ("losses", "hapo"): """
import torch, hapo, losses
entropy, mask = torch.tensor([[0.1, 1.0], [0.5, 0.2]]), torch.ones(2, 2)
h = hapo.modulation(entropy, hapo.entropy_stats(entropy, mask), mask)
A = hapo.token_group_advantages(torch.tensor([1.0, 0.0]), mask, 2)
ratio = torch.tensor([[1.0, 1.2], [0.9, 1.0]], requires_grad=True)
A = hapo.redistribute_advantages(A, h, ratio, 0.2, 0.28)
loss = losses.masked_mean(losses.clipped_surrogate(ratio, A, *hapo.adaptive_clip(h)), mask)
loss.backward()
assert h.shape == A.shape == (2, 2) and loss.isfinite() and ratio.grad.abs().sum() > 0
""",
    CONCEPTS: """
import torch, transformers, bupo, hapo, internals, losses, sampling
config = transformers.Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
)
model = transformers.AutoModelForCausalLM.from_config(config)
rollout = sampling.generate(model, [[5, 6, 7]], 2, 8, [3], temperature=0.8)
packed = internals.unpacked(rollout, slice(0, 2))
states = internals.response_states(model, packed)
weight, tokens = internals.unembedding(model), packed.tokens
logp, H = losses.token_logprobs_and_entropy(states, weight, tokens, temperature=0.8)
assert torch.allclose(logp, rollout.logp[rollout.mask], atol=1e-4)
assert rollout.scores.policy == "sampler"
found = bupo.measure_boundary(model, *rollout.with_response_mask(2))
assert found.change.shape == (3,) and 1 <= found.layer <= 3
assert bupo.target_layer(1, 2, found.layer) == found.layer
""",
}


def test_concept_files_work_in_an_empty_folder(tmp_path, monkeypatch):
    """Two of them, and then all five, where no other file of the project can be imported."""
    ours = {path.stem for path in ROOT.glob("*.py")}
    ours |= {path.parent.name for path in ROOT.glob("*/*.py")}
    inside = lambda p: ROOT in (here := pathlib.Path(p).resolve(), *here.parents)
    others = [p for p in sys.path if "site-packages" in p or not inside(p)]
    for names, text in ALONE.items():
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            monkeypatch.delitem(sys.modules, name)
        folder = tmp_path / str(len(names))
        folder.mkdir()
        for name in names:
            shutil.copy(ROOT / f"{name}.py", folder)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [str(folder), *others])
        alone = {}
        exec(text, alone)
        assert pathlib.Path(alone["hapo"].__file__).parent == folder


def test_a_line_has_at_most_100_columns_and_a_function_50_lines_of_code():
    for path in FILES:
        lines = source(path).splitlines()
        assert max(map(len, lines), default=0) <= 100, path
        for node in functions(nodes(path)):
            own = [line.strip() for line in lines[node.lineno - 1 : node.end_lineno]]
            docstring = ast.get_docstring(node, clean=False) or ""
            count = sum(bool(line) and line[0] != "#" for line in own)
            count -= sum(bool(line.strip()) for line in docstring.splitlines())
            if node.name in LONGEST:
                assert len(own) <= LONGEST[node.name], node.name
            else:
                assert count <= 50, f"{path}: {node.name}"


def test_no_text_file_is_opened_in_the_platforms_encoding():
    """What no test runs is found by eye: every open and read_text names its encoding."""
    for path in FILES:
        for call in nodes(path):
            name = getattr(getattr(call, "func", None), "attr", "")
            built_in = getattr(getattr(call, "func", None), "id", "") == "open"
            if isinstance(call, ast.Call) and (built_in or name in ("read_text", "write_text")):
                named = {keyword.arg for keyword in call.keywords}
                binary = built_in and "b" in "".join(ast.unparse(x) for x in call.args[1:])
                assert binary or "encoding" in named, f"{path}:{call.lineno}"


MARKED = {  # what a test, or a function of its file that it calls, must not say without the mark
    "pytest.mark.programs": r"sys\.executable|torch\.distributed\.run",
    "pytest.mark.optional": "importorskip",
}


@pytest.mark.parametrize("mark", MARKED)
def test_what_starts_an_interpreter_or_may_be_skipped_is_marked(mark):
    unmarked = []
    for path in (p for p in FILES if p.parts[0] == "tests" and "exercises" not in p.parts):
        found = {f.name: f for f in functions(tree(path).body)}
        texts = {name: ast.unparse(f) for name, f in found.items()}
        for name in (name for name in found if name.startswith("test_")):
            reached = [name]
            for text in map(texts.get, reached):  # the list grows
                words = set(re.findall(r"\w+", text)) & texts.keys()
                reached += sorted(words - set(reached))
            text = "\n".join(map(texts.get, reached))
            marked = re.search(rf"^pytestmark = .*{re.escape(mark)}\b", source(path), re.M)
            marked = marked or mark in "".join(map(ast.unparse, found[name].decorator_list))
            if re.search(MARKED[mark], text) and not marked:
                unmarked.append(f"{path}::{name}")
    assert not unmarked


def test_no_field_of_a_run_is_a_function_bound_elsewhere():
    """A reader follows a call of the step to its definition."""
    for path in ("run/state.py", "run/batch.py", "engine/engine.py"):
        for node in nodes(path):
            if isinstance(node, ast.AnnAssign):
                assert "Callable" not in ast.unparse(node.annotation), ast.unparse(node)
    body = tree("engine/engine.py").body
    engine = next(n for n in body if getattr(n, "name", "") == "Engine")
    public = lambda node: {f.name for f in functions(node.body) if not f.name.startswith("_")}
    methods = public(engine)
    assert len(methods) <= 10
    for path in ("fast", "float16", "master_weights", "fsdp"):
        for node in tree(f"engine/{path}.py").body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Engine"):
                assert public(node) <= methods, node.name


def test_public_functions_of_the_top_level_are_annotated():
    parents = [tree(p) for p in FILES if len(p.parts) == 1]
    parents += [
        node for parent in parents for node in parent.body if isinstance(node, ast.ClassDef)
    ]
    for f in (f for parent in parents for f in functions(parent.body)):
        arguments = [*f.args.args, *f.args.kwonlyargs]
        missing = [a.arg for a in arguments if a.annotation is None and a.arg != "self"]
        said = not missing and f.returns is not None
        assert said or f.name.startswith("_"), (f.name, missing)


def test_the_readme_is_short_and_its_files_exist():
    text = source("README.md")
    assert len(text.split()) <= 1800
    assert max(len(line) for line in text.splitlines() if line[:1] != "|") <= 120
    for page in [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
            if not link.startswith("http"):
                there = page.parent / link if link else page
                assert there.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(there), f"{page.name}: {link}#{anchor}"


def test_a_translated_readme_says_the_same():
    """Its code, links, numbers and the rows of its tables are those of the English one."""
    english = readme_parts("README.md")
    for name in ("README.zh.md", "README.ko.md"):
        translated = readme_parts(name)
        for part, expected in english.items():
            assert translated[part] == expected, (name, part)
        first = source("README.md").split("\n## ")[0].splitlines()[2]
        assert f"({name})" in first and "(README.md)" in source(name).split("\n## ")[0]


def readme_parts(name):
    """Return what a translation of the README must keep, part by part."""
    text = source(name)
    blocks = re.findall(r"```.*?```", text, re.S)
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)]*)\)", text) if link[:6] != "README"]
    spans = re.findall(r"`([^`]*)`", text)
    words = re.sub(r"\]\([^)]*\)|`[^`]*`", "", text)
    rows = [sorted(numbers(line)) for line in words.splitlines() if line[:1] == "|"]
    levels = re.findall(r"^#+ ", text, re.M)
    return {
        "code blocks": blocks,
        "headings": levels,
        "rows of tables": rows,
        "links": sorted(links),
        "code in the text": sorted(spans),
        "numbers": sorted(numbers(words)),
    }


def numbers(text):
    return re.findall(r"\d+(?:\.\d+)?", text)


def test_the_files_whose_warnings_are_errors_exist():
    """pyproject.toml names all top-level files and all folders whose files import each other."""
    groups = re.findall(r"'error::\w+:\(([^)]*)\)", source("pyproject.toml"))
    assert len(groups) == 4  # files and folders, of DeprecationWarning and FutureWarning
    files, folders = (set(group.split("|")) for group in groups[:2])
    assert files == {path.stem for path in ROOT.glob("*.py")} | {"conftest", r"test_\w+"}
    assert folders == {"bridges", "common", "engine", "problems", "run", "scripts"}
    assert all((ROOT / folder).is_dir() for folder in folders) and groups[2:] == groups[:2]


def anchors(page):
    """Of a page's headings, as a link names them."""
    titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_marks_are_counted_right():
    """# HAPO A to D and # BuPO 1 to N stand once, and ascend as a step comes to them."""
    texts = {p: source(p) for p in FILES if "tests" not in p.parts}
    marks = [m for text in texts.values() for m in re.findall(r"# HAPO ([A-D])\b", text)]
    assert sorted(marks) == list("ABCD")
    assert re.findall(r"# HAPO ([A-D])\b", source("train.py")) == list("ABCD")
    bupo = [int(m) for text in texts.values() for m in re.findall(r"# BuPO (\d+)\b", text)]
    assert sorted(bupo) == list(range(1, max(bupo) + 1))
    step = source("train.py").partition("def generate_and_grade")[0]
    in_step = [int(m) for m in re.findall(r"# BuPO (\d+)\b", step)]
    assert in_step == sorted(in_step) and len(in_step) >= 5
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
    text = source("docs/equations.md")
    for module, name in re.findall(r"`([a-z]+)\.([a-z_]\w+)`", text):
        if name != "py":
            assert re.search(rf"(def|class) {name}\b|^{name} =", source(f"{module}.py"), re.M), name
    tests = named_beside_equations()
    assert len(tests) > 40
    for file, name in tests:
        assert name is None or f"def {name}(" in source(pathlib.Path("tests") / file), (file, name)
