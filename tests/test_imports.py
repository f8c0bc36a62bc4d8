"""Imports go one way: from each room down to those below it, as README.md's "Where things are" says."""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
GROUND = {"core"}
BELOW = {
    "core": GROUND,
    "record_index": GROUND,
    "recordio": GROUND | {"record_index"},
    "dataset": GROUND | {"recordio"},
    "old_model": GROUND | {"recordio", "dataset", "old_model"},
    "backbones": GROUND | {"backbones"},
    "losses": GROUND | {"losses"},
    "configs": {"old_model"},
}
BELOW["engine"] = set().union(*BELOW.values()) | {"engine"}
TOP = BELOW["engine"]  # what methods, tools and the old trainers may use
ROOMS = {*BELOW, "BCT_methods", "tools", "benchmarks", "train_old_arc", "train_old_softmax", "tests"}


def modules_imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            # `from core import errors` may name a module or something in core
            yield from ((node.module, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)


def sources():
    for path in sorted(REPO.rglob("*.py")):
        parts = path.relative_to(REPO).parts
        if parts[0].removesuffix(".py") in ROOMS - {"tests", "benchmarks"} and not path.is_symlink():
            yield path, parts


def is_script(module):
    path = REPO.joinpath(*module.split(".")).with_suffix(".py")
    return path.is_file() and '__name__ == "__main__"' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path, parts", [pytest.param(*source, id="/".join(source[1])) for source in sources()])
def test_nothing_imports_upwards_or_sideways(path, parts):
    room = parts[0].removesuffix(".py")
    own = {"tools"} if room == "tools" else set()  # tools share modules, not scripts
    if room == "BCT_methods":
        own = {".".join(parts[:2])} if len(parts) > 2 else set()
    for module, full in modules_imported(path):
        first = module.split(".")[0]
        if first not in ROOMS:
            continue
        allowed = first in BELOW.get(room, TOP) or any(module == name or module.startswith(f"{name}.") for name in own)
        assert allowed, f"{path.relative_to(REPO)} imports {module}"
        assert not (room in ("tools", "BCT_methods") and first == room and (is_script(module) or is_script(full))), (
            f"{path.relative_to(REPO)} imports the script {module}"
        )
