"""A compressed model of the host's own classes: no module of comcat in it, so that its library alone loads it.

With one width per kind (``comcat.plan(..., stock=True)``) the reduced layers have a shape that the host's constructor
builds by itself. Its weights are those of the reduced layers; where the host derives the softmax scale from the narrow
width, the difference goes into the queries. Outputs are compared with those of the compressed model before anything is
written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibration.statistics import Calibration
from .compression import Report, compress
from .errors import ModelError
from .models.example import example_for, given_example
from .models.modes import evaluating
from .models.running import exact, tensors_in
from .models.source import describe
from .models.stock_forms import TimmConstructor, constructor_of, shapes_of
from .planning.plan import Plan
from .planning.stock import stock_widths
from .prepared import Prepared, prepared
from .progress import Progress
from .storage.atomic import atomic_directory, atomic_file
from .storage.owned import STOCK
from .wording import some

#: Of the largest output: how far two ways of computing the same in the model's dtype may be apart.
_ROUNDINGS = 1e4


@dataclass
class Stock:
    """What :func:`export_stock` made.

    Attributes:
        model: of the dense model's own class; settings: what its constructor was given besides.
        report: of the compressed model whose weights these are; notes: what the stock form could not take over.
    """

    model: nn.Module
    settings: dict[str, Any]
    plan: Plan
    report: Report
    notes: list[str] = field(default_factory=list)

    def save(self, path: str | Path, overwrite: bool = False, processor: str | Path | None = None) -> None:
        """Write a directory that the model's library loads by itself, with ``plan.json`` and ``report.json`` besides.

        transformers: as ``save_pretrained`` writes it, for ``AutoModel...from_pretrained(path)``. timm: in the layout
        of its hub, for ``timm.create_model("local-dir:PATH", pretrained=True)``.

        Args:
            overwrite: replace a directory that this function has written.
            processor: a ``preprocessor_config.json`` to go with a model of transformers, or the directory with it.

        Raises:
            CheckpointError: ``path`` already holds something, or cannot be written.
            ModelError: the library cannot describe the model in a file, or ``processor`` is no such file.
        """
        with atomic_directory(path, overwrite, STOCK) as stage:
            self.write(stage, processor)

    def write(self, folder: Path, processor: str | Path | None = None) -> None:
        """The files of :meth:`save`, into a directory that is there."""
        write_plain(self.model, folder, processor)
        self.plan.save(folder / "plan.json")
        document = {"settings": self.settings, "notes": self.notes, **self.report.to_dict()}
        (folder / "report.json").write_text(json.dumps(document, indent=1, default=str) + "\n")


def export_stock(
    model: nn.Module | Prepared,
    plan: Plan,
    calibration: Calibration | None = None,
    *,
    input_size: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Stock:
    """A compressed copy of the model's own class, built by its own library with narrower settings.

    Args:
        model: the dense model, of timm or transformers, or what :func:`comcat.prepare` made of it; it is not changed.
        plan: from ``comcat.plan(..., stock=True)``, or any with one width per kind: ``qk`` = ``vo`` in all attention
            layers, ``neurons`` in all FFNs.
        calibration, input_size, progress: as for :func:`comcat.compress`.

    Raises:
        PlanError: a width that the constructor cannot give, or several of one kind.
        ModelError: nothing builds this model, or what was built does not compute what the compressed model does.
        CalibrationError: the calibration belongs to another model.
    """
    ready = prepared(model, calibration)
    dense = ready.model
    plan.check(ready.inventory)
    settings = stock_widths(ready, plan)
    constructor = constructor_of(dense)
    small = compress(ready, plan, calibration, input_size=input_size, progress=progress)
    stock = constructor.build(settings)
    parameter = next(dense.parameters())
    stock = stock.to(parameter.device, parameter.dtype).train(dense.training)
    weights = {name: tensor.detach() for name, tensor in dense.state_dict().items()}
    factors = ready.factors(calibration)
    for name, choice in plan.layers.items():
        if choice:
            layer = ready.inventory[name]
            scale = _scale(layer.module) / _scale(stock.get_submodule(name))
            weights |= factors[name].weights_at(choice[layer.one_width[0]], scale)
    shapes = shapes_of(stock)
    lost = sorted(set(weights) - set(shapes))
    stock.load_state_dict({name: weights[name].to(parameter.dtype) for name in shapes})
    for own, other in zip(dense.parameters(), stock.parameters(), strict=True):
        other.requires_grad_(own.requires_grad)
    _check(ready, small, stock, lost, input_size)
    notes = []
    if lost:
        notes.append(f"the mean that reduced layers lose goes into a bias, and the stock form has no {some(lost)}")
    if isinstance(constructor, TimmConstructor):
        stock.pretrained_cfg = stock.default_cfg = copy.deepcopy(dense.pretrained_cfg)
        source = constructor.source
        stock.comcat_source = replace(source, args={**source.args, **settings})  # type: ignore[assignment]
    report: Any = small.comcat.report  # type: ignore[union-attr]
    return Stock(stock.train(dense.training), settings, plan, report, notes)


def write_plain(model: nn.Module, folder: Path, processor: str | Path | None = None) -> None:
    """A model of transformers or timm as its own library writes it, into a directory that is there.

    Raises:
        ModelError: the library cannot describe it in a file, or ``processor`` is no ``preprocessor_config.json``.
    """
    model = copy.deepcopy(model).cpu()
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        _quietly(lambda: model.save_pretrained(folder))  # type: ignore[operator]
    else:
        from timm.models._hub import save_for_hf

        source = describe(model)  # older versions of timm do not record how a model was made
        try:
            save_for_hf(model, str(folder), safe_serialization=True, model_args=source and source.args)
        except ValueError as error:
            raise ModelError(f"timm cannot describe the model in a file: {error}") from error
    if processor is not None:
        _copy_processor(Path(processor), folder)


def _scale(module: nn.Module) -> float:
    """The softmax scale, where the module keeps one; FFNs have none."""
    found = next((getattr(module, name) for name in ("scale", "scaling") if hasattr(module, name)), 1.0)
    return float(found) if isinstance(found, (int, float)) else 1.0


@torch.no_grad()
def _check(ready: Prepared, small: nn.Module, stock: nn.Module, lost: list[str], size: Sequence[int] | None) -> None:
    """Raise ModelError unless both models put out the same, up to the biases that one of them has not got."""
    for name in lost:
        where, _, _ = name.rpartition(".")
        owner: Any = small.get_submodule(where)
        getattr(owner, "linear", owner).bias.zero_()
    dtype = next(stock.parameters()).dtype
    pair = [small, stock]
    if dtype in (torch.float16, torch.bfloat16):
        pair = [copy.deepcopy(one).float() for one in pair]
    given = ready.example
    made = example_for(pair[0], ready.size(size), 2, seed=0) if given is None else given_example(given, pair[0])
    outputs = []
    for one in pair:
        with exact(made.pixels.device), evaluating(one):
            outputs.append([tensor.double() for tensor in tensors_in(made.run(one)) if tensor.is_floating_point()])
    allowed = min(_ROUNDINGS * torch.finfo(dtype).eps, 0.05)
    for wanted, got in zip(*outputs, strict=True):
        far = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-300))
        if not far <= allowed:
            raise ModelError(
                f"the stock form of {type(stock).__name__} differs from the compressed model by {far:.2g} of its "
                f"largest output, which is more than rounding ({allowed:.2g}): its class computes something that "
                "its shapes do not show. Save the compressed model with comcat.save instead"
            )


def _copy_processor(source: Path, folder: Path) -> None:
    file = source / "preprocessor_config.json" if source.is_dir() else source
    try:
        content = file.read_bytes()
        json.loads(content)
    except (OSError, ValueError) as error:
        raise ModelError(f"'{file}' is no preprocessor_config.json: {error}") from error
    with atomic_file(folder / "preprocessor_config.json") as out:
        out.write(content)


def _quietly(write: Any) -> None:
    """No progress bars of transformers."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        write()
    finally:
        if bars:
            logging.enable_progress_bar()
