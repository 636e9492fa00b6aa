"""An adapter as the LoRA that is nearest to it on the base of a MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from comcat.customize.lora.exporting import Conversion, embedding_path, layers_as_lora
from comcat.customize.lora.keys import to_kohya
from comcat.errors import CheckpointError
from comcat.storage.atomic import atomic_file, tensor_bytes

from .layers import ENCODERS, of_clip, of_unet
from .loading import Chosen, read


def save_lora(model: Any, clip: Any, chosen: Chosen, folder: Path, name: str) -> tuple[Path, float, list[str]]:
    """Write NAME.safetensors in kohya's layout, and the vectors of a learned word beside it.

    Returns:
        The file, its relative error (in the products, on all inputs alike), and what to tell about it.

    Raises:
        CheckpointError: the name is none, or taken; the adapter was made for another model.
        ModelError: the model is no UNet of Stable Diffusion, or the CLIP is not connected and needed.
    """
    if not name.strip() or Path(name).name != name or name.startswith("."):
        raise CheckpointError(f"{name!r} is no name of a file; give one without folders, such as dog")
    path = folder / f"{name.removesuffix('.safetensors')}.safetensors"
    if path.exists():
        raise CheckpointError(f"'{path.name}' is there already in {folder.name}; choose another file_name")
    found = read(model, clip, chosen)
    attentions, models = {}, {}
    for component in found.layers:
        layers = of_unet(model) if component == "unet" else of_clip(clip, component)
        attentions[component] = {key: attention for key, (_, attention) in layers.items()}
        models[component] = model.model if component == "unet" else clip.patcher.model
    keyed = {(component, key): layer for component, own in found.layers.items() for key, layer in own.items()}
    factors, conversion = layers_as_lora(keyed, attentions, models)
    sdxl = clip is not None and all(hasattr(clip.patcher.model, names[0]) for names in ENCODERS.values())
    sdxl = sdxl or model.model.model_config.unet_config.get("adm_in_channels") is not None
    tensors = {key: tensor.to("cpu", torch.float32) for key, tensor in to_kohya(factors, sdxl).items()}
    _write(path, tensors)
    lines = [f"{path.name}: {_percent(conversion)} off the adapter (relative error of its products)"]
    if found.word is not None:
        names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
        several = len(found.vectors) > 1
        _write(embedding_path(path), {names[k] if several else found.word: t for k, t in found.vectors.items()})
        lines.append(f"{embedding_path(path).name}: the vectors of {found.word!r}; move it to models/embeddings")
    return path, conversion.relative, lines


def _percent(conversion: Conversion) -> str:
    return f"{100 * conversion.relative:.1f} %"


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with atomic_file(path, False) as file:
        file.write(tensor_bytes({key: t.contiguous() for key, t in tensors.items()}, {"format": "pt"}))
