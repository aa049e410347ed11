"""Which module of the original model a module of its streaming form stands for.

Streaming modules hold the original's modules and weights, not copies of them, so it is read from their identity.
"""

from __future__ import annotations

from itertools import takewhile

from torch import nn


def original_name(model: nn.Module, streaming: nn.Module, path: str) -> str:
    """The name in `model` of the module at `path` in a graph of its streaming form; "" is the model as a whole.

    A module that the original does not have, as a memory around a layer, is named by the smallest module of the
    original that holds everything in it; one that holds nothing of the original, by what it is part of.
    """
    names = {id(module): name for name, module in model.named_modules()}
    owners = {id(weight): name for name, module in model.named_modules() for weight in module.parameters(recurse=False)}
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        module = _at(streaming, parts[:length])
        if module is None:
            continue
        if id(module) in names:
            return names[id(module)]
        inside = [names[id(each)] for each in module.modules() if id(each) in names]
        inside += [owners[id(weight)] for weight in module.parameters() if id(weight) in owners]
        if inside:
            return _holding(inside)
    return ""


def _at(module: nn.Module, parts: list[str]) -> nn.Module | None:
    """The module at a path, from `root` where the graph's module wraps one."""
    found = getattr(module, "root", module)
    for part in parts:
        found = getattr(found, part, None)
        if not isinstance(found, nn.Module):
            return None
    return found if isinstance(found, nn.Module) else None


def _holding(names: list[str]) -> str:
    """The longest path that all of these begin with."""
    levels = zip(*(name.split(".") if name else [] for name in names), strict=False)
    return ".".join(words[0] for words in takewhile(lambda words: len(set(words)) == 1, levels))
