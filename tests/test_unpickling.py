"""No file is unpickled except .bin sets, through the allow-lists of engine/bin_files.py."""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for path in sorted(REPO.rglob("*.py"))
    if path.relative_to(REPO).parts[0] != "tests" and not any(p.startswith(".") for p in path.relative_to(REPO).parts)
]
UNPICKLERS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "shelve.open",
    "marshal.load",
    "marshal.loads",
    "joblib.load",
    "pandas.read_pickle",
    "pd.read_pickle",
}


def complaints(source):
    """`(line, call)` of each call that would unpickle whatever a file holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve", "joblib"):
            yield node.lineno, f"from {node.module} import"
        if isinstance(node, ast.ClassDef) and any("pickle." in ast.unparse(base) for base in node.bases):
            yield node.lineno, f"class {node.name}"
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        if (
            name in UNPICKLERS
            or name == "torch.load"
            and given.get("weights_only") != "True"
            or given.get("allow_pickle", "False") != "False"
        ):
            yield node.lineno, ast.unparse(node)


def test_no_file_is_unpickled():
    assert len(SOURCES) > 50
    found = {path.name: [what for _, what in complaints(path.read_text(encoding="utf-8"))] for path in SOURCES}
    assert {name: calls for name, calls in found.items() if calls} == {"bin_files.py": ["class _Unpickler"]}


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)",
        "x = pickle.Unpickler(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "from pickle import load",
        "with shelve.open(path) as y: pass",
        "class Mine(pickle._Unpickler): pass",
    ],
)
def test_the_checker_finds_each_form(line):
    assert len(list(complaints(line))) == 1
    assert not list(complaints("torch.load(path, weights_only=True); np.load(path); pickle.dumps(x)"))
