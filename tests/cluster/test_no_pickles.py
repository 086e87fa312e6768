"""Nothing in the packages runs what a file or a socket brings: found by reading the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCES = [
    path
    for package in ("model", "memory_server", "trainer", "cluster", "benchmarks")
    for path in sorted((REPOSITORY / package).rglob("*.py"))
]
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads",
    "shelve.open", "joblib.load", "yaml.load", "yaml.unsafe_load", "eval", "exec",
    "os.system",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def keyword(call: ast.Call, name: str) -> object:
    return next(
        (
            k.value.value
            for k in call.keywords
            if k.arg == name and isinstance(k.value, ast.Constant)
        ),
        None,
    )


def wrong(call: ast.Call) -> bool:
    name = dotted(call.func)
    if name in FORBIDDEN:
        return True
    if name == "torch.load":
        return keyword(call, "weights_only") is not True
    return name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") is True


def calls(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_source_unpickles_or_runs_what_it_reads(path: Path) -> None:
    found = [call.lineno for call in calls(path.read_text(encoding="utf-8")) if wrong(call)]
    assert not found, f"{path}: lines {found}"


def test_the_check_itself_sees_them() -> None:
    bad = "pickle.load(f)\ntorch.load(p)\ntorch.load(p, weights_only=False)\neval('1')\n"
    bad += "np.load(p, allow_pickle=True)\nyaml.load(f)\n"
    assert [wrong(call) for call in calls(bad)] == [True] * 6
    good = "torch.load(p, weights_only=True)\nnp.load(p)\nmodel.eval()\nyaml.safe_load(f)\n"
    assert [wrong(call) for call in calls(good)] == [False] * 4
