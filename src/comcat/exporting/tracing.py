"""The graph that all files are written from: ``torch.export`` of a model, with the axes that stay open."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..errors import ExportError
from ..models.running import out_of_memory
from ..wording import by, some
from .flat_model import FlatModel

#: More images than anybody puts into a batch; formats that plan their memory ahead want to know.
MOST_IMAGES = 128
_AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class Traced:
    """A graph and what goes in and out.

    Attributes:
        program: of ``torch.export``.
        inputs, outputs: name -> shape, with a word for every axis that takes any size.
    """

    program: torch.export.ExportedProgram
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]

    @property
    def open_batch(self) -> bool:
        """Whether batches may be of any size."""
        return any(shape[:1] == ("batch",) for shape in self.inputs.values())


def trace(flat: FlatModel, images: int, dynamic_batch: bool, dynamic_size: bool, bounded: bool = False) -> Traced:
    """The graph of a model on its example of ``images`` images.

    Args:
        bounded: a batch has an upper bound, :data:`MOST_IMAGES`.

    Raises:
        ExportError: the model's forward cannot be one graph, or does not take any batch or size; with the layer.
    """
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES) if bounded else torch.export.Dim("batch", min=1)
    spec: list[Any] = []
    for tensor in flat.tensors:
        axes: dict[int, Any] = {0: batch} if dynamic_batch and tensor.ndim and len(tensor) == images else {}
        if dynamic_size and tensor.ndim == 4 and tensor.is_floating_point():
            axes |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
        spec.append(axes)
    dynamic = (tuple(spec),) if dynamic_batch or dynamic_size else None
    try:
        with torch.no_grad(), _tracing() if dynamic_size else nullcontext():
            program = torch.export.export(flat, flat.tensors, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # what a forward raises on symbols, and torch.export's own, which have no common base
        if out_of_memory(error):
            raise
        raise _refused(flat, error, dynamic_batch, dynamic_size) from error
    words: dict[str, str] = {}
    inputs = _shapes(program, flat.input_names, words, outputs=False)
    if dynamic_size:
        _check_size(flat, inputs)
    return Traced(program, inputs, _shapes(program, flat.output_names, words, outputs=True))


@contextmanager
def _tracing() -> Iterator[None]:
    """Models of transformers ask ``torch.jit.is_tracing`` whether to resize their positions for every size of images.

    ``torch.export`` leaves that at no, and they take the shortcut for the size of the example, which binds the graph.
    """
    before = torch.jit.is_tracing
    torch.jit.is_tracing = lambda: True
    try:
        yield
    finally:
        torch.jit.is_tracing = before


def check_takes(traced: Traced, tensors: Sequence[torch.Tensor]) -> None:
    """Raise ExportError unless the graph takes images of this other size."""
    try:
        with torch.no_grad():
            try:
                traced.program.module()(*tensors)
            except NameError:  # PyTorch 2.9 cannot name all inputs in its guards
                traced.program.module(check_guards=False)(*tensors)
    except (AssertionError, RuntimeError) as error:  # guards, and shapes that do not fit
        if out_of_memory(error):
            raise
        other = next(by(t.shape[1:]) for t in tensors if t.ndim == 4)
        raise ExportError(
            f"the graph does not take images of {other}, which the model takes ({_first_lines(error)[:160]}): its "
            "forward decides by their size; leave dynamic_size out"
        ) from error


def _check_size(flat: FlatModel, inputs: Mapping[str, tuple[int | str, ...]]) -> None:
    for name, shape in inputs.items():
        if len(shape) == 4 and not any(isinstance(n, str) for n in shape[2:]):
            raise ExportError(
                f"input '{name}' takes images of {shape[2]} x {shape[3]} alone: the model ties its graph to that size. "
                "Leave dynamic_size out; models of timm take others with dynamic_img_size=True (--model-arg)"
            )


def _shapes(
    program: torch.export.ExportedProgram, names: Sequence[str], words: dict[str, str], outputs: bool
) -> dict[str, tuple[int | str, ...]]:
    """Shapes by name; ``words`` collects what the open axes of inputs are called."""
    signature = program.graph_signature
    wanted = signature.user_outputs if outputs else signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    found: dict[str, tuple[int | str, ...]] = {}
    for name, one in zip(names, wanted, strict=True):
        shape = tuple(values[str(one)].shape)
        for place, size in enumerate(shape):
            if not isinstance(size, int) and not outputs:
                words.setdefault(str(size), _AXES.get(place, f"{name} axis {place}"))
        found[name] = tuple(n if isinstance(n, int) else words.get(str(n), str(n)) for n in shape)
    return found


# -- which layer is to blame ------------------------------------------------------------------------------------------


def _refused(flat: FlatModel, error: Exception, dynamic_batch: bool, dynamic_size: bool) -> ExportError:
    names = {id(module): name for name, module in flat.model.named_modules()}
    layer = _deepest(error.__traceback__, names)
    where = f"module '{layer}' of " if layer else ""
    cure = "its forward decides by values that only a run has, or calls what PyTorch cannot trace"
    if dynamic_size:
        cure = "leave dynamic_size out"
    elif dynamic_batch:
        cure = "if it is the open batch, choose dynamic_batch=False (--batch N)"
    return ExportError(
        f"{where}the {type(flat.model).__name__} cannot become one graph ({_first_lines(error)}); {cure}"
    )


def _deepest(trace: TracebackType | None, names: Mapping[int, str]) -> str:
    """The module, of those with names, in whose forward an error came up."""
    found = ""
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = names.get(id(owner), found) or found
        trace = trace.tb_next
    return found


@contextmanager
def blaming(program: torch.export.ExportedProgram, target: str, verb: str = "express") -> Iterator[None]:
    """A failure of a converter or runtime inside becomes one error that names the operator and its layer."""
    try:
        yield
    except (ExportError, MemoryError, OSError):
        raise
    except Exception as error:  # every converter has exceptions of its own
        if out_of_memory(error):
            raise
        text = "\n".join(str(one) for one in _chain(error))
        found = _blamed(program, text)
        what = some(found) if found else "the graph"
        raise ExportError(
            f"{target} cannot {verb} {what} ({_first_lines(error)}); write the layer in other operators, or choose "
            "another format"
        ) from error


def _blamed(program: torch.export.ExportedProgram, text: str) -> list[str]:
    """Operators of the graph that an error speaks of, with the layers that hold them."""
    found: dict[str, str] = {}
    said = _plain(text)
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target).removesuffix(".default")  # aten.erfinv
        short = re.escape(_plain(name.split(".")[1]).removeprefix("special") if "." in name else _plain(name))
        if re.search(rf"(::|[.'\"])(special)?{short}(?!\w)", said):  # aten::x, prims.x, 'x'
            found.setdefault(name, layer_of(node))
    return [f"operator {name} in module '{layer}'" if layer else f"operator {name}" for name, layer in found.items()]


def _plain(name: str) -> str:
    """``aten.erfinv`` is ``prims.erf_inv`` once it is taken apart."""
    return name.replace("_", "")


def layer_of(node: Any) -> str:
    """The name of the module that a node of a graph comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return "" if path == "model" else path.removeprefix("model.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_lines(error: BaseException) -> str:
    """The first sentence of the innermost cause."""
    last = list(_chain(error))[-1]
    lines = [line.strip() for line in str(last).splitlines() if line.strip()] or [type(last).__name__]
    return f"{type(last).__name__}: {' '.join(lines[:2])[:300]}"
