"""What an attention layer that was recognised by its parts has to show.

* It depends on ``W_q W_k^T`` alone if any basis of a head's queries, with the inverse one of its keys, leaves the
  output as it is; and likewise on ``W_v W_o``. Where queries and keys are rotated (rotary embedding) only turns within
  each pair of components do.
* If neither holds, queries of zero that leave the keys without effect show that the rows were read as they are: then it
  is the product that does not exist.
* Where ``W_v W_o`` is not all that it depends on, the channels of the values are free if those that lead nowhere can be
  left out, as with the neurons of an FFN (:mod:`comcat.hosts.ffn_proof`).
* A stand-in with narrower heads puts out what the original does with weights of that rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.attention import AttentionLayer
from ..layers.base import Finding, Layer
from ..layers.heads import HeadWeights, Places, Role, joined_output, spread
from ..layers.joint import JointAttention
from ..linalg.rotary import LAYOUTS, pair_places
from ..nn.copies import copy_with
from .attention_structure import attention_of, layer_of, variants
from .kept_forward import KeptForward
from .proof import COARSE, ROUNDING, Trial

#: Why queries and keys stay dense where it is known that their product does not exist.
NO_PRODUCT = (
    "there is no product of queries and keys: a norm, a position or another operation acts between projections and "
    "scores"
)


@dataclass(frozen=True)
class _Form:
    """What was found out: parts that have no product, and how the layer runs."""

    dense: Mapping[str, str]
    by_head: bool
    by_component: bool = False
    rotary: str | None = None
    by_channel: bool = False
    narrow: str = ""
    implicit: bool = False

    def conclude(self, layer: Layer) -> Layer:
        """The layer as it was found to be."""
        assert isinstance(layer, AttentionLayer)
        inputs = tuple(replace(one, by_head=self.by_head and len(one.roles) > 1) for one in layer.stream.inputs)
        stream = replace(layer.stream, inputs=inputs, by_component=self.by_component)
        context = layer.context if isinstance(layer, JointAttention) else None
        made = layer_of(layer.name, layer.module, layer.heads, stream, layer.running, context)
        kept = _kept(made)
        kept.narrow, kept.implicit = self.narrow, self.implicit
        made.proof, made.dense_parts = None, dict(self.dense)
        made.rotary, made.by_channel = self.rotary, self.by_channel
        return made

    @property
    def lacks(self) -> tuple[int, bool]:
        """How much is missing of both products: what stays dense, then what is left out by channels alone."""
        return len(self.dense), self.by_channel


def prove_attention(found: Layer, trial: Trial) -> Finding:
    """Which of the two products exist, and how a narrower layer runs."""
    base = attention_of(found.name, trial.base)
    assert isinstance(base, AttentionLayer)
    best: tuple[AttentionLayer, _Form] | None = None
    for layer in variants(base):
        if layer.running is not layer.module and not trial.holds(layer.running):
            return Finding(f"it reads its weights in a way of its own ({trial.said()})")
        form = _products(trial, layer)
        if best is None or form.lacks < best[1].lacks:
            best = layer, form
        if not any(form.lacks):
            break
    assert best is not None
    layer, form = best
    if len(form.dense) == 2:
        return Finding("; ".join(form.dense.values()))
    concluded = form.conclude(layer)
    assert isinstance(concluded, AttentionLayer)
    final = _stand_in(trial, concluded, form)
    if final is None:
        return Finding(f"a narrower layer puts out something else ({trial.said()})")
    return Finding(conclude=final.conclude)


def _products(trial: Trial, layer: AttentionLayer) -> _Form:
    """Which of the two products exist, and whether values can be left out by channels where theirs does not."""
    rotary, by_channel, dense = None, False, {}
    trial.rounding = _rounding(trial, layer)
    if not any("query" in one.roles for one in layer.stream.inputs):
        dense["qk"] = "its scores do not come from queries and keys that are linear layers of its own"
    elif not trial.holds(_turned(layer, "qk")):
        said = trial.said()
        layouts = LAYOUTS if layer.heads.width % 2 == 0 and not isinstance(layer, JointAttention) else ()
        rotary = next((one for one in layouts if trial.holds(_turned(layer, "qk", one))), None)
        if rotary is None:
            why = (
                "the scores do not follow from the product of queries and keys alone: their rows lie elsewhere, or a "
                "norm or another operation acts between projections and scores"
            )
            dense["qk"] = f"{NO_PRODUCT if _silenced(trial, layer) else why} ({said})"
    if not trial.holds(_turned(layer, "vo")):
        alone = layer.heads.value_width > 1 and not isinstance(layer, JointAttention)
        by_channel = alone and _channels_are_free(trial, layer)
        if not by_channel:
            dense["vo"] = (
                "the output does not follow from the product of values and output weights alone, and channels depend "
                f"on each other: a norm or another operation acts between them ({trial.said()})"
            )
    by_head = any(one.by_head for one in layer.stream.inputs)
    return _Form(dense, by_head, layer.stream.by_component, rotary, by_channel)


def _silenced(trial: Trial, layer: AttentionLayer) -> bool:
    """Whether keys are without effect where all queries are zero: then the rows are those of queries and keys."""
    generator = torch.Generator().manual_seed(5)
    silent, other = [], []
    for w in _weights(layer):
        bias = None if w.query_bias is None else torch.zeros_like(w.query_bias)
        silent.append(replace(w, query=torch.zeros_like(w.query), query_bias=bias))
        other.append(replace(silent[-1], key=torch.randn(w.key.shape, generator=generator).to(w.key)))
    return trial.holds(with_weights(layer, other), trial.run(with_weights(layer, silent)))


def _channels_are_free(trial: Trial, layer: AttentionLayer) -> bool:
    """Whether channels can be left out where they lead nowhere: halves, such that any two are parted once, each way."""
    heads, kept = layer.heads, _kept(layer)
    order, places = _channels(layer), torch.arange(heads.value_width)
    for bit, side in product(range((heads.value_width - 1).bit_length()), (0, 1)):
        keep = order[:, (places >> bit) % 2 == side]
        choice = {"channels": keep.shape[1]}
        weights, at, dense = _truncated(layer, choice, keep)
        small = kept.build(heads.width, layer.vo_width(choice), layer.placed(choice))
        _fill(kept, small, weights, at)
        if not trial.holds(small, trial.run(with_weights(layer, dense))):
            return False
    return True


def _kept(layer: AttentionLayer) -> KeptForward:
    """How a layer that was recognised by its parts runs."""
    assert isinstance(layer.stand_in, KeptForward)
    return layer.stand_in


def _weights(layer: AttentionLayer) -> list[HeadWeights]:
    """Of all streams."""
    return [layer.weights_of(stream) for stream in layer.streams]


def _fill(kept: KeptForward, small: nn.Module, weights: list[HeadWeights], places: Places) -> None:
    kept.fill(small, weights[0], places)
    for more in weights[1:]:
        kept.fill_context(small, more)


def _channels(layer: AttentionLayer) -> Tensor:
    """(groups, d_v): the channels of every group in an order of its own."""
    generator = torch.Generator().manual_seed(4)
    heads = layer.heads
    return torch.stack([torch.randperm(heads.value_width, generator=generator) for _ in range(heads.groups)])


def _rounding(trial: Trial, layer: AttentionLayer) -> float:
    """What rounding is here: hosts may rotate in float32, which longer queries and shorter keys bring to light."""
    scaled = []
    for w in _weights(layer):
        query_bias, key_bias = (None if b is None else b * by for b, by in ((w.query_bias, 3), (w.key_bias, 1 / 3)))
        scaled.append(replace(w, query=w.query * 3, key=w.key / 3, query_bias=query_bias, key_bias=key_bias))
    noise = trial.difference(with_weights(layer, scaled))
    return max(ROUNDING, 16 * noise) if noise <= COARSE / 16 else ROUNDING


def _turned(layer: AttentionLayer, part: str, layout: str | None = None) -> nn.Module:
    """The layer with the heads of one product in another basis, which must change nothing."""
    heads = layer.heads
    width = heads.width if part == "qk" else heads.value_width
    generator = torch.Generator().manual_seed(2)
    turn = _pair_turns(heads.groups, width, layout, generator) if layout else _bases(heads.groups, width, generator)
    return with_weights(layer, [_in_basis(w, part, turn, heads.num) for w in _weights(layer)])


def _in_basis(weights: HeadWeights, part: str, turn: Tensor, num: int) -> HeadWeights:
    """One stream's weights with a product in another basis (groups, width, width)."""
    back = torch.linalg.inv(turn)
    if part == "qk":
        of_queries = spread(turn, num)
        return replace(
            weights,
            query=of_queries.mT @ weights.query,
            query_bias=_through(weights.query_bias, of_queries),
            key=back @ weights.key,
            key_bias=_through(weights.key_bias, back.mT),
        )
    return replace(
        weights,
        value=turn.mT @ weights.value,
        value_bias=_through(weights.value_bias, turn),
        output=spread(back, num) @ weights.output,
    )


def _through(bias: Tensor | None, by: Tensor) -> Tensor | None:
    return None if bias is None else (bias[:, None] @ by)[:, 0]


def _bases(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Well-conditioned random bases (count, width, width)."""
    q, _ = torch.linalg.qr(torch.randn(count, width, width, generator=generator, dtype=torch.float64))
    return q * (0.5 + torch.rand(count, 1, width, generator=generator, dtype=torch.float64))


def _pair_turns(count: int, width: int, layout: str, generator: torch.Generator) -> Tensor:
    """Random turns and lengths within each pair of components; the inverse transpose is the same turn."""
    half = width // 2
    places = pair_places(torch.arange(half).expand(1, half), width, layout)[0]
    angle = 6.28 * torch.rand(count, half, generator=generator, dtype=torch.float64)
    length = 0.5 + torch.rand(count, half, generator=generator, dtype=torch.float64)
    turn = torch.zeros(count, width, width, dtype=torch.float64)
    a, b = places[:half], places[half:]
    turn[:, a, a] = turn[:, b, b] = length * angle.cos()
    turn[:, a, b], turn[:, b, a] = -length * angle.sin(), length * angle.sin()
    return turn


def with_weights(layer: AttentionLayer, weights: Sequence[HeadWeights]) -> nn.Module:
    """The layer's module, with these weights of full width, of every stream, in place of its own."""
    children: dict[str, nn.Module] = {}
    for stream, own in zip(layer.streams, weights, strict=True):
        for one in stream.inputs:
            children[one.path] = _linear_with(layer.running.get_submodule(one.path), *own.rows(one))
        if stream.output is not None:
            weight = joined_output(own.output, stream.by_component)
            linear = layer.running.get_submodule(stream.output)
            children[stream.output] = _linear_with(linear, weight, own.output_bias)
    return copy_with(layer.running, children)


def _linear_with(like: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    made = copy_with(like, {})
    made.weight = nn.Parameter(weight.reshape(like.weight.shape), False)
    made.bias = None if bias is None else nn.Parameter(bias, False)  # type: ignore[assignment]
    return made


def _stand_in(trial: Trial, layer: AttentionLayer, form: _Form) -> _Form | None:
    """How a narrower layer runs: with the host told of the width, else padded to the full one."""
    heads, kept = layer.heads, _kept(layer)
    choice = {}
    if "qk" not in form.dense:
        choice[layer.qk_part] = max(1, (heads.width // 2 if layer.rotary else heads.width) - 1)
    if "vo" not in form.dense:
        choice[layer.vo_part] = max(1, min(heads.value_width - 2, layer.full[layer.vo_part]))
    weights, places, dense = _truncated(layer, choice, _channels(layer)[:, : choice.get("channels", 0)])
    reference = trial.run(with_weights(layer, dense))
    ways = [("", False)]
    if "qk" in choice and "channels" not in choice:
        told = [narrow for narrow, there in (("widths", kept.widths), ("totals", kept.totals)) if there]
        scaled = (True, False) if kept.scales else (False, True)
        ways = [*((narrow, implicit) for narrow in told for implicit in scaled), *ways]
    for kept.narrow, kept.implicit in ways:
        (small,) = layer.empty(choice).values()
        _fill(kept, small, weights, places)
        if trial.holds(small, reference):
            return replace(form, narrow=kept.narrow, implicit=kept.implicit)
    return None


def _truncated(
    layer: AttentionLayer, choice: Mapping[str, int], channels: Tensor
) -> tuple[list[HeadWeights], Places, list[HeadWeights]]:
    """(Weights of a stand-in with the first components of every head; their places; the same at full width).

    Args:
        channels: (groups, r) of the values, in place of the first ones, where the choice is of channels.
    """
    found = [_first(layer, w, choice, channels) for w in _weights(layer)]
    return [small for small, _, _ in found], found[0][1], [dense for _, _, dense in found]


def _first(
    layer: AttentionLayer, w: HeadWeights, choice: Mapping[str, int], channels: Tensor
) -> tuple[HeadWeights, Places, HeadWeights]:
    """The same of one stream."""
    small, dense, heads = w, w, layer.heads
    places: dict[Role, Tensor] = {}
    if "qk" in choice or "pairs" in choice:
        if "pairs" in choice:
            kept = pair_places(torch.arange(choice["pairs"]), heads.width, str(layer.rotary))
            places |= {"query": kept.expand(heads.num, -1), "key": kept.expand(heads.groups, -1)}
        else:
            kept = torch.arange(choice["qk"])
        small = replace(
            small,
            query=w.query[:, kept],
            key=w.key[:, kept],
            query_bias=None if w.query_bias is None else w.query_bias[:, kept],
            key_bias=None if w.key_bias is None else w.key_bias[:, kept],
        )
        mask = torch.zeros(heads.width, dtype=torch.float64).index_fill(0, kept, 1.0)
        bias = None if w.query_bias is None else w.query_bias * mask
        dense = replace(dense, query=w.query * mask[:, None], query_bias=bias)
    if "vo" in choice:
        r = choice["vo"]
        bias = None if w.value_bias is None else w.value_bias[:, :r]
        small = replace(small, value=w.value[:, :r], value_bias=bias, output=w.output[:, :r])
        output = w.output.clone()
        output[:, r:] = 0
        dense = replace(dense, output=output)
    elif "channels" in choice:
        places |= {"value": channels, "gate": channels}
        of_heads = spread(channels, heads.num)
        bias = None if w.value_bias is None else w.value_bias.gather(1, channels)
        small = replace(small, value=_rows(w.value, channels), value_bias=bias, output=_rows(w.output, of_heads))
        if w.gate is not None:
            bias = None if w.gate_bias is None else w.gate_bias.gather(1, channels)
            small = replace(small, gate=_rows(w.gate, channels), gate_bias=bias)
        mask = torch.zeros(heads.num, heads.value_width, dtype=torch.float64).scatter(1, of_heads, 1.0)
        dense = replace(dense, output=w.output * mask[..., None])
    zero = torch.zeros(w.output.shape[-1], dtype=torch.float64)
    return replace(small, output_bias=zero if w.output_bias is None else w.output_bias), places, dense


def _rows(weight: Tensor, places: Tensor) -> Tensor:
    return weight.gather(1, places[..., None].expand(-1, -1, weight.shape[-1]))
