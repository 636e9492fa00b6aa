"""The oldest versions of the libraries that open safely what users were given; ``pyproject.toml`` has none below."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from ..errors import ModelError

#: Older ones read weights as pickles that can run code, or let them through where they say that they do not.
LEAST = {"timm": "1.0.26", "torch": "2.6"}


def check_versions() -> None:
    """Raise ModelError where an older one is installed, whatever installed it."""
    import timm
    import torch

    for name, module in (("timm", timm), ("torch", torch)):
        try:
            found = Version(Version(module.__version__).base_version)
        except InvalidVersion:  # somebody's own build
            continue
        if found < Version(LEAST[name]):
            raise ModelError(
                f"{name} {module.__version__} is installed, and comcat needs {LEAST[name]} or newer: older ones can "
                f"run code from files of weights. Upgrade it: pip install '{name}>={LEAST[name]}'"
            )
