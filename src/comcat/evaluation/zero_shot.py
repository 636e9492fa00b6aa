"""Zero-shot classification: the classes are texts, and an image is of the class whose text is nearest.

    zero_shot = comcat.ZeroShot.open("clip/", ["cat", "dog"], ["a photo of a {}", "a drawing of a {}"])
    comcat.evaluate(small, loader, zero_shot=zero_shot).top1

A class is the mean of the normalized embeddings of its prompts, normalized again; logits are cosines times the model's
own scale. Source: Radford et al., arXiv 2103.00020, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError, ModelError
from ..models.dual_encoder import has_text_tower, image_features, open_dual_encoder, projected, scale_of, text_features
from ..models.modes import evaluating
from ..wording import some
from .outputs import Forward

#: Prompts that are embedded at a time.
_BATCH = 256
Tokenize = Callable[[list[str]], Any]


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """Classes as text, for models of images and text (transformers, open_clip) and for image towers of them.

    Attributes:
        names: of the classes, in the order of the labels; templates: of the prompts, each with one ``{}``.
        tokens: arguments of the text tower by name, (templates * classes, length) each.
        text: embeddings of the classes, (classes, D), and the scale of the logits, of a text tower that the evaluated
            model lacks; None where they are of its own tower.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    tokens: Mapping[str, Tensor]
    text: tuple[Tensor, float] | None = None

    @classmethod
    def open(
        cls, name: str, names: Sequence[str], templates: Sequence[str], device: torch.device | str | None = None
    ) -> ZeroShot:
        """From a model of images and text with its tokenizer: a directory, or a Hub repository, as ``load_model`` has.

        Args:
            device: where texts are embedded; the CPU by default.

        Raises:
            ModelError: it has no text tower, or no tokenizer beside it.
            DataError: no classes, one of no name, or templates without their ``{}``.
        """
        _prompts(names, templates)
        model, tokenize = open_dual_encoder(name)
        return cls.of(model.to(device), tokenize, names, templates)

    @classmethod
    def of(cls, model: nn.Module, tokenize: Tokenize, names: Sequence[str], templates: Sequence[str]) -> ZeroShot:
        """From a model of images and text in memory.

        Args:
            tokenize: prompts to tokens (n, length), or to a dictionary of the arguments of the text tower.

        Raises:
            DataError: no classes, one of no name, or templates without their ``{}``.
        """
        prompts = _prompts(names, templates)
        found = tokenize(prompts)
        tokens = {"input_ids": found} if isinstance(found, Tensor) else dict(found)
        made = cls(tuple(names), tuple(templates), tokens)
        if not projected(model):
            return made  # its image tower alone has no use for them
        return replace(made, text=(made.embeddings(model), scale_of(model)))

    def embeddings(self, model: nn.Module) -> Tensor:
        """The classes as the text tower of ``model`` has them, (classes, D) of length one."""
        parameter = next(model.parameters())
        count = len(self.names) * len(self.templates)
        parts = []
        with evaluating(model), torch.no_grad():
            for start in range(0, count, _BATCH):
                batch = {k: t[start : start + _BATCH].to(parameter.device) for k, t in self.tokens.items()}
                parts.append(F.normalize(text_features(model, batch).float(), dim=-1))
        found = torch.cat(parts)
        if not bool(torch.isfinite(found).all()):
            raise ModelError("the text tower returns NaN or infinite values. Check its weights")
        return F.normalize(found.view(len(self.templates), len(self.names), -1).mean(0), dim=-1)

    def classifier(self, model: nn.Module) -> Forward:
        """A call of ``model`` that returns (B, classes) logits: with its own text tower, or with ``text``.

        Raises:
            ModelError: it has no text tower and ``text`` is not there.
        """
        if has_text_tower(model):
            classes, scale = self.embeddings(model), scale_of(model)
        elif self.text is not None:
            classes, scale = self.text
        else:
            raise ModelError(
                f"{type(model).__name__} has no text tower, and the model that the classes were embedded with has a "
                "projection of its images that an image tower lacks; evaluate the whole model, for transformers with "
                "--model-arg architecture=NAME"
            )

        def logits(model: nn.Module, images: Tensor) -> Tensor:
            found = image_features(model, images).float()
            if found.ndim != 2 or found.shape[1] != classes.shape[1]:
                raise ModelError(
                    f"{type(model).__name__} returns features {tuple(found.shape[1:])} and its classes are embedded in "
                    f"{classes.shape[1]} numbers; name the model of images and text that it belongs to"
                )
            return scale * F.normalize(found, dim=-1) @ classes.to(found.device).T

        return logits


def _prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise DataError(f"a template holds {{}} once, in place of the class, as 'a photo of a {{}}'; not {some(wrong)}")
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError("every class needs a name to be asked for; give all of them, in the order of the labels")
    return [template.replace("{}", name) for template in templates for name in names]
