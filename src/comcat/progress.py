"""How long work reports where it is: any callable ``progress(stage, done, total)``; ``total`` may be None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

Progress = Callable[[str, int, Optional[int]], None]  # noqa: UP045 - evaluated at run time on Python 3.10
