"""What can be compressed in a model: layers, each a module with named widths.

A host (``hosts/``) finds the layers; everything after it works on :class:`Layer` alone. A *choice* says how wide a
layer shall be, e.g. ``{"qk": 24, "vo": 20}``, ``{"neurons": 300}``, ``{"fc1": 40, "fc2": 50}`` or ``{"rank": 8}``; a
part that the choice does not name stays dense, and the empty choice is the dense layer. An FFN that was reduced twice
has both: ranks within its neurons.

A new kind of layer is one subclass of :class:`Layer` and one of :class:`~comcat.layers.factors.Factors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError, PlanError
from .cost import Cost, Shape, break_even

if TYPE_CHECKING:
    from .factors import Factors
    from .gates import LayerGates
    from .recording import Recorder, ShapeCounter

Choice = dict[str, int]

#: The parts a user can select; ``head`` is the classifier, ``pairs`` are those of rotary queries and keys.
PARTS = ("qk", "vo", "ffn", "head", "pairs")
#: What is reduced where nothing is said and no loss is measured: an equal share of rotary pairs costs more than one of
#: the rest (benchmarks/rotary_training_free.py), and the gates of a search cut them without a refit.
USUAL_PARTS = PARTS[:4]


class LeftDense(NamedTuple):
    """A layer (or part of one) that stays as it is, and why."""

    name: str
    cls: str
    reason: str


@dataclass(frozen=True)
class Finding:
    """What a proof came to: why the layer stays dense, or what is known of it and its like now."""

    reason: str | None = None
    conclude: Callable[[Layer], Layer] = field(default=lambda layer: layer)


class Layer(ABC):
    """A layer that can be made narrower: everything that differs from kind to kind.

    Attributes:
        name: of the module in the model; module: as it stands there.
        running: what computes the same with linear layers that are called, which statistics are recorded on: the
            module itself, or one in its place where the original reads weights instead of calling layers.
        full: width of every part that can be reduced.
        linears: the linear layers inside, by role.
        dense_parts: parts that must keep their width, and why.
        proof: what still has to be proven of a layer that was recognised by its parts (:mod:`comcat.hosts.proof`);
            conclusion: what came of it, for the same layer of a copy.
    """

    kind: ClassVar[str]
    #: Parts that are chosen together; the parts of one form exclude those of another.
    forms: ClassVar[tuple[tuple[str, ...], ...]]
    #: Parts whose widths count up to the full one. The others are low-rank matrices, which count up to break-even.
    linear_in_width: ClassVar[tuple[str, ...]] = ()
    #: At which shares of its reach a part is probed.
    levels: ClassVar[Mapping[str, tuple[float, ...]]]
    #: Parts that get one width together where every layer of the kind is to have the same; empty: it stays dense.
    one_width: ClassVar[tuple[str, ...]] = ()
    #: Whether the times of its parts depend on each other.
    timed_together: ClassVar[bool] = False
    #: Whether the layer lies inside a block of the model, as attention and FFN do, or behind all of them.
    in_block: ClassVar[bool] = True

    def __init__(self, name: str, module: nn.Module, dense_parts: Mapping[str, str] | None = None) -> None:
        self.name, self.module = name, module
        self.proof: Callable[[Layer, Any], Finding] | None = None
        self.conclusion: Callable[[Layer], Layer] | None = None
        self.dense_parts = dict(dense_parts or {})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {type(self.module).__name__}, {self.full})"

    @property
    @abstractmethod
    def full(self) -> Choice: ...

    @property
    @abstractmethod
    def linears(self) -> dict[str, nn.Linear]: ...

    @property
    def running(self) -> nn.Module:
        return self.module

    def originals(self) -> dict[str, nn.Module]:
        """The linear layers as they stand in the model, where :attr:`running` has others."""
        return dict(self.linears)

    def plain(self) -> bool:
        """Whether the linear layers stand in the model as plain ``nn.Linear``."""
        return self.running is self.module and all(isinstance(one, nn.Linear) for one in self.linears.values())

    def shapes_at(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the module's own weights, by full name, with :attr:`one_width` at a width; only of plain layers."""
        return {}

    def part_of(self, part: str) -> str:
        """Which of :data:`PARTS` a part of this layer belongs to."""
        return self.kind

    # -- statistics and factors

    @abstractmethod
    def moment_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the moments that a calibration holds for this layer."""

    @abstractmethod
    def gradient_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the moments that a calibration with output gradients holds besides."""

    def optional_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all moments that a calibration may hold for this layer besides."""
        return self.gradient_shapes()

    def shape_hooks(self, counter: ShapeCounter) -> list[Any]:
        """Hooks by which the data that one image brings here is counted; returns their handles."""
        first = next(iter(self.linears.values()))
        return [first.register_forward_hook(counter.rows(1 if is_pointwise(first) else -1))]

    @abstractmethod
    def record(self, recorder: Recorder) -> list[Any]:
        """Hooks on the linear layers of :attr:`running` that fill the moments; returns their handles."""

    @abstractmethod
    def factors(self, moments: Mapping[str, Tensor] | None = None) -> Factors:
        """What is needed to build this layer at any choice; nothing is decomposed before it is asked for."""

    # -- modules

    @abstractmethod
    def empty(self, choice: Choice) -> dict[str, nn.Module]:
        """Uninitialized stand-ins by full name, in the layer's mode; nothing for the dense choice.

        Raises:
            PlanError: the choice cannot be built here.
        """

    @abstractmethod
    def replaced(self, choice: Choice) -> dict[str, nn.Module]:
        """The modules, by full name, that ``choice`` takes out of the model."""

    @abstractmethod
    def gates(self, factors: Any, parts: tuple[str, ...]) -> list[LayerGates]:
        """Gates on the given parts of one form, at full width equal to the dense layer."""

    def came_of(self, choice: Choice) -> bool:
        """Whether this layer, which looks dense, may be what ``choice`` made: fewer neurons leave no trace."""
        return False

    # -- costs

    @abstractmethod
    def cost(self, widths: Mapping[str, Any], shape: Shape) -> Cost:
        """Parameters and MACs at integers or integer arrays of widths by part; -1, or a part left out, is dense.

        What a norm or gate costs that the layer carries along is not counted.
        """

    def parts_cost(self, parts: Iterable[str], shape: Shape) -> Cost:
        """What the selected :data:`PARTS` of the dense layer cost."""
        return self.priced({}, shape)

    def priced(self, choice: Choice, shape: Shape) -> Cost:
        """Parameters and MACs of one choice, as integers."""
        cost = self.cost(choice, shape)
        return Cost(int(cost.params), int(cost.macs))

    @abstractmethod
    def linear_size(self, part: str) -> tuple[int, int]:
        """Input and output width of the matrix, or pair of matrices, that a component of ``part`` is a slice of."""

    def reach(self, part: str) -> int:
        """The width from which on ``part`` costs what the dense layer costs: the full one, or break-even."""
        full = self.full[part]
        return full if part in self.linear_in_width else min(full, break_even(*self.linear_size(part)))

    def equal_share(self, part: str) -> tuple[int, int]:
        """(size of the part's matrices, width that counts as all of it), for plans of equal kept fractions."""
        inner, outer = self.linear_size(part)
        return inner * outer, break_even(inner, outer)

    def layer_key(self, shape: Shape) -> str:
        """What the layer's running time depends on, in words."""
        linears = ", ".join("{} {}x{}".format(name, *size(one)) for name, one in self.linears.items())
        return f"{type(self.module).__name__}: {linears}, {shape.tokens} tokens ({', '.join(self.full)})"

    # -- choices

    def selected(self, parts: Iterable[str]) -> Choice:
        """The full widths that belong to the selected :data:`PARTS`."""
        return {part: width for part, width in self.full.items() if self.part_of(part) in parts}

    def check(self, choice: Choice) -> None:
        """Raise PlanError, naming the layer, unless ``choice`` can be built here."""
        for part, width in choice.items():
            if part not in self.full:
                reason = self.dense_parts.get(part)
                why = f"'{part}' cannot be reduced ({reason})" if reason else f"unknown part '{part}'"
                raise PlanError(f"layer '{self.name}': {why}; possible are {', '.join(self.full)}")
            limit = self.limit(part, choice)
            if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= limit:
                raise PlanError(f"layer '{self.name}': {part} is {width!r}, but must be an integer from 1 to {limit}")

    def limit(self, part: str, choice: Choice) -> int:
        """The largest width of a part beside the others of a choice."""
        return self.full[part]

    def widths(self, part: str, shares: Iterable[float]) -> list[int]:
        """The widths at these shares of the part's reach, ascending, without the full one."""
        found = {max(1, round(self.reach(part) * share)) for share in shares}
        return sorted(width for width in found - {self.reach(part)} if width < self.full[part])


class Inventory:
    """All layers of a model in forward order, and what stays dense."""

    def __init__(self, layers: list[Layer], dense: list[LeftDense]) -> None:
        self.layers, self.dense = layers, dense

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        for entry in self.dense:
            if entry.name == name or entry.name.startswith(f"{name}."):
                raise PlanError(f"layer '{name}' ({entry.cls}) cannot be reduced: {entry.reason}")
        names = [layer.name for layer in self.layers]
        known = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
        raise PlanError(f"layer '{name}' is not in this model; its layers are {known}")

    def blocks(self) -> list[str]:
        """Names of the model's blocks, in forward order: the parents of attention and FFN layers."""
        parents = dict.fromkeys(layer.name.rpartition(".")[0] for layer in self.layers if layer.in_block)
        return [name for name in parents if name]


def check_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """Validate a selection of :data:`PARTS`."""
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise PlanError(f"unknown part {unknown}; choose from {', '.join(PARTS)}")
    return parts


def check_finite(model: nn.Module) -> None:
    """Raise ModelError naming the first parameter that holds NaN or infinite values."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"parameter '{name}' holds NaN or infinite values; use an intact checkpoint")


def given(widths: Mapping[str, Any], part: str) -> np.ndarray:
    """The widths of a part as an array; -1 where it is left out."""
    return np.asarray(widths.get(part, -1))


def like(linear: Any) -> dict[str, Any]:
    """Keyword arguments for a module of the kind, on the device and in the dtype of ``linear``."""
    weight: Tensor = linear.weight
    return {"pointwise": is_pointwise(linear), "device": weight.device, "dtype": weight.dtype}


def is_pointwise(linear: nn.Module) -> bool:
    """Whether a linear layer over channels is a 1x1 convolution."""
    return isinstance(linear, nn.Conv2d)


def size(linear: Any) -> tuple[int, int]:
    """Input and output width of a linear layer or 1x1 convolution."""
    return linear.weight.shape[1], linear.weight.shape[0]
