"""Shallow copies of a module with other children: the host's own forward on other projections."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

#: What a module keeps in dictionaries, which a shallow copy must not share.
_OWN = [
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_forward_hooks", "_forward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks",
    "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
]  # fmt: skip


def copy_with(module: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """``module`` with other submodules by path; everything else is shared with the original."""
    own: dict[str, nn.Module] = {}
    deeper: dict[str, dict[str, nn.Module]] = {}
    for path, child in children.items():
        first, _, rest = path.partition(".")
        if rest:
            deeper.setdefault(first, {})[rest] = child
        else:
            own[first] = child
    for first, inner in deeper.items():
        own[first] = copy_with(module.get_submodule(first), inner)
    made: Any = copy.copy(module)
    for name in _OWN:
        if name in vars(module):
            vars(made)[name] = copy.copy(vars(module)[name])
    made._modules.update(own)
    return cast(nn.Module, made)
