"""A small stand-in for an attention module, to see what it does with its inputs: the host's own forward in float64.

Linear layers are random and sparse (each output sums a few inputs), norms and the like random, so that a layer of any
size costs milliseconds; weights are never looked at, wherever they lie. What the module is given is made up from the
names of its arguments.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.carries import Carries
from ..nn.derived import original_class
from .seam import Attend, Layout, Pass, Seam, holders, to_tokens

BATCH, TOKENS, CONTEXT = 2, 3, 2
#: How many inputs a sparse layer sums for each of its outputs.
_TERMS = 3
#: Where a host takes the first tokens of the context away and has a number of its own for the rest (Wan).
_LONG = 514


class Sparse(nn.Module):
    """A random linear layer whose weight is never formed."""

    def __init__(self, linear: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features = int(linear.in_features), int(linear.out_features)
        self.source = torch.randint(max(self.in_features, 1), (self.out_features, _TERMS), generator=generator)
        self.factor = torch.randn(self.out_features, _TERMS, generator=generator, dtype=torch.float64)
        self.weight = self.factor.new_zeros(()).expand(self.out_features, self.in_features)
        has_bias = getattr(linear, "bias", None) is not None
        self.bias = torch.randn(self.out_features, generator=generator, dtype=torch.float64) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{x.shape[-1]} inputs for a layer that takes {self.in_features}")
        out = (x[..., self.source] * self.factor).sum(-1)
        return out if self.bias is None else out + self.bias


def is_linear(module: Any) -> bool:
    """Whether a module maps rows to rows: a linear layer, also one that PEFT has wrapped or a library has packed."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, linear layer) of a module in the order of registration, without what is inside of one."""
    for name, child in module.named_children():
        if is_linear(child):
            yield prefix + name, child
        else:
            yield from linears(child, f"{prefix}{name}.")


def stand_in(module: nn.Module, processor: Any) -> Any:
    """The stand-in: the module's class on random float64 numbers, in evaluation mode, with this processor."""
    generator = torch.Generator().manual_seed(0)

    def made(part: nn.Module) -> nn.Module:
        if is_linear(part):
            return Sparse(part, generator)
        new: Any = copy.copy(part)
        own = dict(vars(part))
        for key in [key for key in own if "hook" in key and isinstance(own[key], dict)]:
            own[key] = type(own[key])()
        for key in ("forward", "_hf_hook", "_old_forward", "_diffusers_hook"):
            own.pop(key, None)
        own["_parameters"] = {key: _random(t, generator) for key, t in part._parameters.items()}
        own["_buffers"] = {key: _double(t) for key, t in part._buffers.items()}
        own["_modules"] = {key: None if m is None else made(m) for key, m in part._modules.items()}
        own["training"] = False
        object.__setattr__(new, "__dict__", own)
        new.__class__ = original_class(part, Carries) if isinstance(part, Carries) else type(part)
        return cast(nn.Module, new)

    found: Any = made(module)
    for name in ("upcast_attention", "upcast_softmax"):
        if hasattr(found, name):
            setattr(found, name, False)  # the host would round to float32
    found._modules.pop("processor", None)
    if processor is not None:
        # It may keep something of a pass.
        own = made(processor) if isinstance(processor, nn.Module) else copy.copy(processor)
        found.__dict__["processor"] = own
    return found


def _random(tensor: Tensor | None, generator: torch.Generator) -> Any:
    if tensor is None:
        return None
    return nn.Parameter(torch.randn(tensor.shape, generator=generator, dtype=torch.float64), False)


def _double(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    found = torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().cpu()
    return found.double() if found.is_floating_point() else found


@dataclass(eq=False)
class Called:
    """One call of a linear layer: x (..., D) to y (..., D'), both cut from what came before."""

    path: str
    x: Tensor
    y: Tensor


@dataclass
class Met:
    """One attention: (B, N, H, d) of queries, keys and values, and its output in pieces, cut from what came before."""

    q: Tensor
    k: Tensor
    v: Tensor
    z: list[Tensor]
    layout: Layout
    before: int  # calls of linear layers


@dataclass
class Trace(Pass):
    """What happened in one pass of a stand-in."""

    taps: frozenset[str]
    holders: frozenset[str]
    calls: list[Called] = field(default_factory=list)
    met: list[Met] = field(default_factory=list)
    _slices: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def call(self, path: str, linear: Any, x: Tensor) -> Tensor:
        y = linear(x).detach().requires_grad_()
        self.calls.append(Called(path, x, y))
        return cast(Tensor, y)

    def meet(
        self, attend: Attend, layout: Layout, q: Tensor, k: Tensor, v: Tensor, args: Sequence[Any], kwargs: Any
    ) -> Tensor:
        z = reference(layout, q, k, v, args, kwargs).detach().requires_grad_()
        heads = q.shape[0] // BATCH if layout == "flat" else 0
        q, k, v = (to_tokens(t, layout, heads) for t in (q, k, v))
        self.met.append(Met(q, k, v, [z], layout, len(self.calls)))
        return z

    def scores(self, attn: Any, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = attn.get_attention_scores(q, k, mask)
        self._slices.append((q, k, found))
        return found

    def bmm(self, bmm: Attend, a: Tensor, b: Tensor) -> Tensor:
        """The products of probabilities and values, slice by slice, are one attention."""
        for q, k, found in self._slices:
            if found is a:
                z = bmm(a, b).detach().requires_grad_()
                if not (self.met and self.met[-1].layout == "flat" and self.met[-1].before == len(self.calls)):
                    none = [t.new_empty(0, *t.shape[1:]) for t in (q, k, b)]
                    self.met.append(Met(none[0], none[1], none[2], [], "flat", len(self.calls)))
                one = self.met[-1]
                one.q, one.k, one.v = (torch.cat(pair) for pair in ((one.q, q), (one.k, k), (one.v, b)))
                one.z.append(z)
                return z
        return bmm(a, b)

    def finish(self) -> None:
        """Bring what came in slices into one form."""
        for one in self.met:
            if one.q.ndim == 3:
                one.q, one.k, one.v = (to_tokens(t, "flat", t.shape[0] // BATCH) for t in (one.q, one.k, one.v))


def reference(layout: Layout, q: Tensor, k: Tensor, v: Tensor, args: Sequence[Any], kwargs: Any) -> Tensor:
    """Attention as every back-end means it, whichever the host has chosen."""
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = given.get("attn_mask") if layout != "flat" else given.get("attn_bias")
    if layout == "tokens":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # Somebody's keys may be none at all, and then their mean is nothing.
    z = F.scaled_dot_product_attention(
        q, k, v, mask, 0.0, bool(given.get("is_causal")), scale=given.get("scale"),
        enable_gqa=layout != "flat" and q.shape[1] != k.shape[1],
    )  # fmt: skip
    return z.transpose(1, 2) if layout == "tokens" else z


@dataclass
class Attempt:
    """Arguments for one pass, and what is in them.

    Attributes:
        extra: whether there is more than tokens, as only hosts get it that do not run without.
    """

    hidden: Tensor
    kwargs: dict[str, Any]
    extra: bool = False


#: Forms of a rotary embedding that turns by nothing, of head width d.
_ROTARY = {
    "pair": lambda d: (_ones(1, d), _ones(1, d) * 0),
    "pair of every image": lambda d: (_ones(1, 1, d), _ones(1, 1, d) * 0),
    "complex": lambda d: torch.ones(1, 1, d // 2, dtype=torch.complex128),
    "matrices": lambda d: torch.eye(2, dtype=torch.float64).expand(1, 1, 1, d // 2, 2, 2),
}


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


def _parameters(module: Any) -> list[inspect.Parameter]:
    """What a module's processor, or its forward, takes, without ``*args`` and ``**kwargs``."""
    processor = getattr(module, "processor", None)
    called: Any = type(module).forward if processor is None else type(processor).__call__
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [p for p in inspect.signature(called).parameters.values() if p.kind in named]
    return [p for p in found if p.name not in ("self", "attn", "args", "kwargs")]


def attempts(module: Any, crossing: bool) -> Iterator[Attempt]:
    """Arguments that the module may take, the likeliest first; ``crossing``: with keys from elsewhere."""
    parameters = _parameters(module)
    if not parameters:
        return
    first, rest = parameters[0].name, parameters[1:]
    context = next((p.name for p in rest if p.name in ("encoder_hidden_states", "context")), None)
    needed: dict[str, Any] = {p.name: None for p in rest if p.default is inspect.Parameter.empty and p.name != context}
    widths = list(dict.fromkeys(linear.in_features for _, linear in linears(module)))
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)

    tokens: list[tuple[Tensor, dict[str, Any]]] = []
    for width in widths:
        for hidden in (noise(TOKENS, width), noise(width, 1, TOKENS)):
            others = [None] if context is None else _contexts(crossing, hidden, widths, noise)
            tokens += [(hidden, {first: hidden} | ({} if context is None else {context: c})) for c in others]
    for hidden, given in tokens:
        yield Attempt(hidden, given | needed)
    turning = [p.name for p in rest if _turns(p.name)]
    masks = [p.name for p in rest if p.name == "attention_mask"]
    for hidden, given in tokens:
        count = hidden.shape[1] if context is None or given[context] is None else given[context].shape[1]
        masked = {name: torch.ones(BATCH, count, dtype=torch.bool) for name in masks}
        if masks:
            yield Attempt(hidden, given | needed | masked, True)
        for form in _ROTARY.values() if turning else ():
            yield Attempt(hidden, given | needed | dict.fromkeys(turning, form(_head_width(module))), True)


def _contexts(crossing: bool, hidden: Tensor, widths: list[int], noise: Any) -> list[Tensor | None]:
    """Nothing, other tokens, or the same ones; first what the module expects."""
    others: list[Tensor | None] = [noise(count, width) for count in (CONTEXT, _LONG) for width in widths]
    if crossing:
        return [*others, None]
    return [None, *([hidden] if hidden.ndim == 3 else []), *others]


def _turns(name: str) -> bool:
    return any(part in name for part in ("rot", "rope", "freqs"))


def takes_rotary(module: Any) -> bool:
    """Whether queries and keys may be rotated: an argument says so."""
    return any(_turns(p.name) for p in _parameters(module))


def _head_width(module: Any) -> int:
    heads = getattr(module, "heads", None) or getattr(module, "num_heads", None) or 1
    return int(next(linear.out_features for _, linear in linears(module)) // heads)


def renamed(module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments under the names that the forward has for what its processor calls otherwise."""
    own = inspect.signature(type(module).forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values()):
        return given
    names = [name for name in own if name != "self"]
    places = [p.name for p in _parameters(module)]

    def known(name: str) -> str:
        longer = next((one for one in names if one.endswith(name)), None)
        return longer or (names[places.index(name)] if places.index(name) < len(names) else name)

    return {known(name): value for name, value in given.items()}


def traced(module: nn.Module, attempt: Attempt) -> tuple[Trace, Any]:
    """What happens in the stand-in with these arguments, and what it returns."""
    taps = frozenset(path for path, _ in linears(module))
    trace = Trace(taps, holders(taps))
    seam = Seam(type(module), getattr(module, "processor", None), products=True)
    result = seam.run(trace, module, (), renamed(module, attempt.kwargs))
    trace.finish()
    return trace, result
