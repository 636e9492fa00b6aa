"""What a figure was measured on and with: the device by its name, and the versions of the packages that ran."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .._version import __version__

#: Import name -> name of the distribution, of all that decides what comes out.
_PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
    "open_clip": "open_clip_torch",
}


def versions() -> dict[str, str]:
    """Version by name: comcat, Python, and those of the packages above that have been imported."""
    found = {"comcat": __version__, "python": platform.python_version()}
    for module, name in _PACKAGES.items():
        if module in sys.modules:
            try:
                found[name] = version(name)
            except PackageNotFoundError:  # run from a checkout
                found[name] = str(getattr(sys.modules[module], "__version__", "unknown"))
    return found


def device_name(device: torch.device) -> str:
    """The processor or accelerator, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
