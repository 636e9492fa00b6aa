"""Second moments of the inputs of attention layers, which say what directions of a product matter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...hosts.seam import Site
from ...progress import Progress
from ..adapter.attached import Adapter
from ..adapter.components import denoiser, find_sites, text_encoders
from ..generation import generate
from .forms import Part, base

#: (component, site, part) -> roots of the moments of its left and right inputs, E[x^T x] = root^T root, or None.
Roots = Callable[..., tuple[Tensor | None, Tensor | None]]


def no_roots(component: str, site: Site, part: Part, key_bias: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """All directions of the inputs count alike."""
    return None, None


class InputMoments:
    """E[x^T x] of what the query and value projections of an adapter's layers see while images are drawn.

    Streams of tokens are stacked as in :mod:`comcat.customize.lora.forms`, a bias row as a constant 1.
    """

    def __init__(self, handle: Adapter) -> None:
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._handle = handle

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Gather while the context lasts."""
        pipe, hooks = self._handle.pipe, []
        models = {denoiser(pipe)[0]: denoiser(pipe)[1], **text_encoders(pipe)}
        for component, name in self._handle.layers:
            site = find_sites(component, models[component])[0][name]
            for stream in site.streams:
                for projection in dict.fromkeys((stream.query, stream.key)):
                    key = (component, f"{name}.{projection}")
                    hooks.append(site.linear(projection).register_forward_pre_hook(self._hook(key)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, key: tuple[str, str]) -> Any:
        def add(_: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).double()
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            self._sums[key] = self._sums.get(key, 0) + x.T @ x
            self._counts[key] = self._counts.get(key, 0) + len(x)

        return add

    def roots(
        self, component: str, site: Site, part: Part, key_bias: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """For :func:`comcat.customize.lora.exporting.as_lora`."""
        names = [s.query if part == "qk" else s.key for s in site.streams]
        biases = [s.query if part == "qk" else s.value for s in site.streams]
        left = [
            self._root(component, site, n, base(site.linear(b)).bias is not None)
            for n, b in zip(names, biases, strict=True)
        ]
        right = [
            self._root(component, site, s.key, key_bias and base(site.linear(s.key)).bias is not None)
            for s in site.streams
            if part == "qk"
        ]
        return torch.block_diag(*left), torch.block_diag(*right) if right else None

    def _root(self, component: str, site: Site, projection: str, bias: bool) -> Tensor:
        key = (component, f"{site.name}.{projection}")
        moment = self._sums[key] / self._counts[key]
        if not bias:
            moment = moment[:-1, :-1]
        values, vectors = torch.linalg.eigh(moment)
        # A share of the mean keeps directions that these few images did not show from being given away.
        values = values.clamp(min=0) + 1e-4 * values.clamp(min=0).mean()
        return values.sqrt().unsqueeze(-1) * vectors.T


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
