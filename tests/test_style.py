"""House rules that no linter checks: small files with one idea, no swallowed errors, no pickle."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ("gadgets", "host", "phantoms", "pipelines", "recon", "reports", "training")
SOURCES = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for folder in (*PACKAGED, "benchmarks", "tests")
    for file in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
LONGEST = 500
"""Lines of a source file of the package."""
CATCH_ALL = ("utils", "util", "helpers", "misc", "common", "manager")
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve"}


def test_files_are_small_and_say_what_they_are() -> None:
    assert len(SOURCES) > 50
    for name, text in SOURCES.items():
        if name.split("/")[0] in PACKAGED:
            assert text.count("\n") <= LONGEST, f"{name} is too long"
            assert Path(name).stem not in CATCH_ALL, f"{name} is not named after an idea"
            assert ast.get_docstring(TREES[name]), f"{name} does not say what it is"


def test_errors_are_not_swallowed() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                empty = all(isinstance(part, (ast.Pass, ast.Continue)) for part in node.body)
                broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
                assert not (empty and broad), f"{name}:{node.lineno} swallows every error"


def test_nothing_is_pickled() -> None:
    """Files come from outside, and unpickling runs what is in them."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            imported: list[str] = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert getattr(node.value, "value", True) is False, f"{name}:{node.value.lineno} unpickles"
            assert not PICKLES & {part.split(".")[0] for part in imported}, f"{name} imports pickle"
