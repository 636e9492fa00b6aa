"""What was read off a module, held against Eq. 8 written out, in float64.

    scores_h = scale (q_h k_h^T + s (x_q A_q,h)(x_k A_k,h)^T),   out + sum_h softmax(scores_h)(s x_v A_v,h) A_o,h

The same stand-in runs three times: as it is; with products by :class:`comcat.hosts.meeting.AddedPass`; and with a
softmax that is written out token by token. A product of zero must leave the output alone, and a random one must change
it as the formula says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers.heads import Stream
from ..nn.added import AddedLayer, AddedProduct, Strength
from .attention_replica import BATCH, reference, renamed
from .meeting import AddedPass, Meeting
from .meeting_structure import Probed, tensors_of
from .seam import Attend, Layout, Pass, Seam, from_tokens, to_tokens

#: Of the largest output. Float64 has 2e-16; sums are taken in another order.
TOLERANCE = 1e-11
RANK, STRENGTH = 2, 0.7


@dataclass(frozen=True)
class Proof:
    """The largest differences, relative to the largest output: of a product of zero, and of a random one to Eq. 8."""

    zero: float
    exact: float
    effect: float

    def reason(self) -> str | None:
        """Why it proves nothing, or None."""
        if not self.zero < TOLERANCE:
            return f"a product of zero changes its output by {self.zero:.0e}"
        if not self.exact < TOLERANCE:
            return f"an added product differs from Eq. 8 by {self.exact:.0e}"
        return None if self.effect > 1e-6 else "an added product has no effect on its output"


class _Exactly(AddedPass):
    """:class:`AddedPass`, with attention by the one meaning that all back-ends share."""

    def meet(
        self, attend: Attend, layout: Layout, q: Tensor, k: Tensor, v: Tensor, args: Sequence[Any], kwargs: Any
    ) -> Tensor:
        def meant(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return reference(layout, q, k, v, args, kwargs)

        return super().meet(meant, layout, q, k, v, args, kwargs)


class WrittenOut(Pass):
    """Eq. 8 token by token: one softmax for each query of each head."""

    def __init__(self, meeting: Meeting, layer: AddedLayer) -> None:
        self.meeting, self.layer = meeting, layer
        self.taps, self.holders = meeting.taps, meeting.holders
        self.given: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}  # by stream (B, n, H r)
        self.seen = 0
        self.rows = 0
        self.batch = BATCH
        self.pieces: list[Tensor] = []

    def call(self, path: str, linear: Any, x: Tensor) -> Tensor:
        self.given[path] = x
        out: Tensor = linear(x)
        for stream in self.meeting.streams:
            if stream.output == path:
                weight = self.layer[stream.name].output.weight  # type: ignore[union-attr]
                out = out + (self.added[stream.name] @ weight.T).reshape(out.shape)
        return out

    def meet(
        self, attend: Attend, layout: Layout, q: Tensor, k: Tensor, v: Tensor, args: Sequence[Any], kwargs: Any
    ) -> Tensor:
        self.seen += 1
        if self.seen - 1 != self.meeting.index:
            return reference(layout, q, k, v, args, kwargs)
        heads = self.meeting.heads
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        mask, causal = kwargs.get("attn_mask"), bool(kwargs.get("is_causal"))
        q, k, v = (to_tokens(t, layout, heads.num) for t in (q, k, v))
        self.batch = q.shape[0]
        z = torch.stack([self._attention(b, q, k, v, scale, mask, causal) for b in range(self.batch)])
        own, added = z[..., : v.shape[-1]], z[..., v.shape[-1] :].flatten(2)
        self._keep(added)
        if self.meeting.inner:
            weight = self.layer["sample"].output.weight  # type: ignore[union-attr]
            own = own + (added @ weight.T).reshape(own.shape)
        return from_tokens(own, layout)

    def scores(self, attn: Any, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        num = self.meeting.heads.num
        rows = []
        q1, k1, v1 = self._products()
        for i in range(q.shape[0]):  # one head of one image after the other
            b, h = divmod(self.rows + i, num)
            scores = attn.scale * (q[i] @ k[i].T + q1[b, :, h] @ k1[b, :, h].T)
            scores = scores if mask is None else scores + mask[i]
            rows.append(scores.softmax(-1))
            self.pieces.append(rows[-1] @ v1[b, :, h])
        self.rows += q.shape[0]
        if self.rows == self.batch * num:
            self._keep(to_tokens(torch.stack(self.pieces), "flat", num).flatten(2))
        return torch.stack(rows)

    def _products(self) -> tuple[Tensor, Tensor, Tensor]:
        """s q', k', s v' (B, N, H, r): of every stream, one after the other."""
        parts: list[list[Tensor]] = [[], [], []]
        for name, stream in self._there():
            product: Any = self.layer[name]
            x_q, x_kv = self.given[stream.query], self.given[stream.key]
            s = self.layer.strength.value
            for part, x, linear, factor in zip(
                parts, (x_q, x_kv, x_kv), (product.query, product.key, product.value), (s, 1.0, s), strict=True
            ):
                rows = x.reshape(self.batch, -1, x.shape[-1]) @ linear.weight.T * factor
                part.append(rows.unflatten(-1, (self.meeting.heads.num, -1)))
        q, k, v = (torch.cat(part, 1) for part in parts)
        return q, k, v

    def _attention(
        self, b: int, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool
    ) -> Tensor:
        """(N, H, d_v + r) of one image."""
        q1, k1, v1 = self._products()
        heads = self.meeting.heads
        rows = []
        for n in range(q.shape[1]):
            per_head = []
            for h in range(heads.num):
                g = h * k.shape[2] // heads.num
                scores = scale * (k[b, :, g] @ q[b, n, h] + k1[b, :, h] @ q1[b, n, h])
                if causal:
                    scores = scores.masked_fill(torch.arange(len(scores)) > n, -torch.inf)
                if mask is not None:
                    mask = mask[:, None, None] if mask.ndim == 2 else mask  # of keys alone
                    full = mask.expand(self.batch, heads.num, q.shape[1], len(scores))[b, h, n]
                    scores = scores.masked_fill(~full, -torch.inf) if full.dtype == torch.bool else scores + full
                p = scores.softmax(-1).nan_to_num(0.0)  # a query that sees no key at all gets nothing
                per_head.append(torch.cat([p @ v[b, :, g], p @ v1[b, :, h]]))
            rows.append(torch.stack(per_head))
        return torch.stack(rows)

    def _there(self) -> list[tuple[str, Stream]]:
        """The streams of this pass in the order of their tokens."""
        streams = {s.name: s for s in self.meeting.streams}
        return [(name, streams[name]) for name in self.meeting.order if streams[name].query in self.given]

    def _keep(self, added: Tensor) -> None:
        start = 0
        for name, stream in self._there():
            x = self.given[stream.query]
            count = x.reshape(self.batch, -1, x.shape[-1]).shape[1]
            self.added[name] = added[:, start : start + count]
            start += count


@torch.no_grad()
def prove(found: Probed) -> Proof:
    """Run the stand-in as it is, with products, and with Eq. 8 written out."""
    module: Any = found.module
    seam = Seam(type(module), getattr(module, "processor", None))
    layer = _products(module, found.meeting)

    def run(one: Pass) -> list[Tensor]:
        return tensors_of(seam.run(one, module, (), renamed(module, found.attempt.kwargs)))

    base = run(AsItIs())
    largest = max(float(t.abs().max()) for t in base)
    zero = run(_Exactly(found.meeting, [layer]))
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(noise / parameter.shape[1] ** 0.5)
    ours, theirs = run(_Exactly(found.meeting, [layer])), run(WrittenOut(found.meeting, layer))
    return Proof(_off(zero, base) / largest, _off(ours, theirs) / largest, _off(ours, base) / largest)


class AsItIs(Pass):
    def meet(
        self, attend: Attend, layout: Layout, q: Tensor, k: Tensor, v: Tensor, args: Sequence[Any], kwargs: Any
    ) -> Tensor:
        return reference(layout, q, k, v, args, kwargs)

    def scores(self, attn: Any, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = attn.get_attention_scores(q, k, mask)
        return found


def _off(found: list[Tensor], wanted: list[Tensor]) -> float:
    return float(torch.stack([(a - b).abs().max() for a, b in zip(found, wanted, strict=True)]).max())  # NaN stays


def _products(module: Any, meeting: Meeting) -> AddedLayer:
    heads = meeting.heads
    streams = {}
    for stream in meeting.streams:
        query, key = (module.get_submodule(path) for path in (stream.query, stream.key))
        width = heads.num * heads.value_width if stream.inner else None
        if stream.output is not None:
            width = module.get_submodule(stream.output).out_features
        sizes = (query.in_features, key.in_features, width, heads.num, RANK)
        streams[stream.name] = AddedProduct(*sizes, dtype=torch.float64)
        streams[stream.name].reset_parameters(torch.Generator().manual_seed(2))
    return AddedLayer(streams, RANK, Strength(STRENGTH))
