"""What an attention layer that was recognised by its parts has to show.

* It depends on ``W_q W_k^T`` alone if any basis of a head's queries, with the inverse one of its keys, leaves the
  output as it is; and likewise on ``W_v W_o``. Where queries and keys are rotated (rotary embedding) only turns within
  each pair of components do.
* A stand-in with narrower heads puts out what the original does with weights of that rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.attention import AttentionLayer
from ..layers.base import Finding, Layer
from ..layers.heads import HeadWeights, joined_output, spread
from ..linalg.rotary import LAYOUTS, pair_places
from ..nn.copies import copy_with
from .attention_structure import attention_of, layer_of, variants
from .proof import COARSE, ROUNDING, Trial


@dataclass(frozen=True)
class _Form:
    """What was found out: parts that have no product, and how the layer runs."""

    dense: Mapping[str, str]
    by_head: bool
    by_component: bool = False
    rotary: str | None = None
    narrow: str = ""
    implicit: bool = False

    def conclude(self, layer: Layer) -> Layer:
        """The layer as it was found to be."""
        assert isinstance(layer, AttentionLayer)
        inputs = tuple(replace(one, by_head=self.by_head and len(one.roles) > 1) for one in layer.stream.inputs)
        stream = replace(layer.stream, inputs=inputs, by_component=self.by_component)
        made = layer_of(layer.name, layer.module, layer.heads, stream, layer.running)
        assert made.kept is not None
        made.kept.narrow, made.kept.implicit = self.narrow, self.implicit
        made.proof, made.dense_parts, made.rotary = None, dict(self.dense), self.rotary
        return made


def prove_attention(found: Layer, trial: Trial) -> Finding:
    """Which of the two products exist, and how a narrower layer runs."""
    base = attention_of(found.name, trial.base)
    assert isinstance(base, AttentionLayer)
    best: tuple[AttentionLayer, _Form] | None = None
    for layer in variants(base):
        if layer.running is not layer.module and not trial.holds(layer.running):
            return Finding(f"it reads its weights in a way of its own ({trial.said()})")
        form = _products(trial, layer)
        if best is None or len(form.dense) < len(best[1].dense):
            best = layer, form
        if not form.dense:
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
    """Which of the two products exist."""
    rotary, dense = None, {}
    trial.rounding = _rounding(trial, layer)
    if not any("query" in one.roles for one in layer.stream.inputs):
        dense["qk"] = "its scores do not come from queries and keys of its own"
    elif not trial.holds(_turned(layer, "qk")):
        said = trial.said()
        layouts = LAYOUTS if layer.heads.width % 2 == 0 else ()
        rotary = next((one for one in layouts if trial.holds(_turned(layer, "qk", one))), None)
        if rotary is None:
            dense["qk"] = (
                "the scores do not follow from the product of queries and keys alone: a norm, a position or another "
                f"operation acts between projections and scores ({said})"
            )
    if not trial.holds(_turned(layer, "vo")):
        dense["vo"] = (
            "the output does not follow from the product of values and output weights alone: a norm, a gate or another "
            f"operation acts between them ({trial.said()})"
        )
    return _Form(dense, any(one.by_head for one in layer.stream.inputs), layer.stream.by_component, rotary)


def _rounding(trial: Trial, layer: AttentionLayer) -> float:
    """What rounding is here: hosts may rotate in float32, which longer queries and shorter keys bring to light."""
    w = layer.weights()
    query_bias, key_bias = (None if b is None else b * by for b, by in ((w.query_bias, 3), (w.key_bias, 1 / 3)))
    scaled = replace(w, query=w.query * 3, key=w.key / 3, query_bias=query_bias, key_bias=key_bias)
    noise = trial.difference(with_weights(layer, scaled))
    return max(ROUNDING, 16 * noise) if noise <= COARSE / 16 else ROUNDING


def _turned(layer: AttentionLayer, part: str, layout: str | None = None) -> nn.Module:
    """The layer with the heads of one product in another basis, which must change nothing."""
    weights, heads = layer.weights(), layer.heads
    width = heads.width if part == "qk" else heads.value_width
    generator = torch.Generator().manual_seed(2)
    turn = _pair_turns(heads.groups, width, layout, generator) if layout else _bases(heads.groups, width, generator)
    back = torch.linalg.inv(turn)
    if part == "qk":
        of_queries = spread(turn, heads.num)
        weights = replace(
            weights,
            query=of_queries.mT @ weights.query,
            query_bias=_through(weights.query_bias, of_queries),
            key=back @ weights.key,
            key_bias=_through(weights.key_bias, back.mT),
        )
    else:
        weights = replace(
            weights,
            value=turn.mT @ weights.value,
            value_bias=_through(weights.value_bias, turn),
            output=spread(back, heads.num) @ weights.output,
        )
    return with_weights(layer, weights)


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


def with_weights(layer: AttentionLayer, weights: HeadWeights) -> nn.Module:
    """The layer's module, with these weights of full width in place of its own."""
    children: dict[str, nn.Module] = {}
    for one in layer.stream.inputs:
        children[one.path] = _linear_with(layer.running.get_submodule(one.path), *weights.rows(one))
    out = str(layer.stream.output)
    weight = joined_output(weights.output, layer.stream.by_component)
    children[out] = _linear_with(layer.running.get_submodule(out), weight, weights.output_bias)
    return copy_with(layer.running, children)


def _linear_with(like: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    made = copy_with(like, {})
    made.weight = nn.Parameter(weight.reshape(like.weight.shape), False)
    made.bias = None if bias is None else nn.Parameter(bias, False)  # type: ignore[assignment]
    return made


def _stand_in(trial: Trial, layer: AttentionLayer, form: _Form) -> _Form | None:
    """How a narrower layer runs: with the host told of the width, else padded to the full one."""
    heads, kept = layer.heads, layer.kept
    assert kept is not None
    choice = {}
    if "qk" not in form.dense:
        choice[layer.qk_part] = max(1, (heads.width // 2 if layer.rotary else heads.width) - 1)
    if "vo" not in form.dense:
        choice["vo"] = max(1, min(heads.value_width - 2, layer.full["vo"]))
    weights, dense = _truncated(layer, choice)
    reference = trial.run(with_weights(layer, dense))
    ways = [("", False)]
    if "qk" in choice and kept.widths:
        told = ("widths", "totals") if kept.totals else ("widths",)
        ways = [*((narrow, implicit) for narrow in told for implicit in (False, True)), *ways]
    for kept.narrow, kept.implicit in ways:
        (small,) = layer.empty(choice).values()
        kept.fill(small, *weights)
        if trial.holds(small, reference):
            return replace(form, narrow=kept.narrow, implicit=kept.implicit)
    return None


def _truncated(
    layer: AttentionLayer, choice: Mapping[str, int]
) -> tuple[tuple[HeadWeights, Tensor | None], HeadWeights]:
    """(Weights of a stand-in with the first components of every head, and their places; the same at full width)."""
    w, heads = layer.weights(), layer.heads
    small, dense, places = w, w, None
    if "qk" in choice or "pairs" in choice:
        if "pairs" in choice:
            pairs = torch.arange(choice["pairs"]).expand(heads.groups, -1)
            of_keys = pair_places(pairs, heads.width, str(layer.rotary))
            places = torch.cat([spread(of_keys, heads.num), of_keys])
        else:
            of_keys = torch.arange(choice["qk"]).expand(heads.groups, -1)
        of_queries = spread(of_keys, heads.num)
        small = replace(
            small,
            query=_rows(w.query, of_queries),
            key=_rows(w.key, of_keys),
            query_bias=None if w.query_bias is None else w.query_bias.gather(1, of_queries),
            key_bias=None if w.key_bias is None else w.key_bias.gather(1, of_keys),
        )
        mask = torch.zeros(heads.num, heads.width, dtype=torch.float64).scatter(1, of_queries, 1.0)
        bias = None if w.query_bias is None else w.query_bias * mask
        dense = replace(dense, query=w.query * mask[..., None], query_bias=bias)
    if "vo" in choice:
        r = choice["vo"]
        bias = None if w.value_bias is None else w.value_bias[:, :r]
        small = replace(small, value=w.value[:, :r], value_bias=bias, output=w.output[:, :r])
        output = w.output.clone()
        output[:, r:] = 0
        dense = replace(dense, output=output)
    zero = torch.zeros(w.output.shape[-1], dtype=torch.float64)
    return (replace(small, output_bias=zero if w.output_bias is None else w.output_bias), places), dense


def _rows(weight: Tensor, places: Tensor) -> Tensor:
    return weight.gather(1, places[..., None].expand(-1, -1, weight.shape[-1]))
