"""The layout: what may import what, how long a line and a function may be, what stands alone."""

import ast
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
    {"common"},
    {"problems", "scripts/page"},
    {"tasks", "engine"},
    {"run/evaluate_options"},
    {"evaluate"},
    {"run"},
    {"train"},
    {"bridges"},
]
CONCEPTS = ("losses", "hapo", "sampling", "internals", "bupo")
LIBRARIES = {"losses": {"torch"}, "hapo": {"torch"}}  # the other three: transformers and tqdm, too
# python internals.py and the curves of a run start a program of scripts/, guarded
GUARDED = {("internals", "scripts"), ("internals", "common"), ("run", "scripts")}
LEVEL = {part: n for n, parts in enumerate(LEVELS) for part in parts}
LONGEST = {"train_step": 120}  # lines of code; one page is better than twelve hops
OTHERS = {"tests", "experiments", "scripts", "lessons"}


def part_of(path):
    """The part of the project that a file, or a module's dotted name, belongs to."""
    parts = [part.removesuffix(".py") for part in pathlib.Path(path).parts]
    whole = "/".join(parts[:2])
    return whole if whole in LEVEL else parts[0]


def imports(path):
    """(dotted module with slashes, whether the import is guarded) of all imports of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            names = [f"{module}/{alias.name}" if module else alias.name for alias in node.names]
            for name in names:
                yield name.replace(".", "/"), node.col_offset > 0


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in LEVEL], ids=str)
def test_imports_point_down(path):
    own = part_of(path)
    for name, inside in imports(path):
        other = part_of(name)
        if (own, other) in GUARDED:
            assert inside
        elif other in LEVEL and other != own:
            assert LEVEL[other] < LEVEL[own], f"{path} imports {other}"
            assert not inside or own == "internals", f"{path} imports {other} inside a function"
        else:
            assert other not in OTHERS | {"train"}


def test_every_part_has_a_level():
    assert {part_of(p) for p in FILES} - OTHERS == LEVEL.keys()


def test_there_are_at_most_eleven_folders():
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


@pytest.mark.parametrize("name", CONCEPTS)
def test_concept_files_import_libraries_and_each_other_alone(name):
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
print(found.layer)
""",
}


@pytest.mark.parametrize("names", ALONE, ids=" ".join)
def test_concept_files_work_in_an_empty_folder(names, tmp_path):
    for name in names:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, "-c", ALONE[names]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_line_has_at_most_100_columns_and_a_function_50_lines_of_code(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert max(map(len, text.splitlines()), default=0) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            docstring = ast.get_docstring(node, clean=False)
            count = sum(bool(line.strip()) and line.strip()[0] != "#" for line in lines)
            count -= sum(bool(line.strip()) for line in (docstring or "").splitlines())
            if node.name in LONGEST:
                assert node.end_lineno - node.lineno + 1 <= LONGEST[node.name], node.name
            else:
                assert count <= 50, node.name


def test_no_field_of_a_run_is_a_function_bound_elsewhere():
    """A reader follows a call of the step to its definition."""
    for path in ("run/state.py", "run/batch.py", "engine/engine.py"):
        for node in ast.walk(ast.parse(source(path))):
            if isinstance(node, ast.AnnAssign):
                assert "Callable" not in ast.unparse(node.annotation), ast.unparse(node)
    body = ast.parse(source("engine/engine.py")).body
    engine = next(n for n in body if getattr(n, "name", "") == "Engine")
    methods = {f.name for f in engine.body if isinstance(f, ast.FunctionDef)}
    methods = {name for name in methods if not name.startswith("_")}
    assert len(methods) <= 10
    for path in ("fast", "float16", "master_weights", "fsdp"):
        for node in ast.parse(source(f"engine/{path}.py")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Engine"):
                own = {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
                assert {name for name in own if not name.startswith("_")} <= methods, node.name


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
    assert max(len(line) for line in text.splitlines() if line[:1] != "|") <= 120
    for page in [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
            if not link.startswith("http"):
                there = page.parent / link if link else page
                assert there.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(there), f"{page.name}: {link}#{anchor}"


@pytest.mark.parametrize("name", ["README.zh.md", "README.ko.md"])
def test_a_translated_readme_says_the_same(name):
    """Its code, links, numbers and the rows of its tables are those of the English one."""
    english, translated = readme_parts("README.md"), readme_parts(name)
    for part, expected in english.items():
        assert translated[part] == expected, part
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
