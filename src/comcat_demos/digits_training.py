"""Training a tiny Stable Diffusion from scratch: the VAE first, then the UNet and the text encoder on its latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from comcat.progress import Progress

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class Course:
    """How long, on how many images a step, and how fast: of the VAE (``vae_...``) and of all else."""

    vae_steps: int
    steps: int
    batch_size: int = 32
    vae_batch_size: int = 32
    vae_lr: float = 2e-3
    lr: float = 2e-3


def train_parts(
    pipe: StableDiffusionPipeline,
    images: Tensor,
    text: Callable[[Tensor], Tensor],
    course: Course,
    progress: Progress | None = None,
) -> None:
    """Train all parts of ``pipe`` in place, with torch's own random numbers.

    Args:
        images: (N, 3, height, width) in [0, 1].
        text: indices of a batch (n,) -> what the text encoder makes of its captions (n, tokens, width).
        progress: called as ``progress("VAE" or "diffusion", steps done, steps)``.
    """
    images = images * 2 - 1
    _train_vae(pipe, images, course, progress)
    _train_diffusion(pipe, _encode(pipe, images), text, course, progress)


def _train_vae(pipe: StableDiffusionPipeline, images: Tensor, course: Course, progress: Progress | None) -> None:
    """Squared error and a light pull of the latents towards a standard normal. ``images`` are in [-1, 1]."""
    vae = pipe.vae.train()
    optimizer, schedule = _optimizer(list(vae.parameters()), course.vae_lr, course.vae_steps)
    for step, batch in enumerate(_batches(len(images), course.vae_batch_size, course.vae_steps)):
        posterior = vae.encode(images[batch]).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, images[batch])
        loss = loss + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        _step(loss, optimizer, schedule)
        if progress:
            progress("VAE", step + 1, course.vae_steps)
    vae.eval()


def train_decoder(
    pipe: StableDiffusionPipeline, images: Tensor, steps: int, course: Course, progress: Progress | None = None
) -> None:
    """Train the VAE's decoder on, in place; latents and all that was trained on them stay what they are."""
    images = images * 2 - 1
    vae = pipe.vae.train()
    optimizer, schedule = _optimizer(
        [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()], course.vae_lr, steps
    )
    for step, batch in enumerate(_batches(len(images), course.vae_batch_size, steps)):
        with torch.no_grad():
            latents = vae.encode(images[batch]).latent_dist.sample()
        _step(F.mse_loss(vae.decode(latents).sample, images[batch]), optimizer, schedule)
        if progress:
            progress("decoder", step + 1, steps)
    vae.eval()


@torch.no_grad()
def _encode(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """The latents, (N, 4, 8, 8), scaled to a standard deviation of one; the VAE remembers the scale."""
    latents = torch.cat([pipe.vae.encode(batch).latent_dist.mean for batch in images.split(256)])
    pipe.vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * pipe.vae.config.scaling_factor


def _train_diffusion(
    pipe: StableDiffusionPipeline,
    latents: Tensor,
    text: Callable[[Tensor], Tensor],
    course: Course,
    progress: Progress | None,
) -> None:
    """Noise prediction (Ho et al. 2020); some captions are empty, for guidance (Ho and Salimans 2022).

    The weight of a time, 1 / (alpha + 0.05) with alpha the share of the signal's power, is nearly that of predicting
    the velocity (Salimans and Ho 2022): in the noisiest images, where the digit is decided, a small error in the
    noise is a large one in the image. Without it 97 % of right digits become 58 % after the same few steps.
    """
    alphas = pipe.scheduler.alphas_cumprod
    weights = 1 / (alphas + 0.05)
    weights /= weights.mean()
    unet, text_encoder = pipe.unet.train(), pipe.text_encoder.train()
    optimizer, schedule = _optimizer([*unet.parameters(), *text_encoder.parameters()], course.lr, course.steps)
    for step, batch in enumerate(_batches(len(latents), course.batch_size, course.steps)):
        n = len(batch)
        # One time in each of n equal parts of the range: the loss varies less than with independent times.
        times = ((torch.arange(n) + torch.rand(n)) * (len(alphas) / n)).long()
        noise = torch.randn(n, *latents.shape[1:])
        alpha = alphas[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents[batch] + (1 - alpha).sqrt() * noise
        errors = (unet(noisy, times, text(batch)).sample - noise).square().mean(dim=(1, 2, 3))
        _step((errors * weights[times]).mean(), optimizer, schedule)
        if progress:
            progress("diffusion", step + 1, course.steps)
    unet.eval()
    text_encoder.eval()


def _batches(count: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Indices of ``steps`` batches: one random order of all images after the other."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(count)])
        yield order[:batch_size]
        order = order[batch_size:]


def _optimizer(parameters: list[Any], rate: float, steps: int) -> tuple[Any, Any]:
    """AdamW with a one-cycle learning rate, and the schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(steps, 2), pct_start=0.1, cycle_momentum=False)
    return optimizer, schedule


def _step(loss: Tensor, optimizer: Any, schedule: Any) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
