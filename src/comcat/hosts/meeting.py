"""An attention module with products: its own forward, and one wider call where queries, keys and values meet.

    q_cat = [q, s q'],  k_cat = [k, k'],  v_cat = [v, s v'],  W_o,cat = [W_o; A_o]        (COMCAT, Eq. 8)

The added columns come after the host's norms and rotary embedding and are free of both. What they are computed from is
what the host's own projections are given, and what they add is added where the host's own output projections are.
Where all of that is in a module was found, and proven, before anything is attached (:mod:`comcat.hosts.added_proof`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..layers.heads import Heads, Stream
from ..nn.added import AddedLayer, Inputs, add_output, narrow, widen
from .seam import Attend, Layout, Pass, from_tokens, holders, to_tokens


@dataclass(frozen=True)
class Meeting:
    """Where the products of an attention module go.

    Attributes:
        streams: of tokens, "sample" first.
        order: names of the streams, as their tokens follow each other in queries and keys.
        heads: how many, and how wide, where they meet; groups of keys and values that several heads share.
        index: which of the module's calls it is; there are several where it attends to several things in turn.
        normalized: queries and keys are not what the projections put out: they are normalized or rotated.
        shaped: the outputs of the heads pass something (a gate, a norm) before their projection.
        context: part of the keys come from elsewhere than the queries.
        parallel: the output projection takes more than the heads (an FFN beside them).
    """

    streams: tuple[Stream, ...]
    order: tuple[str, ...]
    heads: Heads
    index: int = 0
    normalized: bool = False
    shaped: bool = False
    context: bool = False
    parallel: bool = False
    # Read off the streams once, as every pass needs them.
    by_name: dict[str, Stream] = field(init=False, compare=False, repr=False)
    inputs: frozenset[str] = field(init=False, compare=False, repr=False)
    outputs: dict[str, str] = field(init=False, compare=False, repr=False)
    taps: frozenset[str] = field(init=False, compare=False, repr=False)
    holders: frozenset[str] = field(init=False, compare=False, repr=False)
    inner: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        found: dict[str, Any] = {"by_name": {stream.name: stream for stream in self.streams}}
        found["inputs"] = frozenset(path for stream in self.streams for path in (stream.query, stream.key))
        found["outputs"] = {stream.output: stream.name for stream in self.streams if stream.output is not None}
        found["taps"] = found["inputs"] | found["outputs"].keys()
        found["holders"] = holders(found["taps"])
        found["inner"] = any(stream.inner for stream in self.streams)
        for name, value in found.items():
            object.__setattr__(self, name, value)


class AddedPass(Pass):
    """One pass with the products of these layers."""

    def __init__(self, meeting: Meeting, layers: Sequence[AddedLayer]) -> None:
        self.meeting = meeting
        self.layers = layers
        self.taps, self.holders = meeting.taps, meeting.holders
        self.given: dict[str, Tensor] = {}
        self.meetings = 0
        self.parts: list[Tensor] = []  # (B, N, H r) of every layer
        self.pieces: list[Tensor] = []  # (b, N, sum r) of some of the heads, where they come one after the other
        self.columns: tuple[Tensor, Tensor, Tensor] | None = None
        self.lengths: dict[str, int] = {}  # of the streams that are there, in their order

    def call(self, path: str, linear: Any, x: Tensor) -> Tensor:
        if path in self.meeting.inputs:
            self.given[path] = x
        out: Tensor = linear(x)
        if path not in self.meeting.outputs:
            return out
        name = self.meeting.outputs[path]
        added = [part.to(x.dtype) for part in self._parts(name)]
        tokens = out if out.shape[:-1] == added[0].shape[:2] else out.reshape(*added[0].shape[:2], -1)
        return add_output(tokens, added, self.layers, name).view(out.shape)

    def meet(
        self, attend: Attend, layout: Layout, q: Tensor, k: Tensor, v: Tensor, args: Sequence[Any], kwargs: Any
    ) -> Tensor:
        self.meetings += 1
        if self.meetings - 1 != self.meeting.index:
            return attend(q, k, v, *args, **kwargs)
        heads = self.meeting.heads
        width = q.shape[-1]
        q, k, v = (to_tokens(t, layout, heads.num) for t in (q, k, v))
        if heads.groups != heads.num and k.shape[2] == heads.groups:
            # Every head has products of its own, so that each gets its group's keys and values.
            k, v = (t.repeat_interleave(heads.num // heads.groups, 2) for t in (k, v))
            kwargs = {**kwargs, "enable_gqa": False}
        if kwargs.get("scale") is None:
            kwargs = {**kwargs, "scale": width**-0.5}
        wide = widen(q, k, v, self.layers, self._inputs(q.shape[0], q.shape[1], k.shape[1]))
        wide_q, wide_k, wide_v = (from_tokens(t, layout) for t in wide)
        z = to_tokens(attend(wide_q, wide_k, wide_v, *args, **kwargs), layout, heads.num)
        own, self.parts = narrow(z, v.shape[-1], self.layers)
        if self.meeting.inner:
            own = add_output(own, [part.to(own.dtype) for part in self.parts], self.layers, self.meeting.order[0])
        return from_tokens(own.unflatten(-1, (heads.num, -1)), layout)

    def scores(self, attn: Any, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        heads = self.meeting.heads.num
        if self.columns is None:
            inputs = self._inputs(None, q.shape[1], k.shape[1])
            batch, width = next(iter(inputs.values()))[0].shape[0], q.shape[-1]
            nothing = [t.new_zeros(()).expand(batch, t.shape[1], heads, width) for t in (q, k, k)]
            wide = widen(nothing[0], nothing[1], nothing[2], self.layers, inputs)
            q1, k1, v1 = (from_tokens(t[..., width:], "flat") for t in wide)
            self.columns = q1, k1, v1
        start = sum(piece.shape[0] for piece in self.pieces)
        q1, k1, v1 = (t[start : start + q.shape[0]] for t in self.columns)
        scores: Tensor = attn.get_attention_scores(torch.cat([q, q1], -1), torch.cat([k, k1], -1), mask)
        self.pieces.append(torch.bmm(scores, v1))
        return scores

    def _parts(self, name: str) -> list[Tensor]:
        """(B, n, H r) of one stream, of every layer."""
        if self.pieces:
            z = to_tokens(torch.cat(self.pieces), "flat", self.meeting.heads.num)
            _, self.parts = narrow(z, 0, self.layers)
            self.pieces = []
        if not self.parts:
            raise ModelError("an attention layer put its outputs out before its queries and keys met")
        if len(self.lengths) == 1:
            return self.parts
        names = list(self.lengths)
        start = sum(self.lengths[before] for before in names[: names.index(name)])
        return [part[:, start : start + self.lengths[name]] for part in self.parts]

    def _inputs(self, batch: int | None, queries: int, keys: int) -> Inputs:
        """What the streams' columns are computed from, (B, n, D) each, in their order."""
        found = {}
        for name in self.meeting.order:
            stream = self.meeting.by_name[name]
            if stream.query in self.given and stream.key in self.given:
                x_q, x_kv = self.given[stream.query], self.given[stream.key]
                count = x_q.shape[0] if batch is None else batch
                found[name] = tuple(
                    x if x.ndim == 3 and x.shape[0] == count else x.reshape(count, -1, x.shape[-1]) for x in (x_q, x_kv)
                )
        self.lengths = {name: x_q.shape[1] for name, (x_q, _) in found.items()}
        if sum(self.lengths.values()) != queries or sum(x_kv.shape[1] for _, x_kv in found.values()) != keys:
            raise ModelError(
                f"in this pass {queries} queries meet {keys} keys, and the layer's projections were given "
                f"{', '.join(f'{q.shape[1]} and {kv.shape[1]}' for q, kv in found.values()) or 'nothing'}: the host "
                "keeps keys of earlier passes, or takes tokens out of them, which added products cannot follow; "
                "switch that off, or remove the adapters"
            )
        return found  # type: ignore[return-value]
