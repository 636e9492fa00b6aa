"""Adapters on a pipeline: put on, switched, changed in strength, taken off.

Everything hangs on the models themselves, so that it survives another pipeline around them and a deep copy. No
weight of a model is ever written to.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DataError, ModelError
from ...hosts import diffusers as denoisers
from ...nn.added import AddedLayer, Strength
from .components import components, denoiser, find_addable, host, text_encoders
from .masking import as_mask, put_mask, settle
from .targets import Ranks, Targets, choose
from .tokens import Token, install, new_token, uninstall

_ATTRIBUTE = "_comcat_adapters"
NAME = re.compile(r"[A-Za-z0-9_-]+")


class Adapter:
    """A set of added products on a pipeline, and perhaps a learned token.

    Attributes:
        name: by which the pipeline knows it.
        pipe: the pipeline, or the bare model, that it was put on.
        layers: (component, layer) -> the products, e.g. ("unet", "mid_block.attentions.0...attn1").
        token: the learned token, or None.
        info: what is written into the file beside the tensors: prompt, training summary.
        left_out: parts of its file that the pipeline has no place for, e.g. "token" without a text encoder.
    """

    def __init__(self, pipe: Any, name: str, strength: Strength) -> None:
        self.pipe = pipe
        self.name = name
        self.strength = strength
        self.layers: dict[tuple[str, str], AddedLayer] = {}
        self.token: Token | None = None
        self.info: dict[str, Any] = {}
        self.left_out: list[str] = []
        self._modules: dict[tuple[str, str], nn.Module] = {}  # where the products are
        self._mask: Tensor | None = None

    @property
    def scale(self) -> float:
        """The strength s, on queries and values of the added products. 0 is the base model, bitwise."""
        return self.strength.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self.strength.scale = check_scale(scale)

    @property
    def enabled(self) -> bool:
        return self.strength.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self.strength.enabled = bool(enabled)

    @property
    def mask(self) -> Tensor | None:
        """Where in the picture the adapter acts, (H, W) in [0, 1]; None: everywhere.

        Set from an image (white: here, black: not here, gray: with this part of its strength), a path, an array or a
        tensor, of any resolution and the aspect ratio of the picture. It acts on the tokens of the picture; those of
        the text, text encoders and a learned word have no place in it and are not masked. It is not stored in files.

        Raises:
            DataError: it is no mask, or black everywhere.
            ModelError: the adapter has nothing in the denoiser, or masks do not know this kind of denoiser.
        """
        return self._mask

    @mask.setter
    def mask(self, mask: Any) -> None:
        values = None if mask is None else as_mask(mask)
        put_mask(self, values)
        self._mask = values
        model = denoiser(self.pipe)[1]
        settle(model, any(handle.mask is not None for handle in adapters(model).values()))

    @property
    def ranks(self) -> dict[str, dict[str, int]]:
        """Component -> layer -> rank."""
        found: dict[str, dict[str, int]] = {}
        for (component, name), layer in self.layers.items():
            found.setdefault(component, {})[name] = layer.rank
        return found

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name as in a file, parameter), e.g. ``unet.mid_block...attn1.sample.query.weight``."""
        for (component, name), layer in self.layers.items():
            for leaf, parameter in layer.streams.named_parameters():
                yield f"{component}.{name}.{leaf}", parameter
        if self.token is not None:
            for encoder, vectors in self.token.vectors.items():
                yield f"token.{encoder}", vectors

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def requires_grad_(self, requires_grad: bool = True) -> Adapter:
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def remove(self) -> None:
        """Take it off: :func:`remove_adapter`."""
        remove_adapter(self.pipe, self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        """Part of a copy of its pipeline; a copy of the model alone has the products of this model alone."""
        whole = id(self.pipe) in memo
        component, model = denoiser(self.pipe)
        new = Adapter(self.pipe, self.name, copy.deepcopy(self.strength, memo))
        memo[id(self)] = new
        new.pipe = copy.deepcopy(self.pipe if whole else model, memo)
        mine = [key for key in self.layers if whole or key[0] == component]
        new.layers = {key: copy.deepcopy(self.layers[key], memo) for key in mine}
        new._modules = {key: copy.deepcopy(self._modules[key], memo) for key in mine if key in self._modules}
        new.token = copy.deepcopy(self.token, memo) if whole else None
        new.info = copy.deepcopy(self.info, memo)
        new._mask = self._mask
        new.left_out = [*self.left_out, *({key[0] for key in self.layers} - {key[0] for key in mine})]
        if self.token is not None and not whole:
            new.left_out.append("token")
        return new

    def __repr__(self) -> str:
        on = "" if self.enabled else ", off"
        on += "" if self.mask is None else ", masked"
        return (
            f"Adapter({self.name!r}, {len(self.layers)} layers, {self.num_parameters:,} parameters, "
            f"scale {self.scale:g}{on})"
        )


def check_scale(scale: float) -> float:
    """``scale`` as a float, or ModelError."""
    try:
        if not isinstance(scale, bool) and isinstance(scale, (int, float)) and math.isfinite(scale):
            return float(scale)
    except OverflowError:  # an int beyond every float
        pass
    raise ModelError(f"a strength must be a finite number, not {scale!r}")


def adapters(pipe: Any) -> dict[str, Adapter]:
    """The adapters on a pipeline or model, by name, in the order in which they were added."""
    return dict(getattr(denoiser(pipe)[1], _ATTRIBUTE, {}))


def get_adapter(pipe: Any, name: str) -> Adapter:
    """The adapter of this name.

    Raises:
        ModelError: there is none; the names of those there are follow.
    """
    found = adapters(pipe)
    if name not in found:
        raise ModelError(f"there is no adapter {name!r} on this pipeline; there is {', '.join(found) or 'none at all'}")
    return found[name]


def add_adapter(
    pipe: Any,
    *,
    rank: Ranks = 2,
    targets: Targets = None,
    name: str = "default",
    text_encoder_rank: int = 0,
    token: str | None = None,
    token_vectors: int = 1,
    token_init: str | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Adapter:
    """Add trainable rank-r products to the heads of a pipeline; at first they change nothing, bitwise (Eq. 8).

    Args:
        pipe: a diffusers text-to-image pipeline, or its UNet or transformer alone.
        rank: of every head's products, or pattern -> rank, the first that matches (``{"attn2": 4, "self": 1}``).
        targets: which attention layers: a kind (``self``, ``cross``, ``joint``), a part of their names (``attn2``,
            ``mid_block``), a glob over whole names, or a list of these; None: all that can take products, which leaves
            out e.g. the linear attention of SANA.
        name: letters, digits, ``_`` and ``-``.
        text_encoder_rank: rank in the CLIP text encoders; 0 leaves them alone.
        token: a new word such as ``V*`` whose embedding is learned too.
        token_vectors: how many vectors it has; token_init: words whose embeddings they start from.
        scale: strength s.
        dtype: of the products, e.g. float32 beside a half-precision model; the model's own by default.
        seed: of the random factors.

    Raises:
        ModelError: the name is taken; nothing is named by ``targets``; a rank is below 1 or above the head width; an
            attention layer holds a processor that products cannot run in.
    """
    handle = new_adapter(pipe, name, scale)
    generator = torch.Generator().manual_seed(seed)
    component, model = denoiser(pipe)
    parts: dict[str, tuple[nn.Module, Ranks, Targets]] = {component: (model, rank, targets)}
    if text_encoder_rank:
        encoders = text_encoders(pipe)
        if not encoders:
            raise ModelError("text_encoder_rank needs a pipeline with a CLIP text encoder; leave it at 0")
        parts.update({key: (module, text_encoder_rank, None) for key, module in encoders.items()})
    plans = {}
    for key, (module, ranks, patterns) in parts.items():
        attentions, refused = find_addable(key, module)
        plans[key] = (attentions, choose(key, attentions, refused, patterns, ranks))
    if token is not None:
        handle.token = new_token(pipe, token, token_vectors, token_init, generator, dtype)
    for key, (attentions, chosen) in plans.items():
        for layer_name, r in chosen.items():
            layer = attentions[layer_name].new_layer(r, handle.strength, dtype=dtype)
            for stream in layer.streams.values():
                stream.reset_parameters(generator)  # type: ignore[operator]
            handle.layers[key, layer_name] = layer
    attach(handle)
    return handle


def new_adapter(pipe: Any, name: str, scale: float) -> Adapter:
    """An empty adapter, not yet on its pipeline; ModelError for a name that is taken or a strength that is none."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ModelError(f"an adapter's name is letters, digits, '_' and '-', not {name!r}")
    if hasattr(nn.ModuleDict(), name):  # it holds the products under this name
        raise ModelError(f"an adapter cannot be called {name!r}, a word of torch's own; choose another name")
    if name in adapters(pipe):
        raise ModelError(f"there is an adapter {name!r} on this pipeline already; remove it or choose another name")
    return Adapter(pipe, name, Strength(check_scale(scale)))


def attach(handle: Adapter) -> None:
    """Put a finished adapter on its pipeline; every check has been made before.

    Raises:
        ModelError: a text encoder that is shared with another pipeline carries an adapter of this name.
    """
    parts = components(handle.pipe)
    attentions = {key: find_addable(key, parts[key])[0] for key in handle.ranks}
    modules = {(key, name): attentions[key][name].module for key, name in handle.layers}
    taken = [key for (key, _), module in modules.items() if handle.name in getattr(module, "extras", {})]
    if taken:
        raise ModelError(
            f"the {taken[0]} carries an adapter {handle.name!r} of another pipeline that shares it; choose another name"
        )
    for (key, name), layer in handle.layers.items():
        host(key).attach(attentions[key][name], handle.name, layer)
    handle._modules = modules
    model = denoiser(handle.pipe)[1]
    setattr(model, _ATTRIBUTE, {**getattr(model, _ATTRIBUTE, {}), handle.name: handle})
    if handle.token is not None:
        install(handle.pipe, handle.token)
    denoisers.guard(model)


def remove_adapter(pipe: Any, name: str) -> None:
    """Take an adapter off, its token and its part in text encoders included, whichever pipeline shares them.

    After the last one every module is what it was, its class and processor included.

    Raises:
        ModelError: there is no adapter of this name.
    """
    handle = get_adapter(pipe, name)
    handle.mask = None
    for (key, _), module in handle._modules.items():
        host(key).detach(module, name)
    handle._modules = {}
    model = denoiser(pipe)[1]
    found = {key: value for key, value in adapters(pipe).items() if key != name}
    if found:
        setattr(model, _ATTRIBUTE, found)
    else:
        delattr(model, _ATTRIBUTE)
    if handle.token is not None:
        uninstall(handle.token)
    denoisers.guard(model)


def set_adapters(pipe: Any, scales: Mapping[str, float], masks: Mapping[str, Any] | None = None) -> None:
    """Switch exactly these adapters on, at these strengths, and all others off; no layer is touched.

    Args:
        masks: name -> where in the picture it acts (:attr:`Adapter.mask`); those of ``scales`` that are not named act
            everywhere. None: masks stay as they are.

    Raises:
        ModelError: one of them is not on this pipeline, or a strength is no finite number.
        DataError: a mask is none, or belongs to an adapter that is not switched on.
    """
    handles = {name: get_adapter(pipe, name) for name in scales}
    checked = {name: check_scale(scale) for name, scale in scales.items()}
    if masks is not None:
        stray = [name for name in masks if name not in scales]
        if stray:
            raise DataError(f"there is a mask for {stray[0]!r}, which is not among the adapters that are switched on")
        read = {name: None if masks.get(name) is None else as_mask(masks[name]) for name in scales}
        for name, mask in read.items():
            handles[name].mask = mask
    for name, handle in adapters(pipe).items():
        handle.enabled = name in handles
        if name in handles:
            handle.scale = checked[name]
