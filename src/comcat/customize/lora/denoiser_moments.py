"""Second moments of the inputs of attention layers, which say what directions of a product matter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...hosts.addable import AddableAttention
from ...layers.heads import unwrapped
from ...layers.recording import Moment
from ...linalg.factorize import whitening
from ...models.running import double
from ...progress import Progress
from ..adapter.attached import Adapter
from ..adapter.components import components, find_addable
from ..generation import generate
from .forms import ProductName

#: (component, attention, part) -> roots of the moments of its left and right inputs, E[x^T x] = root^T root, or None.
Roots = Callable[..., tuple[Tensor | None, Tensor | None]]

#: Of the mean eigenvalue, which keeps directions that these few images did not show from being given away.
SHARE = 1e-4


def no_roots(
    component: str, attention: AddableAttention, part: ProductName, key_bias: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """All directions of the inputs count alike."""
    return None, None


class InputMoments:
    """E[x^T x] of what the query and value projections of an adapter's layers see while images are drawn.

    Streams of tokens are stacked as in :mod:`comcat.customize.lora.forms`, a bias row as a constant 1.
    """

    def __init__(self, handle: Adapter) -> None:
        self._moments: dict[tuple[str, str], Moment] = {}
        self._handle = handle

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Gather while the context lasts."""
        models = components(self._handle.pipe)
        found = {component: find_addable(component, models[component])[0] for component in self._handle.ranks}
        with contextlib.ExitStack() as stack:
            for component, name in self._handle.layers:
                attention = found[component][name]
                for projection in {path for stream in attention.streams for path in (stream.query, stream.key)}:
                    moment = self._moments.setdefault((component, f"{name}.{projection}"), Moment())
                    hook = attention.linear(projection).register_forward_pre_hook(_adds_to(moment))
                    stack.callback(hook.remove)
            yield

    def roots(
        self, component: str, attention: AddableAttention, part: ProductName, key_bias: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """For :func:`comcat.customize.lora.exporting.as_lora`."""

        def root(path: str, bias_of: str, with_bias: bool = True) -> Tensor:
            moment = self._moments[component, f"{attention.name}.{path}"]
            biased = with_bias and unwrapped(attention.linear(bias_of)).bias is not None
            return whitening(_with_ones(moment) if biased else moment.second, SHARE)

        if part == "vo":
            return torch.block_diag(*[root(s.key, s.value) for s in attention.streams]), None
        left = [root(s.query, s.query) for s in attention.streams]
        right = [root(s.key, s.key, key_bias) for s in attention.streams]
        return torch.block_diag(*left), torch.block_diag(*right)


def _adds_to(moment: Moment) -> Any:
    def add(_: Any, args: tuple[Tensor, ...]) -> None:
        moment.add(double(args[0].detach().flatten(0, -2)))

    return add


def _with_ones(moment: Moment) -> Tensor:
    """The second moment (n + 1, n + 1) of [x, 1]."""
    mean = moment.mean.unsqueeze(0)
    return torch.cat([torch.cat([moment.second, mean.mT], 1), torch.cat([mean, mean.new_ones(1, 1)], 1)])


def record(
    handle: Adapter, prompts: Sequence[str], *, images: int = 2, steps: int = 10, progress: Progress | None = None
) -> InputMoments:
    """Draw a few images with the adapter on and gather the moments of its layers' inputs."""
    moments = InputMoments(handle)
    with moments.recording():
        generate(
            handle.pipe,
            prompts,
            seeds=range(images),
            steps=steps,
            batch_size=1,
            progress=progress,
            stage="record inputs",
        )
    return moments
