"""How a model was compressed, in words: the budget, and the method that met it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BudgetError
from ..planning.choice import comparison
from ..planning.plan import Budget
from . import format as fmt
from .facts import Facts

METHODS = {
    "uniform": "the same share of every layer",
    "spectrum": "by the spectra of the layers, the component that counts most for its cost first",
    "probe": "by cutting one part of one layer at a time and measuring what it does to the outputs",
    "search": "learned: a distribution over candidate widths, trained with the budget in its loss",
    "manual": "written by hand",
    "full-rank": "every layer at its full width",
}


def method_terms(facts: Facts) -> list[tuple[str, str]]:
    """What was asked for and how it was done: pairs of a term and its words."""
    plan, record = facts.plan, facts.record
    said = METHODS.get(plan.method)
    terms = [("widths", f"{plan.method}: {said}" if said else plan.method)]
    if plan.budget:
        terms.insert(0, ("budget", budget_words(plan.budget)))
    if line := comparison(plan):
        terms.append(("chosen from", line))
    if record and record.calibration:
        weighed = ", errors weighed by output gradients (Fisher)" if record.calibration.fisher else ""
        terms.append(("calibration", f"{record.calibration.images:,} images{weighed}"))
    elif record:
        terms.append(("calibration", "none: from the weights alone"))
    return terms


def budget_words(budget: Mapping[str, Any]) -> str:
    """``{"params": 0.5, "of": "model"}`` -> ``50 % of the parameters of the model``."""
    given = {key: value for key, value in budget.items() if value is not None}
    try:
        found = Budget(**given)
    except (BudgetError, TypeError):  # edited by hand
        return ", ".join(f"{key} {value}" for key, value in given.items())
    unit = {"params": "parameters", "macs": "MACs", "latency": "time"}.get(found.unit, found.unit)
    if isinstance(found.value, float):
        whole = "model" if found.of == "model" else "compressed parts"
        return f"{100 * found.value:g} % of the {unit} of the {whole}"
    if found.unit == "latency":
        return f"at most {found.value / 1e6:g} ms for a batch"
    return f"at most {fmt.count(found.value)} {unit}"
