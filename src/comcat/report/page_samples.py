"""What the page of a compressed model says of images: those on which it and the dense model disagree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .thumbnails import data_uri

if TYPE_CHECKING:
    from ..evaluation.side_by_side import Comparison, Sample

#: Mean and std by which images were normalized.
Pixels = tuple[Sequence[float] | None, Sequence[float] | None]
VERDICTS = {
    "lost": "Only the dense model is right",
    "won": "Only the compressed model is right",
    "changed": "Another answer",
}


class SampleShown(NamedTuple):
    """A sample as it is drawn: the picture, and lines of (whose answer, the answer, its probability)."""

    picture: str
    answers: list[tuple[str, str, str]]
    distance: str


def disagreements(found: Comparison, names: Sequence[str] | None, pixels: Pixels) -> dict[str, Any]:
    """How often the models disagree, and a few images of every kind of disagreement.

    Args:
        names: of the classes; pixels: mean and std by which the images were normalized.
    """
    groups = []
    for verdict, title in VERDICTS.items():
        samples = found.samples.get(verdict, [])
        if samples:
            count = found.differing.get(verdict, len(samples))
            shown = [_shown(sample, names, pixels) for sample in samples]
            groups.append({"title": title, "count": count, "verdict": verdict, "samples": shown})
    changed = sum(found.differing.values()) if found.kind == "classes" else None
    return {
        "kind": found.kind,
        "images": found.images,
        "divergence": f"{found.divergence:.4g}",
        "changed": changed,
        "share": f"{100 * changed / found.images:.2f}" if changed is not None else None,
        "groups": groups,
    }


def _shown(sample: Sample, names: Sequence[str] | None, pixels: Pixels) -> SampleShown:
    answers = []
    if sample.dense is not None and sample.small is not None:
        for who, (number, probability) in (("dense", sample.dense), ("small", sample.small)):
            answers.append((who, class_name(number, names), f"{100 * probability:.0f} %"))
        if sample.label is not None:
            answers.append(("truth", class_name(sample.label, names), ""))
    return SampleShown(data_uri(sample.image, *pixels), answers, f"{sample.divergence:.3g}")


def class_name(number: int, names: Sequence[str] | None) -> str:
    """The name of a class, or ``class 3``."""
    return names[number] if names is not None and 0 <= number < len(names) else f"class {number}"
