"""Photos as the training loop takes them: encoded once, in batches of one shape, in an order that the seed fixes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import TrainingError
from ...progress import Progress
from ...training.randomness import EPOCH, SAMPLE
from .families import Family
from .photos import Bucket, Photo, assign, frame, load_photo


@dataclass(frozen=True)
class PhotoExample:
    """One photo in one batch.

    Attributes:
        index: of the photo; flip: mirrored; crop: where, (top to bottom, left to right) in [0, 1].
    """

    index: int
    flip: bool
    crop: tuple[float, float]


class Photos:
    """Photos of one kind (of the concept, or of its class) and their latents.

    Args:
        shapes: the buckets. cache: encode every photo once, and its mirror image where ``flip`` is above 0.
        stream: keeps the random numbers of different kinds apart.
    """

    def __init__(
        self,
        family: Family,
        photos: Sequence[Photo],
        shapes: Sequence[Bucket],
        *,
        flip: float = 0.0,
        random_crop: bool = False,
        cache: bool = True,
        seed: int = 0,
        stream: int = 0,
    ) -> None:
        self.family, self.photos, self.cache = family, list(photos), cache
        self.flip, self.random_crop, self.seed, self.stream = flip, random_crop, seed, stream
        self.buckets = [assign(photo.size, shapes) for photo in self.photos]
        self._latents: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def encode_all(self, progress: Progress | None = None, stage: str = "encode photos") -> None:
        """Fill the cache; latents stay on the CPU."""
        if not self.cache:
            return
        wanted = list(itertools.product(range(len(self.photos)), [False, True] if self.flip else [False]))
        for done, (index, flip) in enumerate(wanted, 1):
            self._latents[index, flip] = self._encode(PhotoExample(index, flip, (0.5, 0.5)))
            if progress:
                progress(stage, done, len(wanted))

    @torch.no_grad()
    def _encode(self, example: PhotoExample) -> tuple[Tensor, Tensor]:
        photo, bucket = self.photos[example.index], self.buckets[example.index]
        image = load_photo(photo, bucket, flip=example.flip, crop=example.crop)
        mean, std = self.family.encode_images(image[None])
        if not (mean.isfinite().all() and std.isfinite().all()):
            vae = self.family.vae
            raise TrainingError(
                f"{type(vae).__name__} turns the photo {photo.path.name!r} into NaN or infinite latents in "
                f"{str(vae.dtype).removeprefix('torch.')}; use --precision bf16 or no, or give the pipeline a VAE that "
                "is whole in this precision"
            )
        return mean[0].cpu(), std[0].cpu()

    def plan(self, steps: int, batch_size: int) -> list[list[PhotoExample]]:
        """The batches of all steps: each of one shape, every photo equally often.

        Photos are dealt in rounds, each round in another order; a batch waits until its shape has enough of them.
        """
        rounds = (
            np.random.default_rng((EPOCH, self.seed, self.stream, number)).permutation(len(self.photos))
            for number in itertools.count()
        )
        waiting: dict[Bucket, list[int]] = {}
        batches: list[list[PhotoExample]] = []
        for index in itertools.chain.from_iterable(rounds):
            pile = waiting.setdefault(self.buckets[index], [])
            pile.append(int(index))
            if len(pile) == batch_size:
                batches.append([self._example(i, len(batches), place) for place, i in enumerate(pile)])
                pile.clear()
                if len(batches) == steps:
                    break
        return batches

    def _example(self, index: int, batch: int, place: int) -> PhotoExample:
        random = np.random.default_rng((SAMPLE, self.seed, self.stream, batch, place))
        flip = bool(random.random() < self.flip)
        crop = (float(random.random()), float(random.random())) if self.random_crop else (0.5, 0.5)
        return PhotoExample(index, flip, crop)

    def latents(self, batch: Sequence[PhotoExample], generator: torch.Generator) -> Tensor:
        """Samples of the photos' latents, (B, C, h, w) on the CPU."""
        moments = [self._latents[e.index, e.flip] if self.cache else self._encode(e) for e in batch]
        mean, std = (torch.stack(column) for column in zip(*moments, strict=True))
        return mean + std * torch.randn(std.shape, generator=generator)

    def captions(self, batch: Sequence[PhotoExample]) -> list[str]:
        return [self.photos[e.index].caption for e in batch]

    def time_ids(self, batch: Sequence[PhotoExample]) -> Tensor:
        """(B, 6): original size, crop, target size, as SDXL is told of them."""
        rows = [frame(self.photos[e.index].size, self.buckets[e.index], crop=e.crop).time_ids for e in batch]
        return torch.tensor(rows, dtype=torch.float32)
