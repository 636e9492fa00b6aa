"""Attention layers recognised by their parts: linear layers with the usual names, and how many heads there are.

What is found here is a guess; :mod:`comcat.hosts.proof` holds it against what the module computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..layers.attention import AttentionLayer
from ..layers.base import size
from ..layers.heads import ROLES, Heads, Input, Stream
from ..layers.joint import JointAttention
from ..nn.carries import Carries
from ..nn.copies import copy_with
from .changed import changed, hooked, patched_forward
from .folding import folds, parts
from .kept_forward import KeptForward
from .lifted import lifted

#: Names of the linear layers of query, key and value, one beside the other.
_SEPARATE = [
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"), ("q_lin", "k_lin", "v_lin"), ("q_linear", "k_linear", "v_linear"),
    ("query_proj", "key_proj", "value_proj"),
    ("projection_query", "projection_key", "projection_value"),
    ("q_proj.proj", "k_proj.proj", "v_proj.proj"), ("linear_q", "linear_k", "linear_v"),
    ("query.proj", "key.proj", "value.proj"), ("q.proj", "k.proj", "v.proj"), ("q.proj", "k", "v"),
    ("to_query", "to_key", "to_value"),
]  # fmt: skip
#: Of query and key, and of values and their gate in one.
_GATED = [("q", "k", "v_gate")]
#: Of query, and of keys and values in one.
_HALF = [
    ("q", "kv"), ("q_proj", "kv_proj"), ("to_q", "to_kv"), ("wq", "wkv"), ("query", "key_value"), ("q.ln", "kv"),
    ("q.proj", "kv"),
]  # fmt: skip
#: Of query and key in one, and of value.
_SCORES = [("qk", "v"), ("qk_proj", "v_proj"), ("to_qk", "to_v")]
#: Of all three in one.
_FUSED = [
    "qkv", "qkv_proj", "in_proj", "to_qkv", "Wqkv", "query_key_value", "qkv_linear", "proj_qkv", "in_proj_qkv", "pwise",
]  # fmt: skip
#: Of a second stream of tokens, whose queries and keys meet those of the first in one softmax, and its output.
_CONTEXT = [("add_q_proj", "add_k_proj", "add_v_proj")]
_CONTEXT_OUTPUTS = ["to_add_out"]
#: Of values alone, where the scores come from elsewhere.
_VALUES = ["v", "v_proj", "value_proj"]
_OUTPUTS = [
    "o_proj", "out_proj", "proj", "output_proj", "projection", "projection_layer", "to_out", "to_out.0", "wo", "o",
    "out", "out_lin", "linear", "merge", "final", "dense", "output", "output.dense", "proj.0", "proj.1", "proj.proj",
    "output.proj", "proj.ln", "upsampling.0", "conv3_1x1.conv",
]  # fmt: skip
_HEADS = [
    "num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "num_head", "nhead", "num_q_heads", "nums_head",
]  # fmt: skip
_GROUPS = ["num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads"]
#: Attributes that hold the width of one head, and of all.
_WIDTHS = ["head_dim", "attention_head_size", "dim_head", "head_size", "d_head", "key_dim", "val_dim", "dim_per_head"]
_TOTALS = [
    "all_head_size", "inner_dim", "inner_kv_dim", "attn_dim", "embed_dim", "hidden_size", "inner_size", "d_model",
    "val_attn_dim",
]  # fmt: skip
#: That hold the scale of the scores, for those hosts that do not derive it from the width of what they are given.
_SCALES = ["scale"]
_BIASES = {"query": "q_bias", "key": "k_bias", "value": "v_bias"}


def attention_of(name: str, module: nn.Module) -> AttentionLayer | str | None:
    """An attention layer, unproven; why a module that looks like one is none; or None where it does not."""
    form = lifted(module)
    if isinstance(form, str):
        return form
    called = module if form is None else form
    pairs = folds(called) if _has_heads(called) or _is_single(called) else {}
    seen = copy_with(called, pairs) if pairs else called
    stream, holder = _stream(seen)
    if stream is None or holder is None:
        return None
    reason = patched_forward(module) or _carries(module)
    context = _context(seen)
    paths = [*stream.paths, *(context.paths if context else [])]
    linears: dict[str, Any] = {path: seen.get_submodule(path) for path in paths}
    reason = reason or next((why for path in linears if (why := _changed(called.get_submodule(path), path))), None)
    if reason:
        return reason
    heads = _heads(called, holder, stream, linears)
    if heads is None:
        return "how many heads it has, and how wide they are, cannot be told from its attributes"
    if context and not _fits(heads, context, linears):
        return "the heads of its second stream of tokens are others than those of the first"
    used = {path: one for path, one in linears.items() if path in pairs}
    running = _with_biases(copy_with(called, used) if used else called, stream, heads)
    if isinstance(running, str):
        return running
    return layer_of(name, module, heads, stream, running, context)


def layer_of(
    name: str, module: nn.Module, heads: Heads, stream: Stream, running: nn.Module, context: Stream | None = None
) -> AttentionLayer:
    """The layer that runs through its own forward."""
    widths, totals, scales = _attributes(running, heads, stream)
    kept = KeptForward(running, heads, stream, widths, totals, scales, context)
    if context is not None:
        return JointAttention(name, module, heads, stream, kept, context, running=running)
    return AttentionLayer(name, module, heads, stream, kept, running=running)


def variants(layer: AttentionLayer) -> Iterator[AttentionLayer]:
    """The same layer with its rows in other orders."""
    yield layer
    if isinstance(layer, JointAttention):
        return
    stream, heads = layer.stream, layer.heads
    streams = []
    if any(len(one.roles) > 1 for one in stream.inputs) and heads.groups == heads.num:
        streams.append(replace(stream, inputs=tuple(replace(one, by_head=len(one.roles) > 1) for one in stream.inputs)))
    streams.append(replace(stream, by_component=True))
    for other in streams:
        yield layer_of(layer.name, layer.module, heads, other, layer.running)


def _has_heads(module: nn.Module) -> bool:
    return _number(_HEADS, module) is not None


def _is_single(module: nn.Module) -> bool:
    """Whether it has queries and keys, and nothing that tells of more heads than one."""
    return not _has_heads(module) and {"q", "k"} <= dict(module.named_children()).keys()


def _changed(module: nn.Module, path: str) -> str | None:
    """Why a linear layer, or one with its batch normalization, is more than that."""
    pair = parts(module)
    if pair is None:
        return changed(module, path)
    linear, norm = pair
    if "forward" in vars(norm) or (what := hooked(norm)):
        return f"the batch normalization of its {path} was changed" if "forward" in vars(norm) else f"it has a {what}"
    return changed(linear, path)


def _carries(module: nn.Module) -> str | None:
    if isinstance(module, Carries):
        return (
            f"it carries the products of {', '.join(module.extras)}, which would be lost; remove these adapters first"
        )
    return None


def _context(module: nn.Module) -> Stream | None:
    """Where the projections of a second stream are."""
    for names in _CONTEXT:
        if all(_linear(module, name) for name in names):
            output = next((one for one in _CONTEXT_OUTPUTS if _linear(module, one)), None)
            return Stream.separate("context", *names, output)
    return None


def _fits(heads: Heads, context: Stream, linears: dict[str, Any]) -> bool:
    """Whether a second stream has these heads."""
    wide = {role: heads.count(role) * heads.wide(role) for role in ROLES}
    inputs = all(size(linears[context.path(role)])[1] == rows for role, rows in wide.items())
    return inputs and (context.output is None or size(linears[context.output])[0] == heads.num * heads.value_width)


def _stream(module: nn.Module) -> tuple[Stream | None, nn.Module | None]:
    """Where the projections are, and the submodule that holds those of the input, which may be a child."""
    places = [("", module), *((f"{name}.", child) for name, child in module.named_children())]
    for prefix, holder in places:
        inputs = _inputs(holder)
        if inputs is None:
            continue
        inside = [prefix + one for one in _OUTPUTS] if prefix else []
        if prefix and any(_linear(module, path) for path in inside):
            return None, None  # the child is the layer
        used = {one.path for one in inputs}
        for output in _OUTPUTS:
            if output not in used and not (prefix and output == prefix[:-1]) and _linear(module, output):
                inputs = tuple(replace(one, path=prefix + one.path) for one in inputs)
                return Stream("tokens", inputs, output), holder
    return None, None


def _inputs(holder: nn.Module) -> tuple[Input, ...] | None:
    if next(holder.children(), None) is None:  # most modules: nothing to look for
        return None
    for names in _SEPARATE:
        if all(_linear(holder, name) for name in names):
            return tuple(Input(name, (role,)) for name, role in zip(names, ROLES, strict=True))
    for query, key, rest in _GATED:
        if all(_linear(holder, name) for name in (query, key, rest)):
            return Input(query, ("query",)), Input(key, ("key",)), Input(rest, ("value", "gate"))
    for query, rest in _HALF:
        if _linear(holder, query) and _linear(holder, rest):
            return Input(query, ("query",)), Input(rest, ("key", "value"))
    for query, rest in _HALF:
        if _linear(holder, rest) and isinstance(getattr(holder, query, None), nn.Conv2d):
            return (Input(rest, ("key", "value")),)  # queries from a filter, such as one that skips pixels
    for scores, value in _SCORES:
        if _linear(holder, scores) and _linear(holder, value):
            return Input(scores, ("query", "key")), Input(value, ("value",))
    for name in _FUSED:
        if _linear(holder, name):
            return (Input(name, ROLES),)
    for name in _VALUES:
        if _linear(holder, name) and (_has_heads(holder) or _number(_WIDTHS, holder) is not None):
            return (Input(name, ("value",)),)
    return None


def _linear(module: nn.Module, path: str) -> bool:
    """Whether there is a linear layer, or a 1x1 convolution."""
    try:
        found: Any = module.get_submodule(path)
    except AttributeError:
        return False
    if isinstance(found, nn.Conv2d):
        plain = found.kernel_size == found.stride == (1, 1) and found.groups == 1
        return plain and found.padding in ((0, 0), "same", "valid")
    return isinstance(getattr(found, "weight", None), nn.Parameter) and found.weight.dim() == 2


def _number(names: list[str], *places: Any) -> int | None:
    for place in places:
        for name in names:
            # Models of diffusers answer for their configuration, with a warning.
            own = not isinstance(place, nn.Module) or name in vars(place) or hasattr(type(place), name)
            value = getattr(place, name, None) if own else None
            if type(value) is int and value > 0:
                return value
    return None


def _heads(module: nn.Module, holder: nn.Module, stream: Stream, linears: dict[str, Any]) -> Heads | None:
    places = (holder, module, getattr(holder, "config", None), getattr(module, "config", None))
    out = size(linears[str(stream.output)])[0]
    # Where neither their number nor their width is said, there is one.
    num = _number(_HEADS, *places) or max(1, out // (_number(_WIDTHS, *places) or out))
    if out % num:
        return None
    value_width, rows = out // num, {one.roles: size(linears[one.path])[1] for one in stream.inputs}
    if ("query",) in rows and rows["query",] % num == 0:
        width = rows["query",] // num
        if ("key",) in rows:
            groups, rest = divmod(rows["key",], width)
            values = rows["value",] if ("value",) in rows else rows["value", "gate"] // 2
            fits = not rest and values == groups * value_width
        else:
            groups, rest = divmod(rows["key", "value"], width + value_width)
            fits = not rest
    elif ("key", "value") in rows:  # queries come from elsewhere
        groups, (width, rest) = num, divmod(rows["key", "value"] - num * value_width, num)
        fits = not rest and width > 0
    elif ("value",) in rows:  # beside queries and keys in one, or alone
        groups, rest = divmod(rows["value",], value_width)
        width, more = divmod(rows.get(("query", "key"), 0), num + groups)
        fits = not rest and not more
    else:
        groups = _number(_GROUPS, *places) or num
        width, rest = divmod(rows.get(ROLES, 0) - groups * value_width, num + groups)
        fits = not rest and width > 0
    if not fits or not groups or num % groups:
        return None
    return Heads(num, width, groups, value_width)


def _attributes(module: nn.Module, heads: Heads, stream: Stream) -> list[tuple[tuple[str, str], ...]]:
    """Where the host looks for the width of a head, that of all heads, and the scale that follows from it."""
    if heads.width != heads.value_width:
        return [(), (), ()]
    holder = stream.value.rpartition(".")[0]
    found = []
    wanted = ((_WIDTHS, heads.width), (_TOTALS, heads.width * heads.num), (_SCALES, heads.width**-0.5))
    for names, value in wanted:
        places = dict.fromkeys(("", holder))
        found.append(
            tuple(
                (path, name) for path in places for name in names if vars(module.get_submodule(path)).get(name) == value
            )
        )
    return found


def _with_biases(module: Any, stream: Stream, heads: Heads) -> nn.Module | str:
    """The module with biases that it keeps apart put into its linear layer, which it then calls."""
    apart: dict[str, Any] = {role: getattr(module, name, None) for role, name in _BIASES.items()}
    if all(bias is None for bias in apart.values()) or len(stream.inputs) != 1:
        return cast(nn.Module, module)
    (one,) = stream.inputs
    linear: Any = module.get_submodule(one.path)
    rows = [heads.count(role) * heads.wide(role) for role in one.roles]
    parts = [
        linear.weight.new_zeros(count) if apart[role] is None else apart[role].detach()
        for role, count in zip(one.roles, rows, strict=True)
    ]
    if any(part.shape != (count,) for part, count in zip(parts, rows, strict=True)):
        return "its biases do not fit its projections"
    joined = nn.Linear(*size(linear), bias=True, device="meta")
    joined.weight = linear.weight
    joined.bias = nn.Parameter(torch.cat(parts), linear.weight.requires_grad)
    made: Any = copy_with(module, {one.path: joined.train(linear.training)})
    for name in _BIASES.values():
        if name in made._parameters or name in vars(made):
            made._parameters.pop(name, None)
            made._buffers.pop(name, None)
            setattr(made, name, None)
    return cast(nn.Module, made)
