"""A command of comcat in a process of its own, which tells the page what it tells its user.

``python -m comcat.ui.child ARGUMENTS`` writes one JSON object per line to stdout: ``{"stage", "done", "total"}``,
``{"note"}`` or ``{"result"}``. What the command prints for people goes to stderr, the terminal of ``comcat ui``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> int:
    """Run the command of the arguments; its exit code."""
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    import typer

    from ..cli import app, console

    usage: Any = typer.BadParameter.__base__  # click's, or that which typer has in its place

    def tell(event: dict[str, Any]) -> None:
        events.write(json.dumps(event, default=str) + "\n")

    console.listeners.append(tell)
    try:
        return int(app(sys.argv[1:], standalone_mode=False) or 0)
    except usage as error:
        tell({"result": {"error": error.format_message()}})
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
