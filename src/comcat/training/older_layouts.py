"""Checkpoints of format 1, brought into the layout of now.

Each kind of run had its own. A customization: ``adapter`` and its optimizer's entries as ``name|entry``, no groups, no
random numbers. A search: the ranks' logits and their moments in one file. None had zeros for parameters that no
gradient had reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .snapshot import fill_moments
from .state import Saved


def current(saved: Saved) -> Saved:
    """``saved`` as it would be written today."""
    if saved.plain["format"] != 1 or not saved.tensors:
        return saved
    tensors: dict[str, Mapping[str, Tensor]] = dict(saved.tensors)
    plain = dict(saved.plain)
    if "adapter" in tensors:
        tensors["model"] = tensors.pop("adapter")
        names = list(tensors["model"])
        tensors["optimizer"] = {key.replace("|", "."): value for key, value in tensors["optimizer"].items()}
        plain["scalars"] = {key.replace("|", "."): value for key, value in plain["optimizer"].items()}
        products = [name for name in names if not name.startswith("token.")]
        plain["optimizer"] = [{"params": products}, *[{"params": [n]} for n in names if n.startswith("token.")]]
        return Saved(saved.step, tensors, plain)
    plain["scalars"] = {}
    names = [name for group in plain["optimizer"] for name in group["params"]]
    moments: dict[str, dict[str, Any]] = {}
    for key, value in tensors["optimizer"].items():
        moments.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = value
    fill_moments(moments, names, tensors["model"])
    tensors["optimizer"] = {f"{name}.{key}": t for name, values in moments.items() for key, t in values.items()}
    if "ranks" in tensors:
        ranks = dict(tensors.pop("ranks"))
        tensors["ranks-model"] = {"logits": ranks.pop("logits")}
        tensors["ranks-optimizer"] = {f"logits.{name}": value for name, value in ranks.items()}
        plain |= {"ranks-optimizer": [{"params": ["logits"]}], "ranks-scalars": {}}
    return Saved(saved.step, tensors, plain)
