"""What the denoiser learns: to undo the noise of its scheduler.

    DDPM    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) e      target: e, or v = sqrt(abar_t) e - sqrt(1 - abar_t) x, or x
    flow    x_t = (1 - s) x + s e                          target: e - x, s logit-normal, then shifted as for sampling

Sources: DreamBooth (arXiv 2208.12242), min-SNR weighting (arXiv 2303.09556), SD3's flow matching (arXiv 2403.03206).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ModelError, TrainingError


class Noisy(NamedTuple):
    """A batch on its way.

    Attributes:
        sample, target: (B, C, h, w); timesteps: (B,); weight: (B,), of each example's loss.
    """

    sample: Tensor
    target: Tensor
    timesteps: Tensor
    weight: Tensor


#: Schedulers of diffusers that sample a model trained with DDPM's noise, by their betas. Others have noise of
#: their own: EDM's preconditioned inputs, the few steps of distilled models (LCM, TCD), cascades, discrete states.
DDPM = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDIMParallel",
        "DDPM",
        "DDPMParallel",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSDE",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LMSDiscrete",
        "PNDM",
        "SASolver",
        "UniPCMultistep",
    )
)

#: Those that sample a model trained by flow matching; the solvers among DDPM's do so with "flow_prediction".
FLOW = frozenset(("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"))


class Objective:
    """The training noise that belongs to a pipeline's scheduler.

    Args:
        scheduler: as the pipeline samples with it; the noise is that of its training.
        snr_gamma: cap of min-SNR weighting, or None.

    Raises:
        ModelError: the model behind the scheduler was trained with other noise than is known here, e.g. EDM's.
        TrainingError: min-SNR for flow matching.
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        from diffusers import DDPMScheduler

        self.snr_gamma = snr_gamma
        self.config = scheduler.config
        self.flow = _trained_by_flow(scheduler)
        if self.flow:
            if snr_gamma is not None:
                raise TrainingError("min-SNR weighting has no meaning for flow matching; leave snr_gamma out")
            return
        self.kind = self.config.get("prediction_type", "epsilon")
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(f"the scheduler's prediction type {self.kind!r} is not known; use epsilon or v_prediction")
        try:
            self.ddpm: Any = DDPMScheduler.from_config(self.config)
        except NotImplementedError as error:
            raise ModelError(
                f"the scheduler's beta_schedule {self.config.get('beta_schedule')!r} is not one of DDPM's; {_OWN_NOISE}"
            ) from error

    def __call__(self, latents: Tensor, generator: torch.Generator) -> Noisy:
        """Noise for latents (B, C, h, w); random numbers come from ``generator``, on the CPU."""
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return self._flow(latents, noise, generator) if self.flow else self._ddpm(latents, noise, generator)

    def _ddpm(self, latents: Tensor, noise: Tensor, generator: torch.Generator) -> Noisy:
        steps = self.ddpm.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(latents),), generator=generator).to(latents.device)
        target = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: self.ddpm.get_velocity(latents, noise, timesteps),
            "sample": lambda: latents,
        }[self.kind]()
        return Noisy(self.ddpm.add_noise(latents, noise, timesteps), target, timesteps, self._snr_weight(timesteps))

    def _snr_weight(self, timesteps: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        abar = self.ddpm.alphas_cumprod.to(timesteps.device)[timesteps].double()
        snr = abar / (1 - abar)
        capped = snr.clamp(max=self.snr_gamma)
        # In units of the loss on x, whose weight is min(snr, gamma).
        unit = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.kind]
        # A terminal SNR of zero leaves nothing to learn for epsilon.
        return (capped / unit).nan_to_num(1.0).float()

    def _flow(self, latents: Tensor, noise: Tensor, generator: torch.Generator) -> Noisy:
        sigma = torch.randn(len(latents), generator=generator).sigmoid().to(latents)
        config = self.config
        if config.get("use_dynamic_shifting"):
            # The longer the image, the noisier the step, as in sampling: mu is linear in the number of 2 x 2 patches.
            low, high = config["base_image_seq_len"], config["max_image_seq_len"]
            slope = (config["max_shift"] - config["base_shift"]) / (high - low)
            mu = config["base_shift"] + slope * (latents.shape[-2] * latents.shape[-1] / 4 - low)
            factor = (
                torch.tensor(mu).exp().item() if config.get("time_shift_type", "exponential") == "exponential" else mu
            )
        else:
            factor = config.get("shift", config.get("flow_shift", 1.0)) or 1.0
        sigma = factor * sigma / (1 + (factor - 1) * sigma)
        mix = sigma.view(-1, *[1] * (latents.ndim - 1))
        steps = config.get("num_train_timesteps", 1000)
        ones = torch.ones(len(latents), device=latents.device)
        return Noisy((1 - mix) * latents + mix * noise, noise - latents, sigma * steps, ones)


_OWN_NOISE = (
    "if the model was trained with the noise of DDPM or by flow matching, give the pipeline the scheduler of its "
    "training, e.g. pipe.scheduler = DDIMScheduler.from_pretrained(BASE, subfolder='scheduler')"
)


def _trained_by_flow(scheduler: Any) -> bool:
    """Whether by flow matching, or with DDPM's noise; ModelError where by neither."""
    config, name = scheduler.config, type(scheduler).__name__
    kinds = {kind.__name__ for kind in type(scheduler).__mro__}
    if not kinds & (DDPM | FLOW):
        edm = "EDM" in name or "sigma_data" in config
        noise = "EDM, whose inputs are preconditioned" if edm else "neither DDPM nor flow matching"
        raise ModelError(f"models sampled with {name} cannot be trained: their noise is that of {noise}; {_OWN_NOISE}")
    # Settings under which known schedulers serve models with other noise.
    other = {
        "timestep_type": config.get("timestep_type") == "continuous",  # EDM's
        "invert_sigmas": bool(config.get("invert_sigmas")),
    }
    flow = bool(kinds & FLOW) or config.get("prediction_type") == "flow_prediction"
    other["use_flow_sigmas"] = bool(config.get("use_flow_sigmas")) and not flow
    for setting, found in other.items():
        if found:
            raise ModelError(
                f"models sampled with {name} and {setting}={config.get(setting)!r} cannot be trained: their noise is "
                f"neither that of DDPM nor of flow matching; {_OWN_NOISE}"
            )
    return flow


def loss(prediction: Tensor, noisy: Noisy) -> Tensor:
    """Mean over the batch of the weighted mean squared errors, in float32."""
    errors = (prediction.float() - noisy.target.float()).square().flatten(1).mean(1)
    return (errors * noisy.weight).mean()
