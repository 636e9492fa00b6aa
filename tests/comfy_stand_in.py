"""The parts of ComfyUI that a node pack meets, as far as their contract goes: patchers, attention layers, tokenizers.

What they do was read off ComfyUI 0.3.64; integrations/comfyui/verify.py compares with the original.
"""

import contextlib
import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn


def optimized_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **_: Any) -> Tensor:
    """(B, N, H d), scaled by the width that it sees."""
    split = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """A UNet's attention layer, with the weights of diffusers' one."""

    attn_precision = None

    def __init__(self, theirs: Attention) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (
            theirs.to_q,
            theirs.to_k,
            theirs.to_v,
            nn.Sequential(*theirs.to_out),
        )
        self.heads, self.dim_head = theirs.heads, theirs.to_q.out_features // theirs.heads

    def forward(
        self, x: Tensor, context: Any = None, value: Any = None, mask: Any = None, transformer_options: Any = None
    ) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        out: Tensor = self.to_out(optimized_attention(q, k, v, self.heads, mask))
        return out


class Called(nn.Module):
    """Where diffusers calls an attention layer, ComfyUI's is called, and told what ComfyUI tells it."""

    def __init__(self, theirs: Attention, options: dict[str, Any]) -> None:
        super().__init__()
        self.attn, self.options = CrossAttention(theirs), options

    def forward(self, x: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, **_: Any) -> Tensor:
        found: Tensor = self.attn(x, context=encoder_hidden_states, transformer_options=self.options)
        return found


def unet(theirs: nn.Module) -> Any:
    """A copy of diffusers' UNet with ComfyUI's attention layers, as ComfyUI keeps models."""
    model: Any = copy.deepcopy(theirs)
    options: dict[str, Any] = {}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]
    for name, module in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Called(module, options))
    for module in model.modules():
        if isinstance(module, Transformer2DModel):
            module.register_forward_pre_hook(lambda _, args: options.update(activations_shape=list(args[0].shape)))
    model.register_forward_pre_hook(lambda _, args: options.update(original_shape=list(args[0].shape)))
    root: Any = nn.Module()
    root.diffusion_model = model
    names = {f"{name}.to_q.weight": f"{name}.attn.to_q.weight" for name, _ in layers}
    root.model_config = SimpleNamespace(unet_config={"names": names})
    return root


class ModelPatcher:
    """A model that others share, and what is changed about it while it is on the device."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.object_patches: dict[str, Any] = {}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> "ModelPatcher":
        new = ModelPatcher(self.model)
        new.object_patches = dict(self.object_patches)
        new.wrappers = {kind: {key: list(found) for key, found in own.items()} for kind, own in self.wrappers.items()}
        return new

    def add_object_patch(self, name: str, patch: Any) -> None:
        self.object_patches[name] = patch

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def get_wrappers(self, kind: str, key: str) -> list[Any]:
        return self.wrappers.get(kind, {}).get(key, [])

    @contextlib.contextmanager
    def loaded(self) -> Iterator[Any]:
        """The model with its patches."""
        before = {}
        for path, patch in self.object_patches.items():
            place, _, leaf = path.rpartition(".")
            owner = self.model.get_submodule(place)
            before[path] = getattr(owner, leaf)
            setattr(owner, leaf, patch)
        try:
            yield self.model
        finally:
            for path, old in before.items():
                place, _, leaf = path.rpartition(".")
                setattr(self.model.get_submodule(place), leaf, old)


class CLIPAttention(nn.Module):
    """A text encoder's attention layer, with the weights of transformers' one."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.heads = theirs.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            theirs.q_proj,
            theirs.k_proj,
            theirs.v_proj,
            theirs.out_proj,
        )

    def forward(self, x: Tensor, mask: Any = None, optimized_attention: Any = None) -> Tensor:
        out: Tensor = self.out_proj(
            optimized_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask)
        )
        return out


class SDTokenizer:
    """Words by their letters; ``embedding:NAME`` at the start or behind a space is looked up."""

    embedding_identifier = "embedding:"
    embedding_directory: Any = None

    def __init__(self, size: int) -> None:
        self.embedding_size = size

    def _try_get_embedding(self, embedding_name: str) -> Any:
        return torch.full((1, self.embedding_size), 7.0), " ".join(embedding_name.split()[1:])

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> list[Any]:
        found: list[Any] = []
        first, *others = re.split(" embedding:", text)
        for word in [first, *(f"embedding:{other}" for other in others)]:
            if word.startswith(self.embedding_identifier) and self.embedding_directory is not None:
                rows, word = self._try_get_embedding(word.removeprefix(self.embedding_identifier))
                found += [(row, 1.0) for row in rows]
            found += [(part, 1.0) for part in word.split()]
        return found


class CLIP:
    """A text encoder under the name clip_l, and its tokenizer."""

    def __init__(self, encoder: Any) -> None:
        layers = nn.ModuleList(nn.Module() for _ in encoder.encoder.layers)
        for layer, theirs in zip(layers, encoder.encoder.layers, strict=True):
            layer.self_attn = CLIPAttention(theirs.self_attn)
        model: Any = nn.Module()
        model.clip_l = nn.Module()
        model.clip_l.transformer = nn.Module()
        model.clip_l.transformer.text_model = nn.Module()
        model.clip_l.transformer.text_model.encoder = nn.Module()
        model.clip_l.transformer.text_model.encoder.layers = layers
        self.patcher = ModelPatcher(model)
        self.tokenizer = SimpleNamespace(clip_l=SDTokenizer(encoder.config.hidden_size))

    def clone(self) -> "CLIP":
        new = copy.copy(self)
        new.patcher = self.patcher.clone()
        return new


def install(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    """The modules that the pack imports, with folders of models in ``models``."""

    def module(name: str, **content: Any) -> None:
        found = ModuleType(name)
        found.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, found)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, found)

    def full_path(kind: str, name: str) -> str:
        path = models / kind / name
        if not path.is_file():
            raise FileNotFoundError(name)
        return str(path)

    for package in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        module(package)
    module(
        "comfy.ldm.modules.attention",
        optimized_attention=optimized_attention,
        optimized_attention_masked=optimized_attention,
    )
    module("comfy.utils", unet_to_diffusers=lambda config: config.get("names", {}))
    module("comfy.patcher_extension", WrappersMP=SimpleNamespace(DIFFUSION_MODEL="diffusion_model"))
    module(
        "folder_paths",
        models_dir=str(models),
        add_model_folder_path=lambda kind, path: Path(path).mkdir(exist_ok=True),
        get_filename_list=lambda kind: sorted(path.name for path in (models / kind).iterdir()),
        get_full_path_or_raise=full_path,
        get_folder_paths=lambda kind: [str(models / kind)],
    )
