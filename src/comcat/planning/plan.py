"""A plan is data: module name -> widths, and what produced it. JSON, diffable, editable by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import BudgetError, PlanError
from ..layers.base import Choice, Inventory
from ..prepared import Prepared, prepared
from ..storage.atomic import atomic_file
from ..storage.reader import parse_json, read_text, validated
from .units import UNITS, Unit

FORMAT = 1
_FIELDS = {"comcat_plan", "method", "budget", "layers", "estimate", "input_size"}


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost: ``params``, ``macs`` or ``latency``, one of them.

    A float strictly between 0 and 1 is the fraction kept, an integer an absolute number; latency is that of one batch,
    in nanoseconds. ``of="model"`` relates it to the whole model, ``of="parts"`` to the parts being compressed only,
    which have no latency of their own.

    Raises:
        BudgetError: not exactly one number, a fraction outside (0, 1), an integer below 2, or the latency of parts.
    """

    params: float | int | None = None
    macs: float | int | None = None
    of: str = "model"
    latency: float | int | None = None

    def __post_init__(self) -> None:
        if sum(getattr(self, unit) is not None for unit in UNITS) != 1:
            raise BudgetError("give a budget of one of params, macs and latency, e.g. Budget(params=0.5)")
        if self.of not in ("model", "parts"):
            raise BudgetError(f"a budget is of 'model' or of 'parts', not of {self.of!r}")
        if self.of == "parts" and not UNITS[self.unit].of_parts:
            raise BudgetError(f"a {self.unit} budget is of the whole model: leave of='parts' out")
        value: Any = self.value
        if isinstance(value, bool) or not isinstance(value, Real):
            raise BudgetError(f"a budget is a number, not {value!r}")
        value = int(value) if isinstance(value, Integral) else float(value)
        object.__setattr__(self, self.unit, value)
        if isinstance(value, float) and not 0 < value < 1:
            raise BudgetError(
                f"a budget of {value:g} is not a fraction to keep: it must lie strictly between 0 and 1 "
                "(an absolute number is given as an integer)"
            )
        if isinstance(value, int) and value < 2:
            raise BudgetError(f"a budget of {value} {self.unit} keeps nothing; give a fraction or a larger number")

    @property
    def unit(self) -> str:
        """``"params"``, ``"macs"`` or ``"latency"``."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def value(self) -> float | int:
        value: float | int = getattr(self, self.unit)
        return value

    def absolute(self, model_cost: int, parts_cost: int) -> int:
        """The budget as a number for the whole model.

        Args:
            model_cost: what the dense model costs; parts_cost: what its compressible parts cost.

        Raises:
            BudgetError: the dense model already meets it.
        """
        whole = model_cost if self.of == "model" else parts_cost
        kept = int(whole * self.value) if isinstance(self.value, float) else self.value
        if kept >= whole:
            raise BudgetError(
                f"a budget of {Unit.shown(kept, self.unit)} is not below what the dense {self.of} costs "
                f"({Unit.shown(whole, self.unit)}); ask for less"
            )
        return kept + model_cost - whole


@dataclass
class Plan:
    """Widths by module name; what is not listed stays dense.

    ``layers`` maps e.g. ``"blocks.0.attn"`` to ``{"qk": 24, "vo": 20}``, ``"blocks.0.mlp"`` to ``{"neurons": 300}``
    or ``{"fc1": 40, "fc2": 50}``, ``"head"`` to ``{"rank": 8}``. ``estimate`` holds what the planner expected,
    with MACs at ``input_size`` (C, H, W); None where that is not known.
    """

    layers: dict[str, Choice]
    method: str = "manual"
    budget: dict[str, Any] | None = None
    estimate: dict[str, float] = field(default_factory=dict)
    input_size: tuple[int, ...] | None = None

    def to_json(self) -> str:
        """One layer per line, so that a plan reads and diffs well."""
        layers = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in self.layers.items())
        head = {"comcat_plan": FORMAT, "method": self.method, "budget": self.budget, "estimate": self.estimate}
        if self.input_size is not None:
            head["input_size"] = list(self.input_size)
        lines = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in head.items())
        return f'{{{lines},\n "layers": {{\n{layers}\n}}}}\n'

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """From parsed JSON.

        Raises:
            PlanError: not a plan, of a newer format, or with unknown fields.
        """
        if not isinstance(data, dict) or "comcat_plan" not in data or not isinstance(data.get("layers"), dict):
            raise PlanError('not a plan: it must hold "comcat_plan" and "layers" (see comcat.Plan.to_json)')
        if data["comcat_plan"] != FORMAT:
            raise PlanError(f"the plan has format {data['comcat_plan']}, this comcat reads {FORMAT}; upgrade comcat")
        unknown = sorted(set(data) - _FIELDS)
        if unknown:
            raise PlanError(f"the plan has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(_FIELDS))}")
        bad = [name for name, choice in data["layers"].items() if not isinstance(choice, dict)]
        if bad:
            raise PlanError(f"layer '{bad[0]}': the widths must be an object such as {{\"qk\": 24}}")
        size = data.get("input_size")
        if size is not None:
            if not isinstance(size, list | tuple) or not all(type(n) is int and 0 < n <= 1 << 14 for n in size):
                raise PlanError(f"input_size must be a list of positive integers (C, H, W), not {size!r}")
            size = tuple(size)
        rest: dict[str, Any] = {"method": "manual", "budget": None, "estimate": None}
        kinds = {"method": str, "budget": dict[str, Any] | None, "estimate": dict[str, float] | None}
        rest = {key: validated(kinds[key], data.get(key, rest[key]), f"{key} of the plan", PlanError) for key in rest}
        return cls(data["layers"], rest["method"], rest["budget"], rest["estimate"] or {}, size)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse :meth:`to_json`."""
        return cls.from_dict(parse_json(text, "the plan", PlanError))

    def save(self, path: str | Path) -> None:
        """Write the JSON atomically."""
        with atomic_file(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: it cannot be read, or is no plan.
        """
        return cls.from_json(read_text(path, what="plan", error=PlanError))

    def check(self, inventory: Inventory) -> None:
        """Raise PlanError, naming the module, unless the plan can be built on a model with these layers."""
        for name, choice in self.layers.items():
            inventory[name].check(choice)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the inverse of :meth:`from_dict`."""
        return {"comcat_plan": FORMAT, **asdict(self)}


def check_plan(plan: Any) -> None:
    """Raise PlanError unless ``plan`` is a plan at all."""
    if not isinstance(plan, Plan):
        raise PlanError(
            f"a plan is a comcat.Plan, not {type(plan).__name__}; make one with comcat.plan, read one with "
            "comcat.Plan.load(path), or write Plan({'blocks.0.attn': {'qk': 24}})"
        )


def full_rank_plan(model: nn.Module | Prepared, ffn: str = "low-rank") -> Plan:
    """Every rank at its full width: the compressed model computes what the dense one does, to rounding.

    It is larger than the dense model; its use is to check exactness. ``ffn`` is ``"low-rank"`` or ``"neurons"``.
    """
    if ffn not in ("low-rank", "neurons"):
        raise PlanError(f"ffn must be 'low-rank' or 'neurons', not {ffn!r}")
    layers = {}
    for layer in prepared(model).inventory.layers:
        full = dict(layer.full)
        neurons = full.pop("neurons", None)
        if ffn == "neurons" and neurons is not None:
            full = {"neurons": neurons}
        layers[layer.name] = full
    return Plan(layers, method="full-rank")
