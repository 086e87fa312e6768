"""How functions and classes are called, as lines of Python."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from cluster.reference.sources import Function

_WIDTH = 88


def function_signature(function: Function, *, name: str | None = None) -> str:
    """`def name(...) -> type`, without `self` or `cls`; a parameter a line where it is long."""
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    word = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    return _wrapped(f"{word} {name or function.name}(", list(_parameters(function)), f"){returns}")


def class_signature(declared: ast.ClassDef) -> str:
    """`class Name(...)` with what its constructor takes; the name alone if that is not told."""
    head = f"class {declared.name}"
    if is_dataclass(declared):
        fields = [_field(item) for item in declared_fields(declared)]
        return _wrapped(f"{head}(", ["*", *fields] if fields else [], ")")
    for item in declared.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _wrapped(f"{head}(", list(_parameters(item)), ")")
    return head


def is_dataclass(declared: ast.ClassDef) -> bool:
    """Whether it is decorated as one."""
    return any("dataclass" in ast.unparse(each) for each in declared.decorator_list)


def declared_fields(declared: ast.ClassDef) -> list[ast.AnnAssign]:
    """The public fields of a dataclass, in order."""
    return [
        item
        for item in declared.body
        if isinstance(item, ast.AnnAssign)
        and not ast.unparse(item.target).startswith("_")
        and not ast.unparse(item.annotation).startswith("ClassVar")
    ]


def decorators(function: Function) -> set[str]:
    """Names such as `property` and `classmethod`."""
    return {ast.unparse(each) for each in function.decorator_list}


def _parameters(function: Function) -> Iterator[str]:
    given = function.args
    places = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(places) - len(given.defaults)) + list(given.defaults)
    for number, (place, default) in enumerate(zip(places, defaults, strict=True)):
        if number == 0 and place.arg in ("self", "cls"):
            continue
        yield _parameter(place, default)
    if given.vararg:
        yield f"*{_parameter(given.vararg, None)}"
    elif given.kwonlyargs:
        yield "*"
    for named, value in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        yield _parameter(named, value)
    if given.kwarg:
        yield f"**{_parameter(given.kwarg, None)}"


def _parameter(named: ast.arg, default: ast.expr | None) -> str:
    # A string as a type is only a name that was not known yet.
    kind = f": {ast.unparse(named.annotation).strip(chr(39))}" if named.annotation else ""
    if default is None:
        return f"{named.arg}{kind}"
    return f"{named.arg}{kind} = {ast.unparse(default)}" if kind else (
        f"{named.arg}={ast.unparse(default)}"
    )  # fmt: skip


def _field(item: ast.AnnAssign) -> str:
    name = f"{ast.unparse(item.target)}: {ast.unparse(item.annotation)}"
    value = item.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        for keyword in value.keywords:
            if keyword.arg == "default":
                return f"{name} = {ast.unparse(keyword.value)}"
            if keyword.arg == "default_factory":
                return f"{name} = {ast.unparse(keyword.value)}()"
        return name
    return name if value is None else f"{name} = {ast.unparse(value)}"


def _wrapped(head: str, parameters: list[str], tail: str) -> str:
    line = f"{head}{', '.join(parameters)}{tail}"
    if len(line) <= _WIDTH or not parameters:
        return line
    return "\n".join([head, *(f"    {each}," for each in parameters), tail])
