"""docs/troubleshooting.md quotes messages that the sources have, and keys that a config has."""

import ast
import pathlib
import re

import pytest

from core.config import load_config

REPO = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("BCT_methods", "backbones", "core", "engine", "losses", "old_model", "tools")


def page():
    return (REPO / "docs/troubleshooting.md").read_text(encoding="utf-8")


def quoted_messages():
    """The code spans in the first column of the table."""
    return [span for cell in re.findall(r"^\| (.*?) \|", page(), re.M) for span in re.findall(r"`(.+?)`", cell)]


def messages_of(tree):
    """All strings of a module but docstrings; `…` for inserted values; adjacent strings are joined."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield re.sub(r"%[sdg]", "…", node.value)


@pytest.fixture(scope="module")
def sources():
    """Every string of the sources, one per line."""
    paths = [*REPO.glob("*.py"), *(path for folder in FOLDERS for path in (REPO / folder).rglob("*.py"))]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    return "\n".join(text.replace("\n", " ") for tree in trees for text in messages_of(tree))


@pytest.mark.parametrize("message", quoted_messages())
def test_every_quoted_message_is_in_the_sources(message, sources):
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    assert re.search(pattern, sources), "no source has this message any more: correct the page"


def test_every_key_exists():
    spans = re.findall(r"`([^`]+)`", "\n".join(line.partition(" | ")[2] for line in page().splitlines()))
    named = {span for span in spans if re.fullmatch(r"[a-z]+(_[a-z]+)+", span)}
    known = load_config("configs/base.py")
    assert len(named) >= 8 and named <= set(known), named - set(known)
