"""What a conversion does to the denoiser's output: one noisy latent, the same for every file and tool."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ..adapter.attached import Adapter
from ..adapter.components import denoiser, text_encoders
from ..files.adapter_file import load_adapter
from ..teaching.families import Family, family_of
from ..teaching.objective import Objective
from .algebra import LoraWeights


@torch.no_grad()
def denoiser_output(family: Family, prompt: str, seed: int = 0) -> Tensor:
    """The prediction (1, C, h, w) in float32 for noise of ``seed`` at the model's own resolution."""
    generator = torch.Generator().manual_seed(seed)
    model = family.model
    size = family.resolution // int(family.pipe.vae_scale_factor)
    channels = family.latent_channels
    device, dtype = model.device, next(model.parameters()).dtype
    latents = torch.randn(1, channels, size, size, generator=generator).to(device)
    sample, timesteps = _noisy(family.pipe.scheduler, latents, generator)
    time_ids = torch.tensor([[family.resolution] * 2 + [0, 0] + [family.resolution] * 2]).float().to(device)
    text = family.encode_text([prompt])
    return family.predict(sample.to(dtype), timesteps, text, time_ids).float()


def _noisy(scheduler: Any, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As in training; for models whose training noise is not known (EDM, distilled), as sampling starts."""
    try:
        noisy = Objective(scheduler)(latents, generator)
        return noisy.sample, noisy.timesteps
    except ModelError:
        own = type(scheduler).from_config(scheduler.config)
        own.set_timesteps(4)
        step = own.timesteps[:1].to(latents.device)
        return own.scale_model_input(latents * own.init_noise_sigma, step[0]), step


@contextlib.contextmanager
def lora_on(models: Mapping[str, nn.Module], factors: Mapping[str, Mapping[str, LoraWeights]]) -> Iterator[None]:
    """The model as if ``W + up @ down`` stood in its layers, by hooks: no weight is touched."""
    hooks = []
    for component, layers in factors.items():
        names = {name.removeprefix("text_model."): module for name, module in models[component].named_modules()}
        for path, (down, up) in layers.items():
            hooks.append(names[path].register_forward_hook(_adds(down, up)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adds(down: Tensor, up: Tensor) -> Any:
    def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        return out + ((x @ down.to(x).T) @ up.to(x).T).to(out.dtype)

    return add


def output_error(handle: Adapter, factors: Mapping[str, Mapping[str, LoraWeights]], prompt: str) -> float:
    """``|out(LoRA) - out(adapter)| / |out(adapter) - out(base)|`` on one noisy latent; 1: as bad as leaving it out."""
    family = family_of(handle.pipe)
    name, model = denoiser(handle.pipe)
    models = {name: model, **text_encoders(handle.pipe)}
    enabled = handle.enabled
    try:
        handle.enabled = True
        wanted = denoiser_output(family, prompt)
        handle.enabled = False
        plain = denoiser_output(family, prompt)
        with lora_on(models, factors):
            got = denoiser_output(family, prompt)
    finally:
        handle.enabled = enabled
    effect = (wanted - plain).norm()
    return float((got - wanted).norm() / effect) if effect > 0 else 0.0


def difference(pipe: Any, before: Path, after: Path, prompt: str | None = None) -> float:
    """``|out(after) - out(before)| / |out(before) - out(base)|`` of two adapter files, as :func:`output_error`.

    Args:
        prompt: what to draw; by default the one that the first was taught with.
    """
    family = family_of(pipe)
    found = []
    for path in (before, after):
        handle = load_adapter(pipe, path, name="comcat-probe")
        try:
            text = str(handle.info["prompt"] or "") if prompt is None else prompt
            found.append(denoiser_output(family, text))
            handle.enabled = False
            plain = denoiser_output(family, text)
        finally:
            handle.remove()
    effect = (found[0] - plain).norm()
    return float((found[1] - found[0]).norm() / effect) if effect > 0 else 0.0
