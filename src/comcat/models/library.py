"""One library of models, as comcat sees it: what opens, describes and builds its models again.

Adding a library is a file with a subclass of :class:`Library` and one line in :mod:`comcat.models.libraries`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..errors import ModelError
from .profile import default_input_size
from .weights import fill

if TYPE_CHECKING:
    from .source import Source


@dataclass(frozen=True)
class Wanted:
    """What a user asked for.

    Attributes:
        name: as it was typed, without the library's prefix.
        checkpoint: a safetensors file with the weights.
        args: arguments of the architecture.
        pretrained: whether to load pretrained weights where no checkpoint is given.
    """

    name: str
    checkpoint: Path | None
    args: dict[str, Any]
    pretrained: bool


class Library(ABC):
    """How models of one library are opened, described as plain data, and built again from it.

    A description comes from a file that somebody may have sent: :meth:`check` trusts nothing in it, and :meth:`make`
    neither runs code that it names nor follows addresses or paths in it.

    Attributes:
        name: of the library, in files and before the slash of a typed name (``torchvision/vit_b_16``).
        advice: what helps where a model cannot be built again from what was read off.
    """

    name: ClassVar[str]
    advice: ClassVar[str]

    # -- a description -------------------------------------------------------------------------------------------

    @abstractmethod
    def owns(self, model: nn.Module) -> bool:
        """Whether the model is one of this library; must not import it for the question."""

    @abstractmethod
    def describe(self, model: nn.Module) -> Source | None:
        """Name and arguments of a dense model, read off; None where they cannot be. ``save`` proves them."""

    @abstractmethod
    def check(self, source: Source) -> None:
        """Raise CheckpointError unless ``source`` is one that this library builds, of a sane size."""

    @abstractmethod
    def make(self, source: Source) -> nn.Module:
        """The dense architecture on the current default device, after :meth:`check`; may raise anything."""

    def following(self, source: Source, model: nn.Module, dense: bool) -> Source:
        """``source`` with the arguments that have changed since; ``dense``: no layer has been made smaller."""
        return source

    def decoded(self, args: Any) -> Any:
        """Arguments as the library takes them, from what JSON holds."""
        return args

    def filled(self, source: Source, tensors: dict[str, Tensor], place: Path) -> nn.Module:
        """The dense architecture with weights that were read from ``place``.

        Raises:
            ModelError: they are not its own.
        """
        model = source.build()
        fill(model, tensors, place, "give the weights of the dense model that this one was made from")
        return model

    # -- a model at hand -----------------------------------------------------------------------------------------

    def num_classes(self, model: nn.Module) -> int | None:
        """Outputs of the classifier; 0 where the model has none, None where it does not say."""
        found = getattr(model, "num_classes", None)
        return found if isinstance(found, int) else None

    def data_config(self, model: nn.Module) -> dict[str, Any]:
        """What the model at hand says of its images, in the words of timm: ``mean``, ``std``, ``crop_pct``, ..."""
        return {}

    # -- images and text -----------------------------------------------------------------------------------------

    def both_towers(self, files: Mapping[str, Any]) -> dict[str, Any] | None:
        """Arguments that open both towers of a dual encoder, by its configuration files; None where it is none."""
        return None

    def tokenizer(self, model: nn.Module, folder: Path | None, name: str) -> Callable[[list[str]], Any]:
        """What makes tokens of prompts: (n, length), or a dictionary of the text tower's arguments.

        Args:
            folder: the directory that the model is from, if it is from one; name: as it was typed.

        Raises:
            ModelError: there is none beside the model.
        """
        raise ModelError(f"'{name}' has no tokenizer; name a model of images and text")

    def tower_is_projected(self, model: nn.Module) -> bool:
        """Whether the image tower of a dual encoder has its projection when it is opened alone."""
        return False

    # -- opening -------------------------------------------------------------------------------------------------

    def reads(self, files: Mapping[str, Any]) -> bool:
        """Whether a directory is one of this library, by its configuration files (:data:`opening.CONFIGS`)."""
        return False

    #: Names of the weight files in a Hub repository of this library, as patterns.
    weights: ClassVar[tuple[str, ...]] = ()

    def open_directory(self, folder: Path, wanted: Wanted) -> nn.Module:
        """The model in a directory that :meth:`reads` accepts.

        Raises:
            ModelError: what is missing or wrong there.
        """
        raise NotImplementedError

    @abstractmethod
    def open(self, wanted: Wanted) -> nn.Module:
        """A model by its name in this library.

        Raises:
            ModelError: unknown name or arguments, weights that cannot be had or do not fit.
        """


def image_config(model: nn.Module, library: Library) -> dict[str, Any]:
    """The data config with what every model says: image size and number of classes."""
    config = {**library.data_config(model), "input_size": default_input_size(model)}
    classes = library.num_classes(model)
    return config if classes is None else {**config, "num_classes": classes}
