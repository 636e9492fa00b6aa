"""Where the products of an attention module go, read off one pass of its stand-in by derivatives.

Which projection a query, key or value comes from, and which of its tokens; which tokens an output projection takes: all
of that is where derivatives are not zero. No name of a class or of a layer says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.heads import ROLES, Heads, Input, Stream
from .attention_replica import BATCH, Attempt, Called, Met, Trace, attempts, linears, stand_in, takes_rotary, traced
from .meeting import Meeting
from .seam import to_tokens

#: (number of a call, token) of one sequence, token by token.
Places = list[tuple[int, int]]


class UnlikeError(Exception):
    """What a module does is not what added products can follow; the message says what."""


@dataclass
class Probed:
    """A module's stand-in, what it was given, and what was found."""

    module: nn.Module
    attempt: Attempt
    meeting: Meeting


def probed(module: nn.Module, processor: Any, crossing: bool) -> Probed | str:
    """What was found, or why nothing was.

    Args:
        processor: that runs the module, its own or another one.
        crossing: the module is expected to take its keys from elsewhere.
    """
    made = stand_in(module, processor)
    paths = [path for path, _ in linears(made)]
    best: tuple[int, Probed | str] = (0, "")
    needs_more = False
    for attempt in attempts(made, crossing):
        needs_more = needs_more or (attempt.extra and not best[0])
        if attempt.extra and not needs_more:
            break
        try:
            trace, result = traced(made, attempt)
            tensors = tensors_of(result)
            if not all(t.isfinite().all() for t in tensors):
                continue
        except Exception as error:  # arguments that it does not take
            if best == (0, ""):
                best = 0, f"it does not run on made-up inputs ({str(error).strip().partition(chr(10))[0][:80]})"
            continue
        used = len({called.path for called in trace.calls})
        found: Probed | str
        try:
            meeting = _Reader(trace, attempt, tensors, paths).meeting()
            found = Probed(made, attempt, replace(meeting, normalized=meeting.normalized or takes_rotary(made)))
        except UnlikeError as error:
            found = str(error)
        better = used > best[0] or (used == best[0] and isinstance(best[1], str) and not isinstance(found, str))
        if better:
            best = used, found
        if used == len(paths) and not isinstance(found, str):
            break
    return best[1] or "it takes no tokens"


def tensors_of(result: Any) -> list[Tensor]:
    """What a module returns, without what is no tensor."""
    items = result if isinstance(result, (tuple, list)) else [result]
    return [item for item in items if isinstance(item, Tensor)]


class _Reader:
    """One pass, read."""

    def __init__(self, trace: Trace, attempt: Attempt, results: list[Tensor], paths: list[str]) -> None:
        self.calls, self.met = trace.calls, trace.met
        self.attempt = attempt
        self.results = results
        self.paths = paths

    def meeting(self) -> Meeting:
        """Of the attentions in this pass, the one whose keys' projection the module registers first."""
        if not self.met:
            raise UnlikeError("no softmax of queries and keys, or not one that is called as diffusers does it")
        found: list[tuple[int, Meeting]] = []
        reasons: list[str] = []
        for index in range(len(self.met)):
            try:
                one = replace(self._read(self.met[index]), index=index)
                found.append((self.paths.index(one.streams[0].key), one))
            except UnlikeError as error:
                reasons.append(str(error))
        if not found:
            raise UnlikeError(reasons[0])
        firsts = {place for place, _ in found}
        if len(firsts) != len(found):
            raise UnlikeError("its keys meet queries several times")
        return min(found, key=lambda item: item[0])[1]

    def _read(self, met: Met) -> Meeting:
        if met.q.shape[0] != BATCH or met.k.shape[0] != BATCH:
            raise UnlikeError("its tokens are regrouped between images before they meet")
        num, width, groups, value_width = met.q.shape[2], met.q.shape[3], met.k.shape[2], met.v.shape[3]
        if num % groups or met.v.shape[2] != groups:
            raise UnlikeError(f"{num} heads of queries meet {groups} of keys and {met.v.shape[2]} of values")
        calls = self.calls[: met.before]
        runs = [
            _runs(self._sources(t, calls), calls, role) for t, role in zip((met.q, met.k, met.v), ROLES, strict=True)
        ]
        queries, keys, values = runs
        if len(keys) > len(queries):
            raise UnlikeError(f"keys of '{calls[keys[0]].path}' have no queries of their own")
        if not len(queries) == len(keys) == len(values) <= 2:
            raise UnlikeError(f"{len(queries)} streams of queries meet {len(keys)} of keys and {len(values)} of values")
        outputs, inner, shaped, parallel = self._outputs(met, [calls[q].y.flatten(1, -2).shape[1] for q in queries])
        names = self._names(calls, queries)
        streams = []
        for name, q, k, v, output in zip(names, queries, keys, values, outputs, strict=True):
            if not torch.equal(calls[k].x, calls[v].x):
                raise UnlikeError("keys and values are computed from different inputs")
            if len(queries) > 1 and not torch.equal(calls[q].x, calls[k].x):
                raise UnlikeError("queries of one stream meet keys of another one first")
            streams.append(Stream(name, _inputs(calls[q].path, calls[k].path, calls[v].path), output, inner))
        q0, k0 = queries[0], keys[0]
        context = len(queries) == 1 and calls[q0].x.shape != calls[k0].x.shape
        context = context or (len(queries) == 1 and not torch.equal(calls[q0].x, calls[k0].x))
        plain = all(_same(t, calls[runs[i][0]]) for i, t in enumerate((met.q, met.k)))
        heads = Heads(num, width, groups, value_width)
        order = tuple(names)
        streams.sort(key=lambda s: s.name != "sample")
        return Meeting(
            tuple(streams), order, heads, normalized=not plain, shaped=shaped, context=context, parallel=parallel
        )

    def _sources(self, t: Tensor, calls: Sequence[Called]) -> Places:
        """Of every token of (B, N, H, d): which call's output it comes from, and which token of that."""
        found = []
        leaves = [called.y for called in calls]
        for n in range(t.shape[1]):
            touched = _touched(t[-1, n], leaves)
            if len(touched) != 1:
                raise UnlikeError("queries, keys or values come from several projections or tokens at once")
            found.append(touched[0])
        return found

    def _outputs(self, met: Met, lengths: list[int]) -> tuple[list[str | None], bool, bool, bool]:
        """Per stream the path of its output projection; whether the block has it; what else its input is."""
        after = [(i, c) for i, c in enumerate(self.calls[met.before :], met.before) if c.x.requires_grad]
        takers: dict[int, tuple[str, Called]] = {}  # meeting token -> what projects it
        flat = met.layout == "flat"
        heads = met.q.shape[2]
        shaped = parallel = False
        for _, called in after:
            x = called.x.flatten(1, -2) if called.x.ndim > 2 else called.x.unflatten(0, (BATCH, -1))
            for t in range(x.shape[1]):
                touched = _touched(x[-1, t], met.z, layout=met.layout, heads=heads)
                if not touched:
                    continue
                if len(touched) > 1:
                    raise UnlikeError("its output projection takes several tokens at once")
                n = touched[0][1]
                if n in takers:
                    raise UnlikeError("what the heads put out goes through several projections")
                takers[n] = called.path, called
                z = to_tokens(torch.cat(met.z), "flat", heads) if flat else to_tokens(met.z[0], met.layout, heads)
                own = z[-1, n].flatten()
                parallel = parallel or x.shape[-1] > len(own)
                shaped = shaped or not torch.equal(x[-1, t, : len(own)], own)
        direct = set()
        for result in self.results:
            if result.requires_grad and result.ndim >= 2:
                touched = _touched(result, met.z, layout=met.layout, heads=heads)
                direct |= {n for _, n in touched}
        paths: list[str | None] = []
        inner, start = False, 0
        for length in lengths:
            tokens = range(start, start + length)
            start += length
            own_paths = {takers[n][0] for n in tokens if n in takers}
            if len(own_paths) > 1 or (own_paths and not all(n in takers for n in tokens)):
                raise UnlikeError("the tokens of one stream go through several output projections")
            paths.append(next(iter(own_paths), None))
        if not any(paths):
            if direct != set(range(start)):
                raise UnlikeError("what its heads put out reaches no output")
            inner = True
            if len(lengths) > 1:
                raise UnlikeError("it leaves the output projections of two streams to its block")
        for path in set(paths) - {None}:
            if sum(called.path == path for called in self.calls) > 1:
                raise UnlikeError(f"'{path}' is called several times")
        if len({p for p in paths if p}) != len([p for p in paths if p]):
            raise UnlikeError("two streams go through one output projection")
        return paths, inner, shaped, parallel

    def _names(self, calls: Sequence[Called], queries: list[int]) -> list[str]:
        """ "sample" is the stream of the first argument, "context" the other one."""
        if len(queries) == 1:
            return ["sample"]
        own = [torch.equal(calls[q].x.flatten(1, -2), self.attempt.hidden.flatten(1, -2)) for q in queries]
        if own.count(True) != 1:
            raise UnlikeError("which of its two streams is the image's cannot be told")
        return ["sample" if is_own else "context" for is_own in own]


def _touched(t: Tensor, leaves: Sequence[Tensor], layout: str = "tokens", heads: int = 0) -> list[tuple[int, int]]:
    """(leaf, token) of all that a tensor depends on, in the last image of the batch."""
    weights = torch.randn(t.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    if not t.requires_grad or not leaves:
        return []
    grads = torch.autograd.grad((t.double() * weights).sum(), leaves, retain_graph=True, allow_unused=True)
    if heads:  # outputs of the heads, perhaps in slices of one tensor
        found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
        whole = torch.cat(found) if layout == "flat" else found[0]
        grads = (to_tokens(whole, layout, heads).flatten(2),)  # type: ignore[arg-type]
    places = []
    for i, grad in enumerate(grads):
        if grad is not None:
            rows = grad.reshape(BATCH, -1, grad.shape[-1]).abs().amax(-1) > 0
            places += [(i, int(n)) for n in rows.any(0).nonzero()]
    return places


def _runs(places: Places, calls: Sequence[Called], role: str) -> list[int]:
    """The calls whose tokens follow each other in one sequence, each whole and in its order."""
    runs: list[int] = []
    start = 0
    while start < len(places):
        call = places[start][0]
        count = calls[call].y.flatten(1, -2).shape[1] if calls[call].y.ndim > 2 else len(calls[call].y) // BATCH
        if places[start : start + count] != [(call, n) for n in range(count)]:
            raise UnlikeError(f"the tokens of '{calls[call].path}' are taken apart, or taken in another order")
        if sum(c.path == calls[call].path for c in calls) > 1:
            raise UnlikeError(f"'{calls[call].path}' is called several times")
        runs.append(call)
        start += count
    if not runs:
        raise UnlikeError(f"its {role} has no tokens")
    return runs


def _inputs(query: str, key: str, value: str) -> tuple[Input, ...]:
    """One input for each linear layer, with the roles whose rows it holds."""
    roles: dict[str, list[Any]] = {}
    for path, role in ((query, "query"), (key, "key"), (value, "value")):
        roles.setdefault(path, []).append(role)
    return tuple(Input(path, tuple(own)) for path, own in roles.items())


def _same(t: Tensor, called: Called) -> bool:
    """Whether queries or keys are what their projection put out, or a part of it."""
    rows, own = called.y.reshape(BATCH, -1, called.y.shape[-1])[-1, 0], t[-1, 0].flatten()
    width = len(own)
    return any(torch.equal(rows[start : start + width], own) for start in range(0, len(rows) - width + 1, width))
