"""The optimizers of `torch.optim` and their parameters, read from torch's source without loading torch.

Commands that don't load torch can thus validate any of them, and there is no list here to keep up to date
with torch's releases.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field, create_model

from uni3d.config.strict import Strict

_NOT_HYPERPARAMETERS = {"self", "params", "differentiable"}
REFUSED = {
    "Adafactor": "torch's implementation of its row and column means doesn't support sharded parameters",
    "LBFGS": "it evaluates the loss several times per step, and treats all parameters as one vector",
    "Rprop": "torch's implementation doesn't support sharded parameters",
    "SparseAdam": "it needs sparse gradients, and gradients are reduced as dense ones",
}
"""Classes of `torch.optim` that can't train sharded parameters, with the reason (as of torch 2.13)."""


@cache
def names() -> tuple[str, ...]:
    """Return the names of all optimizers of the installed torch."""
    return tuple(sorted(_modules()))


@cache
def parameters(name: str) -> type[Strict]:
    """Return a section with the hyperparameters of `torch.optim.<name>`."""
    tree = ast.parse((_folder() / f"{_modules()[name]}.py").read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    init = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    given = init.args
    positional = given.posonlyargs + given.args
    defaults = [*[None] * (len(positional) - len(given.defaults)), *given.defaults]
    pairs = [*zip(positional, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    fields: dict[str, Any] = {}
    for argument, default in pairs:
        if argument.arg not in _NOT_HYPERPARAMETERS and default is not None:
            value = _value(default, tree)
            fields[argument.arg] = (_kind(argument.annotation, value), Field(value, strict=_is_strict(value)))
    return create_model(name, __base__=Strict, **fields)


def _folder() -> Path:
    spec = find_spec("torch")
    assert spec is not None, "uni3d depends on torch"
    assert spec.origin is not None, "torch has a file"
    return Path(spec.origin).parent / "optim"


@cache
def _modules() -> dict[str, str]:
    """Return the module that defines each optimizer class."""
    found: dict[str, str] = {}
    for node in ast.parse((_folder() / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            module = node.module.removeprefix("torch.optim.")
            if (_folder() / f"{module}.py").exists():
                found |= {alias.name: module for alias in node.names if alias.name[0].isupper()}
    found.pop("Optimizer")
    return found


def _value(node: ast.expr, tree: ast.Module) -> Any:
    """Evaluate a default: a literal, or the name of a constant of the module."""
    if isinstance(node, ast.Tuple):
        return tuple(_value(part, tree) for part in node.elts)
    if isinstance(node, ast.Name):
        constants = {t.id: n.value for n in tree.body if isinstance(n, ast.Assign) for t in _names(n)}
        return ast.literal_eval(constants[node.id])
    return ast.literal_eval(node)


def _names(node: ast.Assign) -> list[ast.Name]:
    return [target for target in node.targets if isinstance(target, ast.Name)]


def _kind(annotation: ast.expr | None, value: Any) -> Any:
    """Return the type of a parameter in JSON, i.e. without the tensors that torch also accepts."""
    words = ast.unparse(annotation) if annotation else ""
    if isinstance(value, tuple):
        return tuple[(*(float | None if part is None else float for part in value),)]  # type: ignore[misc]
    for word, kind in (("float", float), ("bool", bool), ("int", int), ("str", str)):
        if word in words:
            return kind | None if value is None or "None" in words else kind
    return type(value)


def _is_strict(value: Any) -> bool:
    return not isinstance(value, tuple)  # JSON has lists, which become tuples
