"""The report as one page of HTML: no script, nothing from elsewhere, light or dark as its reader has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import CalibrationError, CheckpointError, DataError, ModelError
from ..progress import Progress
from ..storage.atomic import atomic_file, check_place
from .bench_record import read_bench
from .facts import Facts, read_facts
from .page_content import Extras, page_content
from .text import printable

if TYPE_CHECKING:
    from ..calibration.statistics import Calibration
    from ..evaluation.side_by_side import Comparison

#: Name of the page beside the model.
PAGE_NAME = "report.html"


def write_report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    dense: nn.Module | None = None,
    small: nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    labelled: bool = True,
    outputs: str | None = None,
    place: str | None = None,
    names: Sequence[str] | None = None,
    calibration: Calibration | None = None,
    bench: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write one self-contained HTML page about a compressed model; it needs no network and runs no script.

    It holds what the directory knows: accuracy and cost, what every layer kept, what stayed dense and why, the method,
    and how to do it again. With the dense model there are its spectra; with images too, both models are measured on
    them, and the images on which they disagree are shown.

    Args:
        folder: a directory from :func:`comcat.save`, ``comcat compress`` or ``comcat finetune``.
        out: the file to write; ``report.html`` in ``folder`` by default.
        dense: the model that was compressed.
        small: the model in ``folder``, where it is loaded already.
        loader: batches of (images, labels), normalized for these models.
        labelled: whether ``loader`` has labels to compare with.
        outputs: what the models return, where it cannot be told: classes, labels, values, features or maps.
        place: what ``loader`` is called on the page.
        names: the classes' names in the order of the outputs; by default the model's own.
        calibration: statistics of ``dense``, so that the spectra are those of activations instead of weights.
        bench: a file of ``comcat bench --out``, whose times are shown.
        overwrite: replace a file that is there.
        progress: called as ``progress("compare", batches done, batches in all)``.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: ``folder`` is no compressed model or is damaged, ``bench`` holds no times of it, or the file
            cannot be written.
        ModelError: ``dense`` is not the model that was compressed, or one of both does not run on the images.
        DataError: images without the dense model, or none at all. CalibrationError: statistics of another model.
    """
    path = Path(folder) / PAGE_NAME if out is None else Path(out)
    check_page(path, overwrite)
    facts = read_facts(folder)
    if dense is None and loader is not None:
        raise DataError("images show where the compressed model differs from the dense one: give the dense model too")
    if dense is None and calibration is not None:
        raise CalibrationError("the statistics are those of the dense model: give the dense model too")
    extras = Extras(names=names, bench=None if bench is None else read_bench(bench, facts.report.params_after))
    if dense is not None:
        _check_dense(dense, facts)
        extras = _with_spectra(extras, dense, calibration)
        if loader is not None:
            facts, extras = _measured(facts, extras, (dense, small), loader, (labelled, outputs), place, progress)
    page = render(facts, extras)
    with atomic_file(path, overwrite) as file:
        file.write(page.encode("utf-8", "replace"))
    return path


def check_page(path: Path, overwrite: bool) -> None:
    """Raise CheckpointError, before any work is done, where the page would replace something or cannot be written."""
    if path.exists() and not overwrite:
        raise CheckpointError(f"'{path}' exists already. Choose another name or overwrite it (--overwrite)")
    check_place(path)


def render(facts: Facts, extras: Extras) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("comcat.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    return environment.get_template("page.html").render(page_content(facts, extras))


def _shown(value: Any) -> Any:
    """What a file says of itself does not act on whoever reads the page's source in a terminal."""
    return printable(value) if type(value) is str else value


def _check_dense(dense: nn.Module, facts: Facts) -> None:
    params = sum({id(p): p.numel() for p in dense.parameters()}.values())
    if params != facts.report.params_before:
        raise ModelError(
            f"the dense model has {params:,} parameters, and the one that was compressed had "
            f"{facts.report.params_before:,}; give the model that '{facts.folder}' was made from ({facts.name})"
        )


def _with_spectra(extras: Extras, dense: nn.Module, calibration: Calibration | None) -> Extras:
    from ..planning.spectra import spectra
    from .spectra_figure import summarize

    words = f"activations on {calibration.num_images:,} images" if calibration else "weights alone, no images"
    return replace(extras, spectra=summarize(spectra(dense, calibration)), spectra_of=words)


def _measured(
    facts: Facts,
    extras: Extras,
    models: tuple[nn.Module, nn.Module | None],
    loader: Iterable[Any],
    answers: tuple[bool, str | None],
    place: str | None,
    progress: Progress | None,
) -> tuple[Facts, Extras]:
    """Facts with the scores and speeds of both models on these images, and where they differ."""
    from ..evaluation.side_by_side import compare
    from ..evaluation.speed import throughput
    from ..models.opening import load_model
    from ..models.preprocessing import configure
    from ..models.running import images_of

    dense, small = models
    small = load_model(str(facts.folder)) if small is None else small
    small = small.to(next(dense.parameters()).device).eval()
    labelled, kind = answers
    found: Comparison = compare(small, dense, loader, labelled=labelled, outputs=kind, progress=progress)
    speeds = throughput([dense, small], images_of(next(iter(loader))))
    words = place or "images of yours"
    facts = replace(
        facts,
        dense=replace(facts.dense, evaluation=found.dense, speed=speeds[0]),
        small=replace(facts.small, evaluation=found.small, speed=speeds[1]),
        evaluated_on=words,
    )
    try:
        config = configure(small, {})
        pixels = (config.get("mean"), config.get("std"))
    except DataError:  # the model does not say how its images are normalized
        pixels = (None, None)
    own = facts.source.config.get("label_names") if facts.source else None
    names = extras.names or (own if isinstance(own, list | tuple) and all(isinstance(n, str) for n in own) else None)
    return facts, replace(extras, comparison=found, pixels=pixels, names=names)
