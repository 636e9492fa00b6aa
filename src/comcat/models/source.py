"""Where a model's architecture comes from: the plain data from which its library builds it again without weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..errors import CheckpointError
from .libraries import library, library_of
from .library import image_config
from .unfilled import building
from .versions import check_versions


@dataclass(frozen=True)
class Source:
    """What builds the dense architecture.

    Attributes:
        name: an architecture, class or builder of the library.
        args: its arguments, plain data.
        config: the data config in the words of timm (``mean``, ``std``, ``interpolation``, ``label_names``, ...).
        library: a name of :data:`comcat.models.libraries.NAMES`.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    library: str = "timm"

    def check(self) -> None:
        """Raise CheckpointError unless the library knows the architecture and it takes these arguments.

        Raises:
            ModelError: timm or PyTorch is too old to be safe.
        """
        check_versions()
        library(self.library).check(self)

    def build(self, meta: bool = False) -> nn.Module:
        """The dense architecture with fresh weights; with ``meta``, its shapes alone, which takes no memory.

        The generator of random numbers is left as it was.
        """
        self.check()
        try:
            with building(meta):
                return library(self.library).make(self)
        except Exception as error:  # whatever an architecture raises for arguments that do not go together
            args = str(self.args)
            args = args if len(args) <= 300 else f"{args[:300]} ..."
            raise CheckpointError(f"{self.library} cannot build '{self.name}' with {args}: {error}") from error

    def following(self, model: nn.Module, dense: bool = False) -> Source:
        """This source with the arguments that have changed since, such as the classes or the image size.

        Args:
            dense: the model's layers are as the architecture builds them, so that their widths can be read off too.
        """
        return library(self.library).following(self, model, dense)

    def current(self, model: nn.Module) -> Source:
        """This source with the image size and classes that the model has now."""
        now = image_config(model, library(self.library))
        kept = {key: value for key, value in now.items() if key in ("input_size", "num_classes")}
        return replace(self, config={**self.config, **kept})


def recorded_source(model: nn.Module) -> Source | None:
    """What comcat noted on the model when it made, loaded or compressed it."""
    found = getattr(getattr(model, "comcat", None), "source", None) or getattr(model, "comcat_source", None)
    return found if isinstance(found, Source) else None


def describe(model: nn.Module) -> Source | None:
    """The source of a dense model: recorded when comcat made it, else read off by its library; None if neither.

    What is read off is compared with the architecture's defaults; :func:`comcat.save` checks that it is enough.
    """
    made = getattr(model, "comcat_source", None)
    home = library(made.library) if isinstance(made, Source) else library_of(model)
    if home is None:
        return None
    config = image_config(model, home)
    if isinstance(made, Source):
        return replace(made, config={**config, **made.config}).current(model).following(model, dense=True)
    found = home.describe(model)
    return None if found is None else replace(found, config=config).following(model, dense=True)
