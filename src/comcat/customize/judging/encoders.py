"""What looks at pictures: any image encoder that comcat opens, and a model of images and text (CLIP, SigLIP)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...data import image_transform
from ...errors import ComcatError, DataError, ModelError
from ...evaluation.inference import inference
from ...hosts.classifiers import classifiers
from ...models.dual_encoder import has_text_tower, image_features, open_dual_encoder, text_features
from ...models.opening import load_model
from ...models.preprocessing import configure
from ...models.running import explained, tensors_in
from ...progress import Progress

#: What can be given, for messages.
DINO_EXAMPLES = "vit_small_patch16_224.dino of timm, facebook/dinov2-small of transformers, or a directory"
CLIP_EXAMPLES = "openai/clip-vit-base-patch32 of transformers, open_clip/ViT-B-32/openai, or a directory"
#: Advice of other commands, which encoders have no option for.
_CHECKPOINT = ", or give --checkpoint FILE.safetensors"
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


class ImageEncoder:
    """A model whose features say how alike two pictures are.

    Features are what goes into the classifier where there is one; the class token of a bare transformer; else the mean
    over places. Pictures are prepared as the model says.

    Args:
        model: of any library; name: for messages and reports.
        device: where it runs; None: where it is.

    Raises:
        DataError: the model does not say how its images are normalized.
    """

    def __init__(self, model: nn.Module, name: str, device: torch.device | str | None = None) -> None:
        self.model, self.name, self.device = model, name, device
        try:
            config = configure(model, {})
        except DataError:
            raise DataError(
                f"the {type(model).__name__} '{name}' does not say how its images are normalized: there is no "
                "preprocessor_config.json beside its weights. Put it there"
            ) from None
        self._mode = "L" if config["input_size"][0] == 1 else "RGB"
        self._transform = image_transform(config)

    @classmethod
    def open(cls, name: str, device: torch.device | str | None = None, option: str = "--dino") -> ImageEncoder:
        """An encoder by whatever :func:`comcat.load_model` takes: a directory, a name of timm, a repository.

        Raises:
            ModelError: it cannot be opened; the message names ``option``.
        """
        with _named(option, name, DINO_EXAMPLES):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*its image tower .* is opened")  # that is what is wanted
                model = load_model(name)
            return cls(model, name, device)

    def pictures(
        self,
        files: Sequence[Path],
        read: Callable[[Path], Image.Image],
        batch_size: int = 32,
        progress: Progress | None = None,
        stage: str = "look at pictures",
    ) -> Tensor:
        """(n, D) features of length one, float64 on the CPU.

        Raises:
            ModelError: the model does not run on pictures, or returns no finite numbers.
        """
        found = []
        with inference(self.model, self.device) as (device, dtype):
            for start in range(0, len(files), batch_size):
                batch = files[start : start + batch_size]
                images = torch.stack([self._transform(read(file).convert(self._mode)) for file in batch])
                images = images.to(device, dtype)
                with explained(images):
                    found.append(self._normalized(self._features(images)))
                if progress:
                    progress(stage, min(start + batch_size, len(files)), len(files))
        return torch.cat(found)

    def _features(self, images: Tensor) -> Tensor:
        return features(self.model, images)

    def _normalized(self, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise ModelError(f"the encoder '{self.name}' returns NaN or infinite values. Check its weights")
        return F.normalize(x.double().cpu(), dim=-1)


class DualEncoder(ImageEncoder):
    """A model of images and text, whose cosines say how well a picture fits a prompt.

    Args:
        tokenize: prompts to tokens (n, length), or to a dictionary of the arguments of the text tower.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[[list[str]], Any],
        name: str,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(model, name, device)
        self._tokenize = tokenize

    @classmethod
    def open(cls, name: str, device: torch.device | str | None = None, option: str = "--clip") -> DualEncoder:
        """By a directory or a Hub repository of transformers or open_clip, or ``open_clip/NAME/TAG``.

        Raises:
            ModelError: it cannot be opened, or has no text tower or no tokenizer; the message names ``option``.
        """
        with _named(option, name, CLIP_EXAMPLES):
            model, tokenize = open_dual_encoder(name, option)
            return cls(model, tokenize, name, device)

    def _features(self, images: Tensor) -> Tensor:
        return image_features(self.model, images)

    def texts(self, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
        """(n, D) embeddings of length one, float64 on the CPU."""
        found = []
        with inference(self.model, self.device) as (device, _):
            for start in range(0, len(prompts), batch_size):
                tokens = self._tokenize(list(prompts[start : start + batch_size]))
                given = {"input_ids": tokens} if isinstance(tokens, Tensor) else dict(tokens)
                given = {key: value.to(device) for key, value in given.items()}
                found.append(self._normalized(text_features(self.model, given)))
        return torch.cat(found)


def features(model: nn.Module, images: Tensor) -> Tensor:
    """(B, D) of one batch; see :class:`ImageEncoder`.

    Raises:
        ModelError: the model returns nothing that holds features of every image.
    """
    if has_text_tower(model):
        return image_features(model, images)
    heads = [head for _, head in classifiers(model)]
    taken: list[Tensor] = []
    hooks = [head.register_forward_pre_hook(lambda _, args: taken.append(args[0])) for head in heads]
    try:
        raw = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if taken and all(x.shape == taken[0].shape and x.ndim == 2 for x in taken):
        return torch.stack(taken).mean(0)  # distilled DeiT has two classifiers
    found = [x for x in tensors_in(raw) if 2 <= x.ndim <= 4 and len(x) == len(images)]
    if not found:
        raise ModelError(f"{type(model).__name__} returns no features of every image; name an image encoder")
    first = found[0]
    if first.ndim == 3 and any(name.endswith(_CLASS_TOKENS) for name, _ in model.named_parameters()):
        return first[:, 0]
    flat = next((x for x in found if x.ndim == 2), None)
    if flat is not None:
        return flat
    return first.mean(1) if first.ndim == 3 else first.mean((2, 3))


@contextmanager
def _named(option: str, name: str, examples: str) -> Iterator[None]:
    """Inside, an error says which option it is of and what can be given there."""
    try:
        yield
    except ComcatError as error:
        cause = str(error).replace(_CHECKPOINT, "").rstrip(".")
        raise ModelError(f"the encoder of {option} '{name}' cannot be used: {cause}. Give {examples}") from error
