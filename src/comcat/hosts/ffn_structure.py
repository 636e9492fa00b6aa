"""FFNs recognised by their parts: one linear layer behind hidden units, one or two of the same input in front of them.

What is found here is a guess; :mod:`comcat.hosts.proof` holds it against what the module computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..layers.base import is_pointwise, size
from ..layers.ffn import FFNLayer
from .changed import changed

#: How deep inside a module its own linear layers may lie: ``intermediate.dense``. Lists on the way do not count, since
#: they are never called: ``net.0.proj`` lies as deep.
_DEPTH = 2
#: Around an FFN in a block with more linear layers: the one in front of the hidden units, and the one behind them.
_PAIRS = (("intermediate.dense", "output.dense"), ("fc1", "fc2"), ("linear1", "linear2"), ("lin1", "lin2"))


def ffn_of(name: str, module: nn.Module, taken: Collection[int]) -> FFNLayer | str | None:
    """An FFN, unproven; why a module that looks like one is none; or None where it does not.

    Args:
        taken: identities of linear layers that belong to other layers.
    """
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return None  # a list is never called
    inside = dict(module.named_modules())
    linears = {
        path: one
        for path, one in inside.items()
        if path and _is_linear(one) and id(one) not in taken and _depth(path, inside) <= _DEPTH
    }
    found = _split(linears)
    for pair in _PAIRS if found is None else ():
        found = found or _split({path: linears[path] for path in pair if path in linears})
    if found is None:
        return None
    firsts, second = found
    for path in (*firsts, second):
        reason = changed(linears[path], path)
        if reason:
            return reason
    paths = {"fc2": second}
    if len(firsts) == 2:
        gate, units = firsts
        paths = {"gate": gate, "fc1": units, **paths}
    else:
        paths = {"fc1": firsts[0], **paths}
    return FFNLayer(name, module, paths)


def _depth(path: str, inside: Mapping[str, nn.Module]) -> int:
    """How many modules are called on the way to one of them, itself counted."""
    parts = path.split(".")
    way = (".".join(parts[: n + 1]) for n in range(len(parts)))
    return sum(not isinstance(inside[name], nn.ModuleList) for name in way)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return (
            module.kernel_size == module.stride == (1, 1) and module.groups == 1 and module.padding in ((0, 0), "same")
        )
    return isinstance(module, nn.Linear)


def _split(linears: dict[str, Any]) -> tuple[list[str], str] | None:
    """(linear layers in front of the hidden units, the one behind them)."""
    if len(linears) not in (2, 3) or len({is_pointwise(one) for one in linears.values()}) != 1:
        return None
    sizes = {path: size(one) for path, one in linears.items()}
    for second in reversed(linears):
        firsts = [path for path in linears if path != second]
        inner, hidden = {sizes[path][0] for path in firsts}, sizes[second][0]
        rows = {sizes[path][1] for path in firsts}
        times = {1, 2} if len(firsts) == 1 else {1}
        if len(inner) == len(rows) == 1 and rows <= {hidden * n for n in times} and hidden >= 2:
            return firsts, second
    return None
