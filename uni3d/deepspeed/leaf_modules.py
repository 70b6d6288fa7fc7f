"""`deepspeed.utils.z3_leaf_module`: modules that ZeRO-3 gathers as one; ranks may run different parts.

That holds without asking for every layer, an entry of the model's outermost lists. So marking a module in one
changes nothing but what `get_z3_leaf_modules` returns; one that ZeRO-3 would gather in parts is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakSet

from torch import nn

from parallel.layers import blocks

Kinds = Sequence[type | str]
_marked: WeakSet[nn.Module] = WeakSet()


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Kinds, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark the modules of these classes, given as types or names, and return them.

    Raises:
        ValueError: the model has none, or one isn't in a layer.
    """
    found = _of_classes(model, leaf_module_classes, raise_if_not_found)
    _mark(model, found)
    return found


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Kinds, raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Take the marks off the modules of these classes, and return these."""
    found = _of_classes(model, leaf_module_classes, raise_if_not_found)
    _marked.difference_update(found)
    return found


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Sequence[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark the modules with these names; return them, and the names that the model hasn't."""
    there = dict(model.named_modules())
    called = {name: [name] if name in there else [] for name in module_names}
    return _mark_called(model, called, raise_if_not_found)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Sequence[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark the modules whose names end so; return them, and the endings that no name has."""
    names = [name for name, _ in model.named_modules()]
    called = {end: [name for name in names if name.endswith(end)] for end in module_name_suffixes}
    return _mark_called(model, called, raise_if_not_found)


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """Return the marked modules of a model."""
    return [module for module in model.modules() if module in _marked]


def z3_leaf_module(model: nn.Module) -> bool:
    """Return whether a module is marked."""
    return model in _marked


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Mark a module, or take its mark off."""
    (_marked.add if flag else _marked.discard)(model)


def _of_classes(model: nn.Module, kinds: Kinds, raise_if_not_found: bool) -> list[nn.Module]:
    def is_one(module: nn.Module) -> bool:
        names = {type(module).__name__, f"{type(module).__module__}.{type(module).__qualname__}"}
        return any(names & {kind} if isinstance(kind, str) else isinstance(module, kind) for kind in kinds)

    found = [module for module in model.modules() if is_one(module)]
    if not found and raise_if_not_found:
        raise ValueError(f"{type(model).__name__} has no modules of the classes {list(kinds)}")
    return found


def _mark_called(
    model: nn.Module, called: dict[str, list[str]], raise_if_not_found: bool
) -> tuple[list[nn.Module], list[str]]:
    found = [model.get_submodule(name) for names in called.values() for name in names]
    if not found and raise_if_not_found:
        raise ValueError(f"{type(model).__name__} has no modules named {', '.join(called)}")
    _mark(model, found)
    return found, [text for text, names in called.items() if not names]


def _mark(model: nn.Module, found: Iterable[nn.Module]) -> None:
    layers = blocks(model)
    for leaf in found:
        if any(part in layers for part in leaf.modules() if part is not leaf):
            raise ValueError(
                f"{type(leaf).__name__} is in no list of layers, so ZeRO-3 gathers its parts one by one; put "
                "it into a layer of an nn.ModuleList, or use stage 2"
            )
    _marked.update(found)
