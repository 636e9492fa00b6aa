"""Running a model where people run it: PyTorch, compiled PyTorch, ONNX Runtime, OpenVINO; one interface, one clock.

    run = comcat.runtimes.session("small.onnx", "onnxruntime", threads=2)
    logits, = run(images)                       # NumPy arrays in and out
    seconds = run.seconds([images], repeats=9)

A new runtime is one file with a subclass of :class:`Session`, and a line in :data:`comcat.runtimes.registry.RUNTIMES`.
"""

from typing import TYPE_CHECKING

from .. import _lazy

if TYPE_CHECKING:
    from .realizing import RuntimeClock, realize
    from .registry import available, session
    from .sessions import Port, Session, in_turns

__all__ = ["Port", "RuntimeClock", "Session", "available", "in_turns", "realize", "session"]

_lazy.package(
    __name__,
    {
        "Port": "sessions",
        "RuntimeClock": "realizing",
        "Session": "sessions",
        "available": "registry",
        "in_turns": "sessions",
        "realize": "realizing",
        "session": "registry",
    },
)

del TYPE_CHECKING
