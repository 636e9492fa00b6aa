"""An attention layer that products can be added to, as its host describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..errors import ModelError
from ..layers.heads import Heads, HeadWeights, Stream
from ..nn.added import AddedLayer, AddedProduct, Strength
from .placement import place, precision

Kind = Literal["self", "cross", "joint", "text"]


@dataclass(frozen=True)
class AddableAttention:
    """An attention layer that products can be added to.

    Attributes:
        name: of the module inside its component.
        streams: of tokens that meet in one softmax: every stream's queries see every stream's keys.
        normalized: queries and keys are normalized or rotated before their product, so that the added product cannot
            be folded into their weights.
        unfolded: why no weights of one matrix for each of query, key, value and output can be told, by which the
            product would be written as a LoRA; empty where they can.
        meeting: where in the host's forward the products go, as its file of :mod:`comcat.hosts` has it.
    """

    name: str
    module: nn.Module
    kind: Kind
    heads: Heads
    streams: tuple[Stream, ...]
    normalized: bool = False
    unfolded: str = ""
    meeting: Any = None

    def linear(self, name: str) -> Any:
        """A projection by its name; the base layer's dimensions also where PEFT has wrapped it."""
        return self.module.get_submodule(name)

    def output(self, stream: Stream, model: nn.Module) -> tuple[str, nn.Module] | None:
        """(path in its component ``model``, module) of what the heads' outputs go through, or None if they are unused.

        For an inner stream that is the block's projection (FLUX's single blocks).
        """
        if stream.output is not None:
            return f"{self.name}.{stream.output}", self.linear(stream.output)
        if not stream.inner:
            return None
        path = f"{self.name.rpartition('.')[0]}.proj_out"
        try:
            return path, model.get_submodule(path)
        except AttributeError as error:
            raise ModelError(
                f"layer '{self.name}' leaves its output projection to its block, which has none that is called "
                "'proj_out'; what products do to its weights cannot be told"
            ) from error

    def weights(self, stream: Stream, model: nn.Module) -> HeadWeights:
        """The base's weights of one stream, per head; ``model``: the component that the layer is in."""
        output = self.output(stream, model)
        return HeadWeights.of(self.module, self.heads, stream, None if output is None else output[1])

    def dims(self, stream: Stream) -> tuple[int, int, int | None]:
        """(D of queries, D of keys and values, D of the output or None)."""
        output: int | None = None
        if stream.output is not None:
            output = self.linear(stream.output).out_features
        elif stream.inner:
            output = self.heads.num * self.heads.value_width
        return self.linear(stream.query).in_features, self.linear(stream.key).in_features, output

    def signature(self) -> list[Any]:
        """What a file's tensors have to fit: plain data for the fingerprint."""
        heads = self.heads
        return [self.name, self.kind, heads.num, heads.width, *[[s.name, *self.dims(s)] for s in self.streams]]

    def new_layer(self, rank: int, strength: Strength, biases: Sequence[str] = (), dtype: Any = None) -> AddedLayer:
        """Products of ``rank`` for every stream, on this layer's device; ``biases``: e.g. "sample.query"."""
        query = self.linear(self.streams[0].query)
        device = place(query)
        streams = {
            stream.name: AddedProduct(
                *self.dims(stream),
                self.heads.num,
                rank,
                f"{stream.name}.query" in biases,
                f"{stream.name}.key" in biases,
                f"{stream.name}.value" in biases,
                device=device,
                dtype=dtype or precision(query),
            )
            for stream in self.streams
        }
        return AddedLayer(streams, rank, strength, self.heads.width)


@dataclass(frozen=True)
class Refusal:
    """An attention layer that products cannot be added to.

    Attributes:
        what: what it is, and why not.
        inherent: the model is made like that; False where somebody has put another processor into it.
    """

    kind: Kind
    what: str
    inherent: bool = False
