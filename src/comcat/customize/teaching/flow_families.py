"""How pipelines are trained that read their text with a language model; all by flow matching.

| family | pipelines | text | what is its own |
|---|---|---|---|
| chroma | Chroma | T5, with mask | patches as FLUX.1 |
| qwen image | Qwen-Image | Qwen2.5-VL, with mask | patches as FLUX.1, a VAE of videos |
| flux 2 | FLUX.2, FLUX.2 klein | Mistral or Qwen3 | patches normalized by the VAE's running statistics |
| z image | Z-Image | Qwen3, of any length | lists of images and texts; time runs from 0, the output is negated |
| lumina 2 | Lumina 2 | Gemma, with mask | time runs from 0, the output is negated |
| sana | SANA | Gemma, with mask | a VAE without distribution |
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .families import Family, Flux, Text


def _padded(texts: Sequence[Tensor]) -> Text:
    """Texts (n, D) of any length as one, with the mask of what they are."""
    longest = max(len(text) for text in texts)
    mask = torch.stack([torch.arange(longest, device=text.device) < len(text) for text in texts])
    return {"embeds": torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True), "mask": mask}


class Chroma(Flux):
    """Chroma: FLUX.1 without pooled text and guidance, with the text's padding masked."""

    names: ClassVar[tuple[str, ...]] = ("Chroma",)
    needs: ClassVar[tuple[str, ...]] = Family.needs

    def encode_text(self, captions: Sequence[str]) -> Text:
        embeds, _, mask, *_ = self.pipe.encode_prompt(
            list(captions), device=self.model.device, do_classifier_free_guidance=False
        )
        return {"embeds": embeds, "mask": mask}

    def inputs(self, noisy: Tensor, text: Text) -> dict[str, Any]:
        patches = noisy.shape[-2] * noisy.shape[-1] // 4
        mask = self.pipe._prepare_attention_mask(len(noisy), patches, noisy.dtype, text["mask"])
        return {"attention_mask": mask, **self.places(noisy, text)}


class QwenImage(Flux):
    """Qwen-Image: latents in patches of 2 x 2, one frame of a VAE of videos."""

    names: ClassVar[tuple[str, ...]] = ("QwenImage",)
    needs: ClassVar[tuple[str, ...]] = Family.needs

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.z_dim)

    @property
    def channels(self) -> int | None:
        return 4 * self.latent_channels

    def encode_text(self, captions: Sequence[str]) -> Text:
        embeds, mask = self.pipe.encode_prompt(list(captions), device=self.model.device)
        return {"embeds": embeds, "mask": torch.ones(embeds.shape[:2]).to(embeds) if mask is None else mask}

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        video = images.to(self.vae.device, self.vae.dtype).unsqueeze(2)
        found = self.vae.encode(video).latent_dist
        mean, std = (
            torch.tensor(self.vae.config[name]).to(found.mean.device).view(1, -1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return (found.mean.squeeze(2).float() - mean) / std, found.std.squeeze(2).float() / std

    def inputs(self, noisy: Tensor, text: Text) -> dict[str, Any]:
        shape = (1, noisy.shape[-2] // 2, noisy.shape[-1] // 2)
        mask = text["mask"].bool()
        return {
            "guidance": self.guidance(noisy),
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[shape]] * len(noisy),
        }


class Flux2(Flux):
    """FLUX.2: the VAE's running statistics normalize patches of 2 x 2, which here are latents again afterwards."""

    names: ClassVar[tuple[str, ...]] = ("Flux2", "Flux2Klein")
    needs: ClassVar[tuple[str, ...]] = Family.needs

    def encode_text(self, captions: Sequence[str]) -> Text:
        embeds, _ = self.pipe.encode_prompt(list(captions), device=self.model.device)
        return {"embeds": embeds}

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist
        norm = self.vae.bn
        mean = norm.running_mean.float().view(1, -1, 1, 1)
        std = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        patches, spread = (self.pipe._patchify_latents(t.float()) for t in (found.mean, found.std))
        return self.pipe._unpatchify_latents((patches - mean) / std), self.pipe._unpatchify_latents(spread / std)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        patches = self.pipe._patchify_latents(noisy)
        out = self.model(
            hidden_states=self.pipe._pack_latents(patches),
            timestep=timesteps / 1000,
            guidance=self.guidance(noisy),
            encoder_hidden_states=text["embeds"],
            txt_ids=self.pipe._prepare_text_ids(text["embeds"]).to(noisy.device),
            img_ids=self.pipe._prepare_latent_ids(patches).to(noisy.device),
            return_dict=False,
        )[0]
        unpacked: Tensor = self.pipe._unpatchify_latents(out.transpose(1, 2).reshape(patches.shape))
        return unpacked


class Lumina2(Family):
    """Lumina 2: time runs from noise at 0 to the image at 1, and so does what is predicted."""

    names: ClassVar[tuple[str, ...]] = ("Lumina2", "Lumina2Text2Img")

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor) * 2

    @property
    def resolution(self) -> int:
        return int(getattr(self.pipe, "default_sample_size", 128)) * int(self.pipe.vae_scale_factor)

    def encode_text(self, captions: Sequence[str]) -> Text:
        embeds, mask, *_ = self.pipe.encode_prompt(
            list(captions), do_classifier_free_guidance=False, device=self.model.device
        )
        return {"embeds": embeds, "mask": mask}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        out: Tensor = self.model(
            hidden_states=noisy,
            timestep=1 - timesteps / 1000,
            encoder_hidden_states=text["embeds"],
            encoder_attention_mask=text["mask"],
            return_dict=False,
        )[0]
        return -out


class ZImage(Lumina2):
    """Z-Image: as Lumina 2, with every image and every text by itself."""

    names: ClassVar[tuple[str, ...]] = ("ZImage",)

    def encode_text(self, captions: Sequence[str]) -> Text:
        texts, _ = self.pipe.encode_prompt(list(captions), device=self.model.device, do_classifier_free_guidance=False)
        return _padded(texts)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        texts = [embeds[mask] for embeds, mask in zip(text["embeds"], text["mask"], strict=True)]
        found = self.model(list(noisy.unsqueeze(2)), (1000 - timesteps) / 1000, texts, return_dict=False)[0]
        return -torch.stack(list(found)).squeeze(2)


class Sana(Family):
    """SANA: linear attention on the latents of an autoencoder that has one latent for an image, not a distribution."""

    names: ClassVar[tuple[str, ...]] = ("Sana",)

    @property
    def multiple(self) -> int:
        return int(self.pipe.vae_scale_factor) * int(self.model.config.patch_size)

    def encode_text(self, captions: Sequence[str]) -> Text:
        told = inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"].default
        embeds, mask, *_ = self.pipe.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            device=self.model.device,
            complex_human_instruction=told,
        )
        return {"embeds": embeds, "mask": mask}

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent.float()
        latents = latents * self.vae.config.scaling_factor
        return latents, torch.zeros_like(latents)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        out: Tensor = self.model(
            noisy,
            encoder_hidden_states=text["embeds"].to(noisy.dtype),
            encoder_attention_mask=text["mask"],
            timestep=timesteps * self.model.config.timestep_scale,
            return_dict=False,
        )[0]
        return out[:, : noisy.shape[1]]


FLOW_FAMILIES: tuple[type[Family], ...] = (Chroma, QwenImage, Flux2, Lumina2, ZImage, Sana)
