"""The encoders over photos and pictures: what they see, and every score as one value per picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ...errors import ModelError
from ...progress import Progress
from ..teaching.photos import decode
from . import metrics
from .album import Album, read_picture
from .encoders import CLIP_EXAMPLES, DINO_EXAMPLES, DualEncoder, ImageEncoder
from .judgement import CLIP, DINO

#: Encoder -> (P, N, D) of the pictures with the subject, and of those without.
Seen = Mapping[str, tuple[Tensor, Tensor]]


class Jury:
    """
    Args:
        photos: files of the subject.
        prompts: what the pictures are compared with by CLIP-T, the class in place of the subject; retained: prompts
            without the subject.

    Raises:
        ModelError: there is no encoder.
    """

    def __init__(
        self,
        encoders: Mapping[str, ImageEncoder],
        photos: Sequence[Path],
        prompts: Sequence[str],
        retained: Sequence[str],
        batch_size: int,
    ) -> None:
        self.encoders, self.batch_size = encoders, batch_size
        self.prompts, self.retained = list(prompts), list(retained)
        self.photos = {key: one.pictures(photos, decode, batch_size) for key, one in encoders.items()}
        clip = encoders.get(CLIP)
        self.texts: tuple[Tensor, Tensor] | None = None
        if isinstance(clip, DualEncoder):
            self.texts = clip.texts(self.prompts), clip.texts(self.retained)

    def see(
        self,
        album: Album,
        prompts: Sequence[str],
        seeds: Sequence[int],
        progress: Progress | None,
        stage: str,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The embeddings of an album; ``prompts`` are those that its pictures with the subject were drawn for."""
        jobs = [(prompt, seed) for prompt in (*prompts, *self.retained) for seed in seeds]
        files = [album.path(*job) for job in jobs]
        seen = {}
        for key, encoder in self.encoders.items():
            found = encoder.pictures(files, read_picture, self.batch_size, progress, stage)
            table = found.view(-1, len(seeds), found.shape[-1])
            seen[key] = (table[: len(prompts)], table[len(prompts) :])
        return seen

    def values(self, seen: Seen, base: Seen | None) -> dict[str, Tensor]:
        """Score -> (P, N); ``base`` is None for the base itself, from which nothing is kept or lost."""
        found: dict[str, Tensor] = {}
        for key, label in ((DINO, "dino"), (CLIP, "clip_i")):
            if key in seen:
                concept, rest = seen[key]
                found[label] = metrics.to_photos(concept, self.photos[key])
                if base is not None:
                    found[f"kept_{label}"] = metrics.to_pictures(rest, base[key][1])
        if self.texts is not None:
            concept, rest = seen[CLIP]
            found["clip_t"] = metrics.to_texts(concept, self.texts[0])
            found["clip_t_rest"] = metrics.to_texts(rest, self.texts[1])
            if base is not None:
                found["lost_clip_t"] = metrics.to_texts(base[CLIP][1], self.texts[1]) - found["clip_t_rest"]
        spread = metrics.diversity(seen[self.first][0])
        return found if spread is None else {**found, "diversity": spread}

    @property
    def first(self) -> str:
        """The encoder by which diversity is measured: DINO where it is there."""
        return DINO if DINO in self.encoders else CLIP

    def ceiling(self) -> dict[str, float]:
        """What the photos reach against each other."""
        labels = {DINO: "dino", CLIP: "clip_i"}
        found = {labels[key]: metrics.among_photos(x) for key, x in self.photos.items()}
        return {label: value for label, value in found.items() if value is not None}

    def other_seeds(self, base: Seen) -> dict[str, float]:
        """Mean cosine among the base's pictures of one prompt without the subject, by encoder."""
        found = {key: metrics.diversity(rest) for key, (_, rest) in base.items()}
        return {key: 1 - float(value.mean()) for key, value in found.items() if value is not None}


def open_encoders(
    dino: str | ImageEncoder | None, clip: str | DualEncoder | None, device: str | None = None
) -> dict[str, ImageEncoder]:
    """Those that are given, by ``dino`` and ``clip``.

    Raises:
        ModelError: none is given, or one cannot be opened; the message says what can be given.
    """
    if dino is None and clip is None:
        raise ModelError(
            "nothing can be measured without an encoder. Give --dino for concept fidelity "
            f"({DINO_EXAMPLES}), --clip for fidelity to the prompts ({CLIP_EXAMPLES}), or both"
        )
    found: dict[str, ImageEncoder] = {}
    if dino is not None:
        found[DINO] = ImageEncoder.open(dino, device) if isinstance(dino, str) else dino
    if clip is not None:
        found[CLIP] = DualEncoder.open(clip, device) if isinstance(clip, str) else clip
    return found
