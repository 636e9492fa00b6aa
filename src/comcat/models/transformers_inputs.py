"""What a model of transformers is called with: images in the form that it takes, and what it wants besides.

Both are read off the signature of ``forward`` and the configuration. What these do not say is kept here by the type of
the configuration.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .modes import evaluating
from .running import explained

#: Tokens of text, at most.
_TOKENS = 11
#: How many values a row of patches has is not the only form: here their axes stay apart.
_PATCHES: dict[str, Callable[[int, int, int], tuple[int, ...]]] = {
    "kimi_k25_vision": lambda count, channels, patch: (count, channels, patch, patch),
    "paddleocr_vl_vision": lambda count, channels, patch: (1, count, channels, patch, patch),
}
#: Patches of all images in one row, but one row for each when the model is called.
_PADDED = ("colqwen2",)
#: Two images are compared.
_PAIRS = ("superglue", "lightglue", "efficientloftr")
#: Images of a text have an axis of their own.
_OF_TEXTS = ("idefics", "modernvbert")
#: Configurations that speak of frames beside images.
_STILL = ("perceiver",)
#: Patches in a row for each image, without more.
_ROWS = ("molmo2_vision",)


@dataclass
class TransformersInputs:
    """Of one call.

    Attributes:
        names: of the arguments of ``forward``; size: (C, H, W) of an image.
        pixels: makes values of pixels of a shape; generator, device: of all else.
    """

    model: Any
    names: Sequence[str]
    size: Sequence[int]
    images: int
    pixels: Callable[..., Tensor]
    generator: torch.Generator
    device: torch.device

    @property
    def config(self) -> Any:
        return getattr(self.model.config, "vlm_config", None) or self.model.config

    @property
    def vision(self) -> Any:
        """The part of the configuration that speaks of images."""
        return getattr(self.config, "vision_config", None) or self.config

    @cached_property
    def patch(self) -> int:
        return number(self.vision, "patch_size", 16)

    @cached_property
    def grid(self) -> list[int]:
        """Patches from top to bottom and from left to right, a multiple of those that are merged."""
        by = max(number(self.vision, name, 1) for name in ("spatial_merge_size", "merge_kernel_size", "merge_size"))
        by = number(self.vision, "pooling_kernel_size", by)
        return [max(by, n // self.patch // by * by) for n in self.size[1:]]

    def arguments(self) -> dict[str, Any] | None:
        """All of them, or None where the model wants images alone."""
        found = self._pixels()
        if found is not None:
            found |= self._besides()
            if "input_ids" in self.names and (vocabulary := number(self._text, "vocab_size", 0)):
                found["input_ids"] = self._words(found, vocabulary)
                length = found["input_ids"].shape[1]
                if "image_attention_mask" in self.names:  # which words see which images
                    found["image_attention_mask"] = self._ones(self.images, length, 1)
                if "bbox" in self.names:  # where the words stand on the page
                    found["bbox"] = self._ones(self.images, length, 4)
        return found

    # -- images --------------------------------------------------------------------------------------------------

    def _pixels(self) -> dict[str, Any] | None:
        names = self.names
        if "grid_thw" in names or "image_grid_thw" in names:
            return self._rows_of_all()
        if "spatial_shapes" in names:  # NaFlex: patches, as many as the image has
            mask = "pixel_attention_mask" if "pixel_attention_mask" in names else "attention_mask"
            return {
                "pixel_values": self._rows(),
                mask: self._ones(self.images, self._count),
                "spatial_shapes": torch.tensor([self.grid] * self.images, device=self.device),
            }
        if "pixel_position_ids" in names:
            x, y = torch.meshgrid(*(torch.arange(n, device=self.device) for n in self.grid[::-1]), indexing="xy")
            places = torch.stack([x.flatten(), y.flatten()], -1).expand(self.images, -1, -1)
            return {"pixel_values": self._rows(), "pixel_position_ids": places}
        if "pixel_values_videos" in names and "pixel_values" not in names:
            return {"pixel_values_videos": self.pixels(self.images, self._frames, *self.size)}
        if "pixel_values" not in names:
            return None
        if getattr(self.vision, "model_type", None) in _ROWS:
            return {"pixel_values": self._rows()}
        channels, height, width = self.size
        if "prompt_pixel_values" in names:  # an image below an example of it: one of half the height
            height = max(self.patch, height // 2)
        values = self.pixels(self.images, *self._several(), channels, height, width)
        more = [name for name in ("prompt_pixel_values", "prompt_masks") if name in names]
        return {"pixel_values": values} | {name: values.clone() for name in more}

    def _several(self) -> list[int]:
        """Axes between that of the examples and that of the channels."""
        if "aspect_ratio_ids" in self.names:  # tiles of an image
            return [1, number(self.vision, "max_num_tiles", 1)]
        if self.config.model_type in _PAIRS:
            return [2]
        if {"input_ids", "pixel_attention_mask"} <= set(self.names) or self.config.model_type in _OF_TEXTS:
            return [1]  # images of a text
        return [self._frames] if hasattr(self.vision, "num_frames") and self.config.model_type not in _STILL else []

    def _rows_of_all(self) -> dict[str, Any]:
        """Patches of all images in one row, as Qwen2-VL has them."""
        grid = "grid_thw" if "grid_thw" in self.names else "image_grid_thw"
        name = "pixel_values" if "pixel_values" in self.names else self.names[0]
        deep = number(self.vision, "temporal_patch_size", number(self.vision, "patch_temporal", 1))
        count, channels = self.images * self._count, self.size[0]
        form = _PATCHES.get(getattr(self.vision, "model_type", ""))
        width = channels * deep * self.patch**2
        values = self.pixels(*(form(count, channels, self.patch) if form else (count, width)))
        if self.model.config.model_type in _PADDED:
            values = values.unflatten(0, (self.images, -1))
        return {name: values, grid: torch.tensor([[1, *self.grid]] * self.images, device=self.device)}

    @property
    def _count(self) -> int:
        return self.grid[0] * self.grid[1]

    def _rows(self) -> Tensor:
        return self.pixels(self.images, self._count, self.size[0] * self.patch**2)

    @property
    def _frames(self) -> int:
        return number(self.vision, "num_frames", number(self.vision, "frames_per_clip", 1))

    # -- what is wanted besides ----------------------------------------------------------------------------------

    def _besides(self) -> dict[str, Any]:
        made: dict[str, Callable[[], Tensor]] = {
            "aspect_ratio_ids": lambda: self._ones(self.images, 1),
            "aspect_ratio_mask": lambda: self._ones(self.images, 1, number(self.vision, "max_num_tiles", 1)),
            "merge_sizes": lambda: self._ones(self.images),
            "task_inputs": lambda: self._ids(99, self.images, number(self.config, "task_seq_len", _TOKENS)),
            "classes_structure": lambda: self._ones(self.images),
        }
        for what in ("classes", "tasks"):
            made[f"{what}_input_ids"] = lambda: self._ids(number(self._text, "vocab_size", 99), self.images, _TOKENS)
            made[f"{what}_attention_mask"] = lambda: self._ones(self.images, _TOKENS)
        return {name: make() for name, make in made.items() if name in self.names}

    @property
    def _text(self) -> Any:
        return getattr(self.config, "text_config", None) or self.config

    def _words(self, found: Mapping[str, Any], vocabulary: int) -> Tensor:
        """Tokens of text, and those in whose place the features of the images are put."""
        words = self._ids(vocabulary, self.images, min(number(self._text, "max_position_embeddings", 77), _TOKENS))
        named = [one for name in _IMAGE if type(one := getattr(self.config, name, None)) is int]
        count = self._features(found) if named else 0
        if not count:
            return words
        token = named[0]
        words = words + (words == token) * (1 if token + 1 < vocabulary else -1)
        return torch.cat([words[:, :1], words.new_full((self.images, count), token), words[:, 1:]], 1)

    def _features(self, found: Mapping[str, Any]) -> int:
        """Of one image, as many as the model has to put in place of tokens."""
        model: Any = next((one for one in self.model.modules() if hasattr(one, "get_image_features")), None)
        if model is None:
            return 0
        taken = inspect.signature(model.get_image_features).parameters
        given = {name: value for name, value in found.items() if name in taken}
        if self.model.config.model_type in _PADDED:
            given["pixel_values"] = given["pixel_values"].flatten(0, 1)
        with explained(found["pixel_values"]), evaluating(self.model), torch.no_grad():
            made = model.get_image_features(**given)
        made = getattr(made, "pooler_output", made)
        if isinstance(made, (tuple, list)):
            return sum(len(one) for one in made) // self.images
        return int(made.shape[:-1].numel()) // self.images

    def _ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.int64, device=self.device)

    def _ids(self, vocabulary: int, *shape: int) -> Tensor:
        return torch.randint(1, max(2, vocabulary), shape, generator=self.generator).to(self.device)


_IMAGE = ("image_token_id", "image_token_index")


def number(config: Any, name: str, default: int) -> int:
    """A positive whole number of a configuration, the last one of several."""
    value = getattr(config, name, None)
    if isinstance(value, (tuple, list)) and value:
        value = value[-1]
    return value if type(value) is int and value > 0 else default
