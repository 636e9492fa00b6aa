"""The ways of teaching a concept that are compared, all of which learn a token too: what else they may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

MethodKind = Literal["base", "token", "comcat", "lora", "dora", "lokr", "oft", "full"]
#: Kinds that PEFT puts on the UNet.
PEFT = ("lora", "dora", "lokr", "oft")
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # the matrices beside which comcat's products stand


@dataclass(frozen=True)
class Method:
    """One way to teach a concept.

    Attributes:
        rank: of comcat's products and of LoRA and DoRA; of LoKr's right factor, or 0 for a full one; of OFT the size
            of its blocks. factor: of LoKr, the size of the left factor.
        lr: of all but the token. token_lr: in units of the table's spread; None: that of the contest.
    """

    name: str
    kind: MethodKind
    rank: int = 0
    lr: float = 0.0
    factor: int = 0
    token_lr: float | None = None


def put_on(unet: nn.Module, method: Method, seed: int) -> None:
    """Put a method's parameters on a frozen UNet, in place; those alone ask for gradients then.

    Raises:
        ImportError: PEFT is not installed.
    """
    if method.kind == "full":
        unet.requires_grad_(True)
        return
    from peft import inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(_config(method), unet, "concept")


def _config(method: Method) -> Any:
    from peft import LoKrConfig, LoraConfig, OFTConfig

    rank, shared = method.rank, {"target_modules": _TARGETS}
    if method.kind in ("lora", "dora"):
        return LoraConfig(r=rank, lora_alpha=rank, use_dora=method.kind == "dora", **shared)
    if method.kind == "lokr":
        # A rank above half the right factor's size makes PEFT keep it whole.
        full = 1 << 10
        return LoKrConfig(r=rank or full, alpha=rank or full, decompose_factor=method.factor, **shared)
    return OFTConfig(r=0, oft_block_size=rank, **shared)
