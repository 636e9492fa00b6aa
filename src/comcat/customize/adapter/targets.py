"""Which attention layers get products, and of which rank."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import get_args

from ...errors import ModelError
from ...hosts.addable import AddableAttention, Kind, Refusal

Targets = str | Sequence[str] | None
Ranks = int | Mapping[str, int]


def matches(pattern: str, name: str, kind: str) -> bool:
    """Whether a layer is meant.

    A pattern is a kind (``self``, ``cross``, ``joint``, ``text``), a part of a name between dots (``attn2``,
    ``mid_block``, ``down_blocks.0``), or, with ``*``, ``?`` or ``[``, a whole name.
    """
    if pattern in get_args(Kind):
        return pattern == kind
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def choose(
    component: str,
    attentions: Mapping[str, AddableAttention],
    refused: Mapping[str, Refusal],
    targets: Targets,
    ranks: Ranks,
) -> dict[str, int]:
    """Layer name -> rank for what ``targets`` and ``ranks`` name together.

    Raises:
        ModelError: nothing is meant, a rank is out of range, or a layer that is meant cannot take products.
    """
    patterns = [targets] if isinstance(targets, str) else targets
    if patterns is not None and not (isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns)):
        raise ModelError(f"targets are names or kinds of attention layers or a list of these, not {targets!r}")
    table = ranks if isinstance(ranks, Mapping) else {"*": ranks}
    for pattern, rank in table.items():
        if not isinstance(pattern, str):
            raise ModelError(f"ranks are for names or kinds of attention layers, not for {pattern!r}")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            where = f" of {pattern!r}" if isinstance(ranks, Mapping) else ""
            raise ModelError(f"the rank{where} is {rank!r}, but must be a whole number from 1 to the head width")

    def rank_of(name: str, kind: str) -> int | None:
        if patterns is not None and not any(matches(p, name, kind) for p in patterns):
            return None
        return next((rank for p, rank in table.items() if p == "*" or matches(p, name, kind)), None)

    # Without targets, what takes products is meant; what somebody has put in the place of such a layer is told.
    named = patterns is not None or isinstance(ranks, Mapping)
    meant = {name: why for name, why in refused.items() if named or not why.inherent or not attentions}
    bad = {name: why for name, why in meant.items() if rank_of(name, why.kind) is not None}
    if bad:
        listed = "; ".join(f"'{name}' is {why.what}" for name, why in list(bad.items())[:3])
        way = ". Choose others with targets, or set the model's own attention processor again"
        if all(why.inherent for why in bad.values()):
            way = "; leave targets out for all that can" if attentions else ", and others it has not"
        raise ModelError(f"{len(bad)} attention layers of the {component} cannot take products: {listed}{way}")
    wanted_ranks = {name: rank_of(name, attention.kind) for name, attention in attentions.items()}
    chosen = {name: rank for name, rank in wanted_ranks.items() if rank is not None}
    if not chosen:
        known = ", ".join(list(attentions)[:3]) or "none"
        wanted = f"{targets}, ranks for {', '.join(table)}" if isinstance(ranks, Mapping) else targets
        raise ModelError(
            f"no attention layer of the {component} is named by {wanted!r}; layers are {known}, ...; kinds are "
            f"{', '.join(dict.fromkeys(s.kind for s in attentions.values()))}"
        )
    for name, rank in chosen.items():
        width = attentions[name].heads.width
        if rank > width:
            raise ModelError(f"rank {rank} is above the head width {width} of '{name}'; use at most {width}")
    unused = [p for p in (patterns or []) if not any(matches(p, n, s.kind) for n, s in attentions.items())]
    unused += [p for p in table if p != "*" and not any(matches(p, n, s.kind) for n, s in attentions.items())]
    if unused:
        raise ModelError(
            f"no attention layer of the {component} is named by {unused[0]!r}; layers are {known_names(attentions)}"
        )
    return chosen


def known_names(attentions: Mapping[str, AddableAttention], count: int = 3) -> str:
    return ", ".join(list(attentions)[:count]) + (", ..." if len(attentions) > count else "")
