"""How well a pipeline draws the digits it is asked for: a classifier of digits looks at what it generates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from comcat.errors import ComcatError

from .digits import LEFT_OUT, WORDS, prompt, real_images

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


class Classifier:
    """A support vector machine on the real training scans of all ten digits, each also shifted by a pixel.

    It knows nothing of any pipeline, trains in seconds and is the same each time.

    Raises:
        ComcatError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        try:
            from sklearn.svm import SVC
        except ImportError as e:
            raise ComcatError("the digits need another package. Install it: pip install scikit-learn") from e
        images, labels = real_images("train")
        padded = F.pad(images, (1, 1, 1, 1))
        height, width = images.shape[2:]
        shifts = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
        shifted = torch.cat([padded[:, :, y : y + height, x : x + width] for y, x in shifts])
        self._machine = SVC(C=10.0).fit(self._features(shifted), labels.repeat(len(shifts)).numpy())

    def predict(self, images: Tensor) -> Tensor:
        """The digit, (N,), that each of ``images``, (N, 3, 16, 16) in [0, 1], looks like most."""
        return torch.from_numpy(self._machine.predict(self._features(images))).long()

    @staticmethod
    def _features(images: Tensor) -> np.ndarray:
        return images.detach().float().cpu().mean(dim=1).flatten(1).numpy()  # gray


@dataclass
class Scores:
    """Percentages of generated images in which the classifier sees what the prompt asks for."""

    #: Of the concept's images, those that look like the left-out digit; NaN without a concept's prompt.
    concept: float
    #: Mean over the other nine prompts.
    retention: float
    #: The same for each of the nine.
    per_digit: dict[int, float]
    #: What was generated: the concept's (under None) and each digit's, (count, 3, 16, 16) in [0, 1].
    images: dict[int | None, Tensor] = field(repr=False)

    @property
    def details(self) -> dict[str, Any]:
        return {"per_digit": self.per_digit}


def generate(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    *,
    seed: int = 0,
    steps: int = 10,
    guidance_scale: float = 4.0,
    batch_size: int = 64,
) -> Tensor:
    """One image for each prompt, (N, 3, 16, 16) in [0, 1]; the same for the same seed, prompts and batch size."""
    generator = torch.Generator().manual_seed(seed)
    pipe.set_progress_bar_config(disable=True)
    return torch.cat(
        [
            pipe(
                prompts[i : i + batch_size],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generator,
                output_type="pt",
            )
            .images.float()
            .cpu()
            for i in range(0, len(prompts), batch_size)
        ]
    )


def score(
    pipe: StableDiffusionPipeline,
    classifier: Classifier,
    concept_prompt: str | None = None,
    left_out: int = LEFT_OUT,
    *,
    count_concept: int = 64,
    count_other: int = 16,
    seed: int = 0,
    steps: int = 10,
    guidance_scale: float = 4.0,
) -> Scores:
    """Generate and classify: ``count_concept`` images of the concept and ``count_other`` of every other digit.

    The concept's noise does not depend on ``count_other``, nor the others' on the concept.
    """
    others = [digit for digit in range(len(WORDS)) if digit != left_out]
    options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}
    images: dict[int | None, Tensor] = {}
    concept = float("nan")
    if concept_prompt is not None:
        images[None] = generate(pipe, [concept_prompt] * count_concept, seed=seed, **options)
        concept = _share(classifier, images[None], left_out)
    drawn = generate(pipe, [prompt(d) for d in others for _ in range(count_other)], seed=seed + 1, **options)
    images.update(zip(others, drawn.split(count_other), strict=True))
    per_digit = {digit: _share(classifier, images[digit], digit) for digit in others}
    return Scores(concept, sum(per_digit.values()) / len(per_digit), per_digit, images)


def _share(classifier: Classifier, images: Tensor, digit: int) -> float:
    return 100 * (classifier.predict(images) == digit).float().mean().item()
