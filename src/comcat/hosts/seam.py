"""What stands between the calls of an attention module's own forward, with nothing of the host changed.

    x --> to_q, to_k, to_v --> norms, rotary embedding, ... --> q, k, v --> ONE CALL --> z --> to_out --> out

The module's forward, and its processor where it has one, run on a *view* of the module: its linear layers tell what
they are given and give, and the call in which queries, keys and values meet goes through :meth:`Pass.meet`. Whatever
else lies between (masks, text streams, caches, which back-end) is the host's own. Where the call is:

| call | models |
|---|---|
| ``dispatch_attention_fn`` | most transformers of diffusers |
| ``F.scaled_dot_product_attention`` | UNets, SD 3, PixArt, SANA, Lumina, CogView, AuraFlow, ... |
| ``xformers.ops.memory_efficient_attention`` | UNets with xFormers |
| ``attn.get_attention_scores`` | UNets with plain or sliced attention, where the values follow later |
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rebound import module_with, rebound_methods, with_methods

#: Axes of queries, keys and values: (B, N, H, d), (B, H, N, d), or (B H, N, d).
Layout = Literal["tokens", "heads", "flat"]
Attend = Callable[..., Tensor]


class Pass:
    """One pass through an attention module. Subclasses look at it, or change it.

    Attributes:
        taps: paths of the linear layers whose calls come to :meth:`call`; holders: of the modules that they are in.
    """

    taps: frozenset[str] = frozenset()
    holders: frozenset[str] = frozenset()

    def call(self, path: str, linear: Any, x: Tensor) -> Tensor:
        """The output of a linear layer for ``x``."""
        raise NotImplementedError

    def meet(
        self, attend: Attend, layout: Layout, q: Tensor, k: Tensor, v: Tensor, args: Sequence[Any], kwargs: Any
    ) -> Tensor:
        """The output of the attention; ``attend(q, k, v, *args, **kwargs)`` is the host's way."""
        raise NotImplementedError

    def scores(self, attn: Any, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """The probabilities (b, N, M) of some of the heads, q (b, N, d), k (b, M, d)."""
        raise NotImplementedError

    def bmm(self, bmm: Attend, a: Tensor, b: Tensor) -> Tensor:
        """A batched product of two matrices, for those who look for the one of probabilities and values."""
        return bmm(a, b)


def holders(taps: Iterable[str]) -> frozenset[str]:
    """The paths of all modules that hold one of these."""
    return frozenset(path[:i] for path in taps for i, letter in enumerate(path) if letter == ".")


class Seam:
    """The forward of an attention module of this class, with this processor, ready to run on a view of the module.

    Args:
        cls: the class of the module, the host's own.
        processor: the object that it calls, or None.
        products: whether batched products are told too (:meth:`Pass.bmm`).
    """

    def __init__(self, cls: type, processor: Any, products: bool = False) -> None:
        self._made_of = (cls, processor, products)
        self._running: dict[int, Pass] = {}  # by thread: models are shared between threads
        own_xformers = types.SimpleNamespace(memory_efficient_attention=self._xformers)
        replaced: dict[tuple[str, str], Any] = {
            ("dispatch_attention_fn", ""): self._dispatch,
            ("F", "scaled_dot_product_attention"): module_with(F, scaled_dot_product_attention=self._sdpa),
            ("xformers", "memory_efficient_attention"): types.SimpleNamespace(ops=own_xformers),
        }
        if products:
            replaced["torch", "bmm"] = module_with(torch, bmm=self._bmm)
        self.methods = rebound_methods(cls, replaced)
        self.methods.setdefault("forward", cls.forward)  # type: ignore[attr-defined]
        self.methods["get_attention_scores"] = self._scores
        self.processor = processor
        if processor is not None:
            self.processor = with_methods(processor, rebound_methods(type(processor), replaced))

    def __deepcopy__(self, memo: dict[int, Any]) -> Seam:
        cls, processor, products = self._made_of
        return Seam(cls, copy.deepcopy(processor, memo), products)

    def __reduce__(self) -> Any:
        return Seam, self._made_of

    def run(self, one: Pass, module: nn.Module, args: Sequence[Any], kwargs: Any) -> Any:
        """``module(*args, **kwargs)``, told to ``one``."""
        key = _thread()
        before = self._running.get(key)
        self._running[key] = one
        try:
            return self.methods["forward"](View(module, one, "", self), *args, **kwargs)
        finally:
            if before is None:
                del self._running[key]
            else:
                self._running[key] = before

    def _dispatch(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return self._running[_thread()].meet(dispatch_attention_fn, "tokens", query, key, value, args, kwargs)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attend = F.scaled_dot_product_attention
        return self._running[_thread()].meet(attend, "heads", query, key, value, args, kwargs)

    def _xformers(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layout: Layout = "flat" if query.ndim == 3 else "tokens"
        return self._running[_thread()].meet(_memory_efficient, layout, query, key, value, args, kwargs)

    def _scores(self, view: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self._running[_thread()].scores(view.module, query, key, attention_mask)

    def _bmm(self, input: Tensor, mat2: Tensor) -> Tensor:
        return self._running[_thread()].bmm(torch.bmm, input, mat2)


def _thread() -> int:
    """Whose pass it is; a compiled graph has no passes of its own."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _memory_efficient(*args: Any, **kwargs: Any) -> Tensor:
    import xformers.ops  # type: ignore[import-not-found]

    found: Tensor = xformers.ops.memory_efficient_attention(*args, **kwargs)
    return found


class View:
    """A module as its own forward sees it while one pass lasts: tapped linear layers, and the rest as it is."""

    def __init__(self, module: nn.Module, one: Pass, path: str, seam: Seam | None = None) -> None:
        self.module: Any = module
        self.one = one
        self.path = path
        self.seam = seam

    def __getattr__(self, name: str) -> Any:
        if self.seam is not None:
            if name == "processor" and self.seam.processor is not None:
                return self.seam.processor
            if name in self.seam.methods:
                return functools.partial(self.seam.methods[name], self)
        return self._child(name, getattr(self.module, name))

    def __getitem__(self, index: int) -> Any:
        return self._child(str(index % len(self.module)), self.module[index])

    def __iter__(self) -> Iterator[Any]:
        for name, child in self.module.named_children():
            yield self._child(name, child)

    def __len__(self) -> int:
        return len(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self, *args, **kwargs)

    def _child(self, name: str, child: Any) -> Any:
        path = self.path + name
        if path in self.one.taps:
            return Tap(child, self.one, path)
        return View(child, self.one, f"{path}.") if path in self.one.holders else child


class Tap:
    """A linear layer whose calls are told."""

    def __init__(self, linear: nn.Module, one: Pass, path: str) -> None:
        self.linear = linear
        self.one = one
        self.path = path

    def __call__(self, x: Tensor) -> Tensor:
        return self.one.call(self.path, self.linear, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.linear, name)


def to_tokens(t: Tensor, layout: Layout, heads: int) -> Tensor:
    """(B, N, H, d) from any layout."""
    if layout == "flat":
        t = t.unflatten(0, (-1, heads))
    return t if layout == "tokens" else t.transpose(1, 2)


def from_tokens(t: Tensor, layout: Layout) -> Tensor:
    """The layout from (B, N, H, d)."""
    if layout == "tokens":
        return t
    t = t.transpose(1, 2)
    return t.flatten(0, 1) if layout == "flat" else t
