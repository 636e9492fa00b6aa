"""What student and teacher answer: the kind and the shape of their outputs, and the unit in which they are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError
from ..evaluation.outputs import Forward, Outputs, Spread
from ..evaluation.scores import check_labels
from ..models.modes import evaluating
from ..models.profile import default_input_size
from ..models.running import explained, images_of, labels_of


@dataclass(frozen=True)
class Answers:
    """The outputs of a model.

    Attributes:
        kind: one of :data:`comcat.evaluation.outputs.KINDS`; maps of one channel (depth) are values.
        shapes: of its tensors for one image of the model's own size.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def classes(self) -> int:
        return self.shapes[0][0]

    def described(self) -> str:
        if self.kind == "classes":
            return f"{self.classes} classes"
        return f"{self.kind} of shape {' and '.join(str(shape) for shape in self.shapes)}"

    def check(self, images: Tensor, labels: Tensor) -> Tensor:
        """Labels as the loss takes them: of :func:`comcat.evaluation.scores.check_labels`, at their own resolution.

        Raises:
            DataError: they do not fit the outputs.
        """
        plane = len(self.shapes[0]) - 1
        rest = labels.shape[-plane:] if plane and labels.ndim > plane else self.shapes[0][1:]
        output = images.new_empty(()).expand(len(images), self.classes, *rest)
        return check_labels(self.kind, output, labels, "Train")


def answers_of(model: nn.Module, role: str, kind: str | None = None, forward: Forward | None = None) -> Answers:
    """The answers of a model to one image; ``forward`` as of :class:`~comcat.evaluation.outputs.Outputs`.

    Raises:
        ModelError: it does not answer in this kind, or does not run on images of the size it is made for.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *default_input_size(model), dtype=parameter.dtype, device=parameter.device)
    outputs = Outputs(model, kind, "classes", forward)
    with explained(image), torch.no_grad(), evaluating(model):
        try:
            found = outputs.run(image)
        except ModelError as error:
            raise ModelError(f"the {role} does not answer as it should: {error}") from error
    shapes = tuple(tuple(tensor.shape[1:]) for tensor in found)
    depth = outputs.kind == "maps" and shapes[0][0] == 1
    return Answers("values" if depth else str(outputs.kind), shapes)


def unit(
    answers: Answers, model: nn.Module | None, batches: Iterable[Any], forward: Forward | None = None
) -> list[Tensor] | None:
    """The spread of the answers of ``model`` to ``batches``, or of their labels; None for kinds that need none.

    Returns:
        For every tensor of the outputs (C,), of features (), in float64 on the CPU.
    """
    if answers.kind not in ("values", "features"):
        return None
    spread = Spread(answers.kind)
    for batch in batches:
        images = images_of(batch)
        if model is None:
            spread.add([answers.check(images, labels_of(batch))])
            continue
        parameter = next(model.parameters())
        images = images.to(parameter.device, parameter.dtype)
        with explained(images), torch.no_grad(), evaluating(model):
            spread.add(Outputs(model, answers.kind, forward=forward).run(images))
    found = spread.result()
    if not all(bool(torch.isfinite(one).all()) for one in found):
        raise DataError("the outputs or labels of the training images are not finite. Check the images and the weights")
    return found
