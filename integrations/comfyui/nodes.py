"""The nodes: load an adapter, load several at once, save one as a LoRA."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import folder_paths

from comcat.errors import ModelError

from .loading import Chosen, apply
from .lora import save_lora

FOLDER = "comcat"
NONE = "none"
SLOTS = 4
STRENGTH = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01})

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def _files() -> list[str]:
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors")]


def _path(name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def _stamp(*names: str) -> str:
    """Changes whenever one of these files does."""
    found = [(name, _path(name).stat()) for name in names if name != NONE]
    return repr([(name, stat.st_mtime_ns, stat.st_size) for name, stat in found])


class LoadComcatAdapter:
    """One adapter, at a strength, everywhere or on a part of the picture."""

    CATEGORY = "comcat"
    DESCRIPTION = (
        "Adds a comcat adapter (models/comcat) to SD 1.x, 2.x or XL, exactly. With a mask it acts on the white part of "
        "the picture; the mask has the picture's aspect ratio. Connect CLIP where the adapter has learned a word."
    )
    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "adapter": (_files(),), "strength": STRENGTH},
            "optional": {
                "clip": ("CLIP",),
                "mask": ("MASK",),
                "word": ("STRING", {"default": "", "tooltip": "for the learned word, if not its own"}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, adapter: str, **_: Any) -> str:
        return _stamp(adapter)

    def load(
        self, model: Any, adapter: str, strength: float, clip: Any = None, mask: Any = None, word: str = ""
    ) -> tuple[Any, Any]:
        return apply(model, clip, [Chosen(_path(adapter), strength, mask, word.strip())])


class ComcatAdapterStack:
    """Several adapters in one fused attention call."""

    CATEGORY = "comcat"
    DESCRIPTION = "Adds up to four comcat adapters at once, each with its strength and its part of the picture."
    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = [NONE, *_files()]
        slots = range(1, SLOTS + 1)
        required: dict[str, Any] = {"model": ("MODEL",)}
        for i in slots:
            required |= {f"adapter_{i}": (files,), f"strength_{i}": STRENGTH}
        return {"required": required, "optional": {"clip": ("CLIP",), **{f"mask_{i}": ("MASK",) for i in slots}}}

    @classmethod
    def IS_CHANGED(cls, **given: Any) -> str:
        return _stamp(*(given[f"adapter_{i}"] for i in range(1, SLOTS + 1)))

    def load(self, model: Any, clip: Any = None, **given: Any) -> tuple[Any, Any]:
        chosen = []
        for i in range(1, SLOTS + 1):
            name, mask = given[f"adapter_{i}"], given.get(f"mask_{i}")
            if name != NONE:
                chosen.append(Chosen(_path(name), given[f"strength_{i}"], mask))
            elif mask is not None:
                raise ModelError(f"mask_{i} is connected, and adapter_{i} is 'none'; choose the adapter it is for")
        return apply(model, clip, chosen) if chosen else (model, clip)


class SaveComcatAsLora:
    """An adapter as the nearest LoRA, and how far off it is."""

    CATEGORY = "comcat"
    DESCRIPTION = (
        "Writes a comcat adapter as a LoRA (models/loras) for this model, for Load LoRA and every other tool. A LoRA "
        "cannot hold an adapter exactly: the relative error is returned (see it with Preview Any)."
    )
    RETURN_TYPES = ("STRING", "FLOAT")
    RETURN_NAMES = ("file", "relative_error")
    FUNCTION = "save"
    OUTPUT_NODE = True
    kept: ClassVar[str] = "loras"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "adapter": (_files(),),
                "strength": STRENGTH,
                "file_name": ("STRING", {"default": "adapter"}),
            },
            "optional": {"clip": ("CLIP",)},
        }

    @classmethod
    def IS_CHANGED(cls, adapter: str, **_: Any) -> str:
        return _stamp(adapter)

    def save(self, model: Any, adapter: str, strength: float, file_name: str, clip: Any = None) -> dict[str, Any]:
        folder = Path(folder_paths.get_folder_paths(self.kept)[0])
        path, error, lines = save_lora(model, clip, Chosen(_path(adapter), strength), folder, file_name)
        logging.info("comcat: %s", "; ".join(lines))
        return {"ui": {"text": lines}, "result": (str(path), error)}


NODE_CLASS_MAPPINGS = {
    "ComcatLoadAdapter": LoadComcatAdapter,
    "ComcatAdapterStack": ComcatAdapterStack,
    "ComcatSaveLora": SaveComcatAsLora,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ComcatLoadAdapter": "Load comcat adapter",
    "ComcatAdapterStack": "comcat adapter stack",
    "ComcatSaveLora": "Save comcat adapter as LoRA",
}
