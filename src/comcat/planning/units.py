"""Units of cost: what a budget is given in, and what a choice of widths costs in it.

A new unit is one class here, and a field of :class:`~comcat.planning.plan.Budget` to ask for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import BudgetError

if TYPE_CHECKING:
    from ..layers.base import Layer
    from ..layers.cost import Shape
    from ..models.profile import Profile
    from .latency import LatencyTable


class Unit(ABC):
    """A unit of cost.

    Attributes:
        name: in budgets, estimates and reports; multiple: what widths are multiples of where nothing else is asked for.
        of_parts: whether parts have a cost of their own, to which a budget can be relative.
    """

    name: ClassVar[str]
    multiple: ClassVar[int] = 1
    of_parts: ClassVar[bool] = True

    @abstractmethod
    def model(self, dense: Profile) -> int:
        """What the dense model costs."""

    @abstractmethod
    def layer(self, layer: Layer, widths: Mapping[str, Any], shape: Shape) -> np.ndarray:
        """What a layer costs at integers or integer arrays of widths by part; -1, or a part left out, is dense."""

    def parts(self, layer: Layer, parts: tuple[str, ...], shape: Shape) -> int:
        """What the selected parts of a dense layer cost."""
        return int(getattr(layer.parts_cost(parts, shape), self.name))

    @staticmethod
    def shown(cost: int, name: str) -> str:
        """A cost with its unit, for people."""
        return UNITS[name]._shown(cost)

    @classmethod
    def _shown(cls, cost: int) -> str:
        return f"{cost:,} {cls.name}"


class Counted(Unit):
    """Parameters or MACs, which follow from the shapes."""

    def model(self, dense: Profile) -> int:
        return int(getattr(dense, self.name))

    def layer(self, layer: Layer, widths: Mapping[str, Any], shape: Shape) -> np.ndarray:
        return np.asarray(getattr(layer.cost(widths, shape), self.name), dtype=np.int64)


class Params(Counted):
    """Parameters."""

    name = "params"


class Macs(Counted):
    """Multiply-accumulates for one image."""

    name = "macs"


class Latency(Unit):
    """Nanoseconds for one batch, from measured timings. Vector units like widths that are multiples of 8."""

    name = "latency"
    multiple = 8
    of_parts = False

    def __init__(self, table: LatencyTable) -> None:
        self.table = table

    def model(self, dense: Profile) -> int:
        return self.table.dense

    def layer(self, layer: Layer, widths: Mapping[str, Any], shape: Shape) -> np.ndarray:
        return self.table.cost(layer, shape, widths)

    @classmethod
    def _shown(cls, cost: int) -> str:
        return f"{cost / 1e6:,.3f} ms"


UNITS: dict[str, type[Unit]] = {unit.name: unit for unit in (Params, Macs, Latency)}


def units_with(latency: LatencyTable | None) -> dict[str, Unit]:
    """The units that a plan can be estimated in, by name."""
    units: dict[str, Unit] = {"params": Params(), "macs": Macs()}
    return units if latency is None else {**units, "latency": Latency(latency)}


def unit_of(units: Mapping[str, Unit], name: str) -> Unit:
    """One of them.

    Raises:
        BudgetError: latency without timings.
    """
    if name not in units:
        raise BudgetError("a latency budget needs timings: give latency=comcat.measure_latency(model)")
    return units[name]
