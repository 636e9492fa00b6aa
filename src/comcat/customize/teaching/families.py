"""How each family of text-to-image pipelines is trained: text, latents, and the call of its denoiser.

| family | pipelines | text | prediction |
|---|---|---|---|
| stable diffusion | SD 1.x, 2.x | CLIP | epsilon or v |
| sdxl | SDXL | two CLIPs, pooled, micro-conditioning | epsilon or v |
| sd3 | SD3, SD3.5 | two CLIPs and T5, pooled | flow |
| flux | FLUX.1 | T5, pooled CLIP | flow |
| pixart | PixArt-alpha, -sigma | T5 with mask | epsilon, learned variance left alone |

Chroma, Qwen-Image, FLUX.2, Z-Image, Lumina 2 and SANA are in :mod:`comcat.customize.teaching.flow_families`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ..adapter.components import denoiser

Text = dict[str, Tensor]


class Family:
    """Stable Diffusion 1.x and 2.x, and what the others share.

    Args:
        pipe: the pipeline.
    """

    #: Names of pipeline classes, without "Pipeline" and what follows it.
    names: ClassVar[tuple[str, ...]] = ("StableDiffusion",)
    #: Parts without which nothing can be trained.
    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "tokenizer")

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        model: Any = denoiser(pipe)[1]
        self.model = model
        lacking = [name for name in self.needs if getattr(pipe, name, None) is None]
        if lacking:
            raise ModelError(
                f"this {type(pipe).__name__} has no {' and no '.join(lacking)}, which training needs; open it with all "
                "of its parts"
            )
        self.vae: Any = pipe.vae
        taken, given = model.config.get("in_channels"), self.channels
        if given and taken != given:
            raise ModelError(
                f"the {type(self.model).__name__} of this pipeline takes {taken} channels, and a text-to-image model "
                f"with its VAE takes {given}: it was made for inpainting, or for another input beside the noise, and "
                "cannot be trained; give the text-to-image model that it was made from"
            )

    @property
    def channels(self) -> int | None:
        """Channels that the denoiser takes where its input is the noise alone; None: the VAE does not say."""
        found = self.vae.config.get("latent_channels")
        return None if found is None else int(found)

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents that it is trained on."""
        return int(self.vae.config.latent_channels)

    @property
    def multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        levels = len(getattr(self.model.config, "block_out_channels", (0,)))
        return int(self.pipe.vae_scale_factor) * 2 ** (levels - 1)

    @property
    def resolution(self) -> int:
        """The model's own resolution in pixels."""
        size = self.model.config.sample_size
        return int(size if isinstance(size, int) else max(size)) * int(self.pipe.vae_scale_factor)

    def encode_text(self, captions: Sequence[str]) -> Text:
        """Everything the denoiser needs of each caption, first dimension (batch)."""
        embeds, _ = self.pipe.encode_prompt(list(captions), self.model.device, 1, False)
        return {"embeds": embeds}

    def joined(self, rows: Sequence[Text]) -> Text:
        """The texts of one batch from those of its captions; shorter ones are filled up with zeros, masks too."""
        longest = {key: max(row[key].shape[1] for row in rows) for key, t in rows[0].items() if t.ndim > 1}

        def padded(key: str, t: Tensor) -> Tensor:
            missing = longest[key] - t.shape[1] if key in longest else 0
            return nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (0, missing)) if missing else t

        return {key: torch.cat([padded(key, row[key]) for row in rows]) for key in rows[0]}

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, h, w) in [-1, 1] to mean and standard deviation of their latents, scaled as the model expects them.

        A VAE that asks for it (``force_upcast``) works in float32.

        Raises:
            ModelError: the VAE has no distribution of latents, such as AutoencoderTiny, or its configuration says
                nothing of how latents are scaled.
        """
        with _upcast(self.vae):
            found = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        distribution = getattr(found, "latent_dist", None)
        if distribution is None or self.vae.config.get("scaling_factor") is None:
            raise ModelError(
                f"training needs the model's own VAE, and {type(self.vae).__name__} does not say how latents are "
                "distributed and scaled; give the pipeline its AutoencoderKL"
            )
        mean, scale = self._statistics(distribution.mean.float())
        return (distribution.mean.float() - mean) * scale, distribution.std.float() * scale

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale) of latents, per channel where the VAE has statistics of its own."""
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:  # one alone is ignored, as in diffusers
            means, stds = (torch.tensor(values).to(like).view(1, -1, 1, 1) for values in (mean, std))
            return means, config.scaling_factor / stds
        return config.get("shift_factor") or 0.0, config.scaling_factor

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        """The denoiser's output for (B, C, h, w) at time steps (B,); ``time_ids`` (B, 6) say how photos were framed."""
        return self.model(noisy, timesteps, encoder_hidden_states=text["embeds"], return_dict=False)[0]


class StableDiffusionXL(Family):
    """SDXL."""

    names: ClassVar[tuple[str, ...]] = ("StableDiffusionXL",)
    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def encode_text(self, captions: Sequence[str]) -> Text:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(captions), device=self.model.device, do_classifier_free_guidance=False
        )
        return {"embeds": embeds, "pooled": pooled}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        added = {"text_embeds": text["pooled"], "time_ids": time_ids.to(text["pooled"].dtype)}
        return self.model(
            noisy, timesteps, encoder_hidden_states=text["embeds"], added_cond_kwargs=added, return_dict=False
        )[0]


class StableDiffusion3(Family):
    """SD3 and SD3.5."""

    names = ("StableDiffusion3",)
    needs = StableDiffusionXL.needs

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor) * int(self.model.config.patch_size)

    def encode_text(self, captions: Sequence[str]) -> Text:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(captions), None, None, device=self.model.device, do_classifier_free_guidance=False
        )
        return {"embeds": embeds, "pooled": pooled}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        return self.model(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=text["embeds"],
            pooled_projections=text["pooled"],
            return_dict=False,
        )[0]


class Flux(Family):
    """FLUX.1: latents in patches of 2 x 2, guidance as an input where it was distilled."""

    names: ClassVar[tuple[str, ...]] = ("Flux",)
    needs: ClassVar[tuple[str, ...]] = StableDiffusionXL.needs

    @property
    def channels(self) -> int | None:
        found = super().channels
        return None if found is None else 4 * found  # patches of 2 x 2

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor) * 2

    @property
    def resolution(self) -> int:
        return int(self.pipe.default_sample_size) * int(self.pipe.vae_scale_factor)

    def encode_text(self, captions: Sequence[str]) -> Text:
        embeds, pooled, _ = self.pipe.encode_prompt(list(captions), None, device=self.model.device)
        return {"embeds": embeds, "pooled": pooled}

    def guidance(self, noisy: Tensor) -> Tensor | None:
        """As for a model that was never distilled: the guidance that leaves its output alone."""
        guided = self.model.config.get("guidance_embeds")
        return torch.ones(len(noisy), device=noisy.device) if guided else None

    def places(self, noisy: Tensor, text: Text) -> dict[str, Tensor]:
        """Where the tokens of text and image are."""
        batch, _, height, width = noisy.shape
        ids = self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype)
        return {"img_ids": ids, "txt_ids": noisy.new_zeros(text["embeds"].shape[1], 3)}

    def inputs(self, noisy: Tensor, text: Text) -> dict[str, Any]:
        """What the denoiser takes beside latents, time and text."""
        own = {"guidance": self.guidance(noisy), "pooled_projections": text["pooled"]}
        return {**own, **self.places(noisy, text)}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        batch, channels, height, width = noisy.shape
        packed = self.model(
            hidden_states=self.pipe._pack_latents(noisy, batch, channels, height, width),
            timestep=timesteps / 1000,
            encoder_hidden_states=text["embeds"],
            **self.inputs(noisy, text),
            return_dict=False,
        )[0]
        patches = packed.view(batch, height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)


class PixArt(Family):
    """PixArt-alpha and -sigma: T5 with a mask, and a variance beside the prediction."""

    names = ("PixArtAlpha", "PixArtSigma")

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor) * int(self.model.config.patch_size)

    def encode_text(self, captions: Sequence[str]) -> Text:
        embeds, mask, _, _ = self.pipe.encode_prompt(
            list(captions), do_classifier_free_guidance=False, device=self.model.device
        )
        return {"embeds": embeds, "mask": mask}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        extra: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            size = time_ids[:, 4:6].to(noisy.dtype)
            extra = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        out = self.model(
            noisy,
            encoder_hidden_states=text["embeds"],
            encoder_attention_mask=text["mask"],
            timestep=timesteps,
            added_cond_kwargs=extra,
            return_dict=False,
        )[0]
        return out[:, : noisy.shape[1]]


@contextlib.contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """float32 for a VAE whose activations leave the range of half precision, and its own dtype afterwards."""
    before = vae.dtype
    if not vae.config.get("force_upcast") or before not in (torch.float16, torch.bfloat16):
        yield
        return
    with torch.autocast(vae.device.type, enabled=False):
        vae.to(torch.float32)
        try:
            yield
        finally:
            vae.to(before)


FAMILIES: tuple[type[Family], ...] = (Family, StableDiffusionXL, StableDiffusion3, Flux, PixArt)


def family_of(pipe: Any) -> Family:
    """How this pipeline is trained.

    Raises:
        ModelError: it is of a kind that is not known, or a bare model without its text encoder and VAE.
    """
    from .flow_families import FLOW_FAMILIES

    if isinstance(pipe, nn.Module):
        raise ModelError("training needs the whole pipeline with its text encoder and VAE, not the model alone")
    name = type(pipe).__name__.partition("Pipeline")[0]
    families = (*FAMILIES, *FLOW_FAMILIES)
    for family in families:
        if name in family.names:
            return family(pipe)
    if hasattr(pipe, "video_processor"):
        raise ModelError(
            f"{type(pipe).__name__} draws videos, and only pictures can be taught here. Adapters go onto its "
            "transformer (add_adapter), are saved and loaded; train them in a loop of your own"
        )
    known = ", ".join(f"{n}Pipeline" for family in families for n in family.names)
    raise ModelError(f"{type(pipe).__name__} cannot be trained; known are {known}. Its adapters can still be used")
