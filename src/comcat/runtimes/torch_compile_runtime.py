"""PyTorch through ``torch.compile``; on a processor it needs a C++ compiler."""

from __future__ import annotations

import os
import re
import shutil
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .torch_runtime import TorchSession

_NUMBERS = count()


class CompiledSession(TorchSession):
    """A module compiled for the shapes it is called with; the first batch of a shape takes long."""

    runtime = "torch-compile"

    def _open(self, source: Any) -> None:
        super()._open(source)
        self.function = _function_of(self.module)
        self.module = torch.compile(self.function, dynamic=False)

    def _run(self, inputs: Any) -> Any:
        try:
            return super()._run(inputs)
        except ModelError as error:
            cause = error.__cause__
            if not type(cause).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            said = str(cause).strip().splitlines()[0]
            raise ModelError(
                f"torch.compile cannot compile {self.name}: {said}. {_cure(said)}; or choose the runtime 'torch'"
            ) from cause


def _cure(said: str) -> str:
    """What helps against what a compiler has said."""
    torn = re.search(r"(\S+\.so): file too short", said)
    if torn:  # by a process that was killed while it compiled
        return f"A file of its cache is damaged: remove '{torn[1]}'"
    if shutil.which(os.environ.get("CXX") or "g++") is None and shutil.which("clang++") is None:
        return "It needs a C++ compiler (apt-get install g++)"
    return "Check its C++ compiler (CXX, or g++)"


def _function_of(module: nn.Module) -> FunctionType:
    """A function that calls the module, with code of its own.

    PyTorch keeps what it compiled by code, looks through all of it at every call, and goes back to running layer by
    layer after eight compilations of one code: many modules of one class would be slow, the ninth not compiled at all.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    code = call.__code__.replace(co_name=f"call_{next(_NUMBERS)}")
    return FunctionType(code, call.__globals__, code.co_name, closure=call.__closure__)
