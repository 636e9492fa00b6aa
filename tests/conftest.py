"""Tiny random hosts: oracles without downloads.

Wherever an architecture allows it every dimension is another prime, so that a transposition cannot hide; all
biases are random and non-zero, and weights are large enough that scores are far from uniform and every layer
matters.
"""

import os
import signal
import socket

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # what reads images forks, of which older ones warn

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import comcat
from comcat.models.profile import default_input_size

# Tiny models do not gain from threads, and lose much where other tests share the cores; child processes neither.
os.environ["OMP_NUM_THREADS"] = THREADS = os.environ.get("COMCAT_TEST_THREADS", "1")
torch.set_num_threads(int(THREADS))

#: 3 heads of width 5, 17 hidden units, 2 x 3 patches, 11 classes.
VIT = {
    "img_size": (14, 21),
    "patch_size": 7,
    "embed_dim": 15,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 17.5 / 15,
    "num_classes": 11,
}
#: Heads of width 5, then 4; 4 x 4 patches in windows of 2 x 2, shifted in every second block.
SWIN = {
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 10,
    "depths": (2, 1),
    "num_heads": (2, 5),
    "window_size": 2,
    "mlp_ratio": 1.7,
    "num_classes": 11,
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters of a size at which the output depends on all of them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        leaf = name.rpartition(".")[2]
        if leaf in ("weight", "gamma", "gamma_1", "gamma_2") and parameter.dim() == 1:
            noise = 1 + 0.2 * noise  # norms and LayerScale
        elif leaf == "weight":
            noise = noise * 1.5 / parameter[0].numel() ** 0.5
        else:
            noise = 0.5 * noise  # biases, tokens, positions, relative position tables
        parameter.data.copy_(noise)
    return model


def make(
    name: str = "vit_tiny_patch16_224", seed: int = 0, dtype: torch.dtype = torch.float64, **args: Any
) -> nn.Module:
    """A randomized timm model in evaluation mode."""
    return randomize(timm.create_model(name, **args), seed).to(dtype).eval()


def vit(seed: int = 0, dtype: torch.dtype = torch.float64, **args: Any) -> nn.Module:
    return make("vit_tiny_patch16_224", seed, dtype, **{**VIT, **args})


def swin(seed: int = 0, dtype: torch.dtype = torch.float64, **args: Any) -> nn.Module:
    return make("swin_tiny_patch4_window7_224", seed, dtype, **{**SWIN, **args})


def images(model: nn.Module, count: int = 7, seed: int = 1) -> Tensor:
    """Random images of the size and dtype that ``model`` takes."""
    parameter = next(model.parameters())
    size = default_input_size(model)
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        parameter.dtype
    )


def calibrated(model: nn.Module, count: int = 96, **args: Any) -> comcat.Calibration:
    return comcat.calibrate(model, images(model, count, seed=2).split(32), **args)


def assert_same_outputs(a: Any, b: Any) -> None:
    """Equal up to rounding: the same weights in memory of another layout may go through another kernel."""
    eps = torch.finfo(b.dtype).eps
    torch.testing.assert_close(a, b, rtol=0, atol=64 * eps * max(1.0, float(b.detach().abs().max())))


@pytest.fixture
def sockets_blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Nothing may reach for the network: a name that is looked up, or an address, fails, and in the end the test."""
    asked: list[Any] = []

    def refuse(*args: Any, **_: Any) -> Any:
        asked.append(args[1:] or args)
        raise OSError(f"the network was asked for: {asked[-1]}")

    for place, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(place, name, refuse)
    for flag in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # what keeps the libraries from asking in the tests
        monkeypatch.delenv(flag, raising=False)
    hub = import_module("huggingface_hub.constants")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(import_module("datasets.config"), "HF_HUB_OFFLINE", False, raising=False)
    yield asked
    assert not asked  # libraries swallow what is raised


@pytest.fixture
def no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip reading off the architecture, most of the time that a tiny compression takes; nothing can be saved."""
    monkeypatch.setattr(import_module("comcat.compression"), "describe", lambda model: None)


def heed_interrupts() -> None:
    """For a child process: Ctrl-C works in it even where the tests themselves run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
