"""Scores of the user's own: a function of a model and a loader that returns a number, or several by name.

def mean_depth_error(model, loader):
    return sum(float((model(x) - y).abs().mean()) for x, y in loader) / len(loader)

comcat.evaluate(model, loader, evaluate=mean_depth_error).metrics      # {"mean_depth_error": 0.31}
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ComcatError, MetricError

Metric = Callable[[nn.Module, Iterable[Any]], Any]


class CountedBatches:
    """A loader that counts the images which were read from it last."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.images = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        self.images = 0
        for batch in self.loader:
            self.images += _count(batch)
            yield batch


def scores(metric: Metric, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    """What ``metric(model, loader)`` returns, by name; a single number has the name of the function.

    Raises:
        MetricError: it raises, or returns no finite number.
    """
    name = name_of(metric)
    try:
        found = metric(model, loader)
    except ComcatError:
        raise
    except Exception as error:
        raise MetricError(f"the metric '{name}' raised {type(error).__name__}: {error}. Correct it") from error
    values = found if isinstance(found, Mapping) else {name: found}
    if not values:
        raise MetricError(f"the metric '{name}' returned no score. Return a number, or a dictionary of them")
    return {str(label): _number(name, str(label), value) for label, value in values.items()}


def name_of(metric: Metric) -> str:
    """How a metric is called in tables and messages."""
    return str(getattr(metric, "__name__", type(metric).__name__))


def load_metric(text: str) -> Metric:
    """The function that ``module:function`` names, of a module in the working directory, which is executed.

    Raises:
        MetricError: no such module or function, or the module raises when it is imported.
    """
    module, _, function = text.partition(":")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise MetricError(f"{text!r} names no metric: give module:function, e.g. my_metrics:depth_error")
    here = str(Path.cwd())
    root = module.partition(".")[0]
    found = PathFinder.find_spec(root, [here])
    known = sys.modules.get(root)
    if found is None or (known is not None and getattr(known, "__file__", None) != found.origin):
        raise MetricError(
            f"there is no module '{root}' in the working directory {here}"
            + ("" if found is None else ", or rather, its name is taken by another; rename it")
            + f". Write {root}.py there, with a function {function}(model, loader)"
        )
    if here not in sys.path:
        sys.path.insert(0, here)  # and stays: the metric may import others when it is called
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        raise MetricError(f"the module of the metric '{text}' raised {type(error).__name__}: {error}") from error
    metric = getattr(loaded, function, None)
    if not callable(metric):
        raise MetricError(f"'{module}' has no function '{function}'; it is called as {function}(model, loader)")
    return metric


def _number(metric: str, label: str, value: Any) -> float:
    where = f"the metric '{metric}'" + (f" returned, as '{label}'," if label != metric else " returned")
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError) as error:
        raise MetricError(f"{where} {type(value).__name__}, which is no number. Return a float") from error
    if isinstance(value, (str, bytes)):
        raise MetricError(f"{where} {value!r}, which is no number. Return a float")
    if not math.isfinite(number):
        raise MetricError(f"{where} {number}, which is no score. Check it on this model and data")
    return number


def _count(batch: Any) -> int:
    """Images of a batch, whatever it is."""
    entries: list[Any] = [batch]
    if isinstance(batch, Mapping):
        entries = list(batch.values())
    elif isinstance(batch, (tuple, list)):
        entries = list(batch)
    return next((len(entry) for entry in entries if isinstance(entry, Tensor) and entry.dim()), 0)
