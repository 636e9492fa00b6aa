"""PyTorch through ``torch.compile``; on a processor it needs a C++ compiler."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ModelError
from .torch_runtime import TorchSession


class CompiledSession(TorchSession):
    """A module compiled for the shapes it is called with; the first batch of a shape takes long."""

    runtime = "torch-compile"

    def _open(self, source: Any) -> None:
        super()._open(source)
        self.eager = self.module
        self.module = torch.compile(self.eager, dynamic=False)

    def _run(self, inputs: Any) -> Any:
        try:
            return super()._run(inputs)
        except ModelError as error:
            cause = error.__cause__
            if not type(cause).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise ModelError(
                f"torch.compile cannot compile {self.name}: {str(cause).strip().splitlines()[0]}. It needs a C++ "
                "compiler (apt-get install g++); or choose the runtime 'torch'"
            ) from cause
