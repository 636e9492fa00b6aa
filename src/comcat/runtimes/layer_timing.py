"""Measuring a :class:`~comcat.planning.latency.LatencyTable` in a runtime: layers as small models, in turns.

Every width of a kind of layer has its turn in every round, and the whole dense model has one too. The least of all
rounds counts. If the machine was slower while one kind was measured than it was at its best, as the whole model shows,
that kind's times are put right by as much.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..layers.base import Layer
from ..models.machine import device_name
from ..models.modes import copied, exclusive
from ..planning.latency import LatencyTable
from ..planning.measured_widths import MeasuredWidths
from ..planning.timing import measured_in_place
from ..prepared import Prepared
from ..progress import Progress
from .layer_stacks import DEPTH, LayerCall, float_copy, layer_calls
from .registry import session_class
from .sessions import Session, in_turns
from .stack_files import stack_sessions
from .torch_runtime import DTYPES, torch_threads
from .whole_model import random_inputs, whole_session

#: Of what a model is compiled for, fewer are made: that takes a compiler some seconds each.
_COMPILED_WIDTHS = 4
#: That a round takes at least, in the mean; those of small layers would be over while a machine does something else.
_SECONDS = 0.4


class _Timed(NamedTuple):
    """One kind of layer: seconds by choice, and of the whole model in the same rounds."""

    widths: MeasuredWidths
    seconds: list[float]
    whole: float
    layers: int


def measure_in_runtime(
    ready: Prepared,
    runtime: str,
    precision: str,
    threads: int | None,
    batch_size: int,
    size: tuple[int, int, int],
    widths: int,
    rounds: int,
    progress: Progress | None,
) -> LatencyTable:
    """Time every kind of layer at several widths in a runtime; arguments and errors as :func:`comcat.measure_latency`.

    Args:
        size: (C, H, W).
    """
    session_class(runtime).check(precision, threads)
    if runtime == "torch":
        model = copied(ready.model).to(DTYPES[precision]).eval()
        with torch_threads(threads):
            return measured_in_place(ready.of_copy(model), batch_size, size, widths, rounds, progress)
    if runtime == "torch-compile":
        widths = min(widths, _COMPILED_WIDTHS)
    with exclusive(ready.model), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        how = runtime, precision, threads, Path(folder)
        floating = float_copy(ready, runtime)
        shapes, calls = ready.shapes(size), layer_calls(floating, batch_size, size)
        kinds: dict[str, list[Layer]] = {}
        for layer in floating.inventory.layers:
            kinds.setdefault(layer.layer_key(shapes[layer.name]), []).append(layer)
        images = random_inputs(floating.model, size, batch_size)
        whole = whole_session(floating.model, *how)
        timed: dict[str, _Timed] = {}
        for done, (key, layers) in enumerate(kinds.items()):
            chosen = MeasuredWidths(layers[0], widths, coarse=True)
            call = calls[layers[0].name]
            sessions = stack_sessions(layers[0], chosen.choices, call, *how)
            took = _least([whole, *sessions], images, call, rounds)
            timed[key] = _Timed(chosen, took[1:], took[0], len(layers))
            if progress:
                progress("latency", done + 1, len(kinds))
        dense, profile = min(one.whole for one in timed.values()), ready.profile(size)
        return LatencyTable(
            device=device_name(next(floating.model.parameters()).device),
            dtype="float32",
            batch_size=batch_size,
            threads=threads or 0,
            torch=torch.__version__,
            input_size=size,
            params=profile.params,
            macs=profile.macs,
            dense=round(1e9 * dense),
            layers={
                key: one.widths.times([s * dense / one.whole / DEPTH for s in one.seconds], one.layers)
                for key, one in timed.items()
            },
            runtime=runtime,
            precision=whole.precision,
            version=whole.version,
        ).settled()


def _least(sessions: list[Session], images: list[np.ndarray], call: LayerCall, rounds: int) -> list[float]:
    """Seconds of each session: the first takes images, the others what the layer is called with.

    The second is the dense layer, which all the others are compared with: it has its turn at the end too.
    """
    inputs = [images] + [[call.x.cpu().numpy()]] * len(sessions)
    spent = in_turns([*sessions, sessions[1]], inputs, rounds, least_seconds=_SECONDS * rounds)
    whole, *layers, again = (min(times) for times in spent)
    return [whole, min(layers[0], again), *layers[1:]]
