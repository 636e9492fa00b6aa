"""Running somebody's model without leaving traces in it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ModelError

_free = threading.Condition()
#: Which thread works with a module, and how many times over, by the module's id while it does.
_busy: dict[int, tuple[int, int]] = {}
_switch = threading.Lock()
#: For every block of :func:`layers_called` that is open: whether the fast paths were on before the first.
_before: list[bool] = []


@contextmanager
def exclusive(*models: nn.Module) -> Iterator[None]:
    """No other thread works with these models, or with a part of them, inside; it waits until they are free.

    Around everything that hooks, freezes, swaps or switches the modes of a model. A thread may enter again. What is
    to be used together is asked for together, so that two threads never wait for each other.
    """
    me = threading.get_ident()
    # Held, so that no id is given to another module meanwhile.
    modules = list({id(module): module for model in models for module in model.modules()}.values())
    with _free:
        _free.wait_for(lambda: all(_busy.get(id(module), (me, 0))[0] == me for module in modules))
        for module in modules:
            _busy[id(module)] = (me, _busy.get(id(module), (me, 0))[1] + 1)
    try:
        yield
    finally:
        with _free:
            for module in modules:
                left = _busy[id(module)][1] - 1
                if left:
                    _busy[id(module)] = (me, left)
                else:
                    del _busy[id(module)]
            _free.notify_all()


def copied(model: nn.Module, instead: str = "") -> nn.Module:
    """A copy, with weights of its own that train also where it is made under ``torch.inference_mode``.

    Raises:
        ModelError: the model cannot be copied; ``instead`` says what to do then.
    """
    try:
        with exclusive(model), torch.inference_mode(False):
            return copy.deepcopy(model)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ModelError(f"the model cannot be copied ({error})" + (f"; {instead}" if instead else "")) from error


@contextmanager
def layers_called() -> Iterator[None]:
    """PyTorch's fast paths of attention, which read weights in place of calling layers, are off inside.

    PyTorch has one switch for the whole process: models that other threads run meanwhile are slower, and no different.
    It comes back as it was with the end of the last block, whichever thread that is in.
    """
    with _switch:
        _before.append(_before[0] if _before else torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _switch:
            before = _before.pop()
            if not _before:
                torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in this thread alone; every module's own mode comes back afterwards."""
    with exclusive(model), layers_called():
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients; both as before afterwards."""
    with evaluating(model):
        wanted = [p for p in model.parameters() if p.requires_grad]
        for p in wanted:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in wanted:
                p.requires_grad_(True)


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """``model`` on ``device``, and where it was before afterwards."""
    with exclusive(model):
        home = next(model.parameters()).device
        model.to(device)
        try:
            yield
        finally:
            model.to(home)
