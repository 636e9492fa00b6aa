"""What came of a judgement: scores with their uncertainty, costs, and what could not be measured and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .album import DrawingCost
from .metrics import Estimate

DINO, CLIP = "dino", "clip"


class ScoreKind(NamedTuple):
    """
    Attributes:
        needs: the encoders that it takes, of which one is enough where ``either``.
        better: 1 where more is better, -1 where less is, 0 where neither is: what has learned nothing is diverse.
    """

    label: str
    needs: tuple[str, ...]
    meaning: str
    better: int = 1
    either: bool = False


KINDS: dict[str, ScoreKind] = {
    "dino": ScoreKind("DINO", (DINO,), "cosine to the photos"),
    "clip_i": ScoreKind("CLIP-I", (CLIP,), "cosine to the photos"),
    "clip_t": ScoreKind("CLIP-T", (CLIP,), "cosine of picture and prompt, the class in place of the word"),
    "kept_dino": ScoreKind("kept DINO", (DINO,), "cosine to the base's picture of the same prompt and seed"),
    "kept_clip_i": ScoreKind("kept CLIP-I", (CLIP,), "the same"),
    "lost_clip_t": ScoreKind("lost CLIP-T", (CLIP,), "CLIP-T of the base less that of the adapter", -1),
    "diversity": ScoreKind("diversity", (DINO, CLIP), "1 - cosine among pictures of a prompt", 0, True),
}


@dataclass(frozen=True)
class JudgedRow:
    """The base, or an adapter.

    Attributes:
        scores: by the names of :data:`KINDS`, and ``clip_t_rest``, the CLIP-T of the prompts without the subject.
        per_prompt: means over the seeds, in the order of the prompts.
        best: scores in which no other adapter is measurably better; none where there is one adapter, or one value.
        bytes: of its file; train_seconds: where the file says; cost: of drawing its pictures.
        speed: seconds of a picture over those of the base, where both were drawn on one device in batches of one size.
    """

    name: str
    subject: str
    scores: dict[str, Estimate]
    per_prompt: dict[str, list[float]]
    cost: DrawingCost
    best: tuple[str, ...] = ()
    bytes: int | None = None
    train_seconds: float | None = None
    speed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "subject": self.subject,
            "scores": {name: found.to_dict() for name, found in self.scores.items()},
            "best": list(self.best),
            "per_prompt": self.per_prompt,
            "bytes": self.bytes,
            "train_seconds": self.train_seconds,
            "draw_seconds": self.cost.per_picture,
            "draw_seconds_over_base": self.speed,
            "peak_bytes": self.cost.peak_bytes,
            "device": self.cost.device,
            "flagged": len(self.cost.flagged),
        }


@dataclass(frozen=True)
class Judgement:
    """
    Attributes:
        rows: the base first.
        ceiling: what the photos themselves reach in ``dino`` and ``clip_i``, each against all others.
        other_seeds: how like each other the base's own pictures without the subject are at different seeds, by encoder;
            the values of ``kept_...`` are read against it.
        missing: label of a score that was not measured -> why.
        prompts: with {} for the subject; retention_prompts: without it.
    """

    base: str
    class_word: str
    photos: int
    rows: tuple[JudgedRow, ...]
    ceiling: dict[str, float]
    other_seeds: dict[str, float]
    missing: dict[str, str]
    encoders: dict[str, str]
    prompts: tuple[str, ...]
    retention_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    drawing: Mapping[str, Any] = field(default_factory=dict)

    def row(self, name: str) -> JudgedRow:
        """The row of this name; KeyError if there is none."""
        return {row.name: row for row in self.rows}[name]

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "class_word": self.class_word,
            "photos": self.photos,
            "encoders": self.encoders,
            "drawing": dict(self.drawing),
            "seeds": list(self.seeds),
            "prompts": list(self.prompts),
            "retention_prompts": list(self.retention_prompts),
            "scores": {name: f"{kind.label}: {kind.meaning}" for name, kind in KINDS.items()},
            "intervals": "95 %, bootstrap over prompts and over seeds within each",
            "missing": self.missing,
            "ceiling": self.ceiling,
            "other_seeds": self.other_seeds,
            "rows": [row.to_dict() for row in self.rows],
        }


def missing_scores(encoders: Mapping[str, Any], seeds: int) -> dict[str, str]:
    """Label -> why, of the scores that these encoders and this many pictures a prompt do not give."""
    found = {}
    for name, kind in KINDS.items():
        lacking = [f"--{key}" for key in kind.needs if key not in encoders]
        if len(lacking) > (len(kind.needs) - 1 if kind.either else 0):
            found[kind.label] = f"needs {' or '.join(lacking)}"
        elif name == "diversity" and seeds < 2:
            found[kind.label] = "needs two seeds"
    return found
