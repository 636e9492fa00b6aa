"""open_clip: a dual encoder from its ``model_cfg``, or the image tower of one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import timm
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, convert_to_custom_text_state_dict
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

from ..errors import CheckpointError, ComcatError, ModelError
from ..storage.reader import read_json, shown
from ..wording import some
from .library import Library, Wanted
from .source import Source
from .timm_arguments import check_value
from .weights import check_proportion, fill, read_checkpoint, size_of

VISUAL = "visual"
_CLASSES = {"CLIP": open_clip.CLIP, "CustomTextCLIP": open_clip.CustomTextCLIP, VISUAL: open_clip.CLIP}
_OUTER = frozenset({
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias",
    "nonscalar_logit_scale", "output_dict", "custom_text",
})  # fmt: skip
_VISION = frozenset(field.name for field in fields(CLIPVisionCfg))
_TEXT = frozenset(field.name for field in fields(CLIPTextCfg))
#: The smallest text tower, for an image tower that is built alone.
_NO_TEXT = {"context_length": 2, "vocab_size": 2, "width": 2, "heads": 1, "layers": 1}
_CONFIG, _WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_MOST_LAYERS = 1000


class OpenClipModels(Library):
    """``name`` is a class, or ``visual`` for the image tower alone; ``args`` holds ``model_cfg``."""

    name: ClassVar = "open_clip"
    advice: ClassVar = "pass model_args={'model_cfg': {...}} with the configuration that it was built from"
    weights: ClassVar = _WEIGHTS

    def owns(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith("open_clip.")

    def describe(self, model: nn.Module) -> Source | None:
        name = next((n for n, cls in _CLASSES.items() if type(model) is cls), None)
        if name is None and isinstance(getattr(model, "image_size", None), (int, tuple)):
            name = VISUAL
        return None if name is None else Source(name, {"model_cfg": _read_off(model)}, library=self.name)

    def check(self, source: Source) -> None:
        if source.name not in _CLASSES or set(source.args) != {"model_cfg"}:
            raise CheckpointError(
                f"open_clip has no architecture {shown(source.name)} with {some(sorted(source.args))}; there are "
                f"{', '.join(_CLASSES)}, each with a model_cfg"
            )
        _check(source.args["model_cfg"], CheckpointError)

    def make(self, source: Source) -> nn.Module:
        cfg = copy.deepcopy(source.args["model_cfg"])
        cfg.pop("custom_text", None)
        cfg["vision_cfg"]["timm_model_pretrained"] = False
        if source.name == VISUAL:
            cfg["text_cfg"] = dict(_NO_TEXT)
        model = _CLASSES[source.name](**cfg)
        return model.visual if source.name == VISUAL else model

    def num_classes(self, model: nn.Module) -> int | None:
        return 0

    def data_config(self, model: nn.Module) -> dict[str, Any]:
        found = getattr(getattr(model, VISUAL, model), "preprocess_cfg", None)
        return _translated(found) if isinstance(found, dict) else {}

    def both_towers(self, files: Mapping[str, Any]) -> dict[str, Any] | None:
        return {"towers": "both"}

    def tokenizer(self, model: nn.Module, folder: Path | None, name: str) -> Callable[[list[str]], Any]:
        source: Any = getattr(model, "comcat_source", None)
        text = (source.args["model_cfg"].get("text_cfg") if source else None) or {}
        if set(text.get("tokenizer_kwargs") or {}) - {"clean", "strip_sep_token", "language"}:
            raise ModelError(f"the tokenizer_kwargs of '{name}' are {shown(text['tokenizer_kwargs'])}; remove them")
        named = text.get("hf_tokenizer_name")
        if named and (folder is None or not any(folder.glob("tokenizer*"))):
            raise ModelError(
                f"'{name}' has no tokenizer beside its weights, and {shown(named)} would be looked for on the network; "
                "put the tokenizer's files into its directory"
            )
        return open_clip.get_tokenizer(f"local-dir:{folder}" if folder else name.split("/")[1])

    def tower_is_projected(self, model: nn.Module) -> bool:
        return True

    def reads(self, files: Mapping[str, Any]) -> bool:
        return "model_cfg" in files.get(_CONFIG, {})

    def open(self, wanted: Wanted) -> nn.Module:
        """``NAME/TAG`` with pretrained weights, or ``NAME`` with a checkpoint."""
        name, _, tag = wanted.name.partition("/")
        cfg = open_clip.get_model_config(name)
        if cfg is None:
            raise ModelError(f"open_clip has no model named {shown(name)}; see open_clip.list_models()")
        file, prepared = wanted.checkpoint, {}
        if file is None and wanted.pretrained:
            tags = open_clip.list_pretrained_tags_by_model(name)
            if tag not in tags:
                raise ModelError(
                    f"name the weights of '{name}' as open_clip/{name}/TAG, of {some(tags, count=9)}; or give "
                    "--checkpoint FILE.safetensors"
                )
            found = open_clip.get_pretrained_cfg(name, tag)
            file, prepared = _download(name, tag, found), dict(found)
        return _open(cfg, prepared, file, wanted)

    def open_directory(self, folder: Path, wanted: Wanted) -> nn.Module:
        content = read_json(folder / _CONFIG, what="model configuration", error=ModelError)
        file = wanted.checkpoint
        if file is None and wanted.pretrained:
            file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
            if file is None:
                raise ModelError(
                    f"'{folder}' holds no {_WEIGHTS[0]}; pickled weights can run code when read and are never opened"
                )
        return _open(content["model_cfg"], content.get("preprocess_cfg") or {}, file, wanted)


LIBRARY = OpenClipModels()


def _open(cfg: dict[str, Any], prepared: dict[str, Any], file: Path | None, wanted: Wanted) -> nn.Module:
    """The image tower, or with the argument ``towers="both"`` the whole model; weights are those of both."""
    args = dict(wanted.args)
    towers = args.pop("towers", "image")
    if args or towers not in ("image", "both"):
        raise ModelError(f"open_clip takes no argument {shown(args or towers)}; there is towers=image and towers=both")
    _check(cfg, ModelError)
    name = "CustomTextCLIP" if cfg.get("custom_text") else "CLIP"
    source = Source(name, {"model_cfg": cfg}, library=LIBRARY.name)
    try:
        shapes = source.build(meta=True)
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    tensors = None if file is None else read_checkpoint(file)
    check_proportion(wanted.name, "its model_cfg", shapes, size_of((tensors or {}).values()))
    model: Any = LIBRARY.make(source)
    if tensors is not None:
        if name == "CustomTextCLIP" and "positional_embedding" in tensors:
            tensors = convert_to_custom_text_state_dict(tensors)
        fill(model, tensors, file, "they are of another model, or of one tower")
    config = _translated({"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, **prepared})
    if towers == "image":
        inner = {key: value for key, value in cfg.items() if key in ("embed_dim", "vision_cfg", "quick_gelu")}
        source, model = replace(source, name=VISUAL, args={"model_cfg": inner}), model.visual
    model.comcat_source = replace(source, config=config)
    opened: nn.Module = model.eval()
    return opened


def _download(name: str, tag: str, found: dict[str, Any]) -> Path:
    """A safetensors file from the Hub or its cache."""
    from huggingface_hub import hf_hub_download

    repository, _, file = str(found.get("hf_hub") or "").rpartition("/")
    stem = file.rpartition(".")[0]
    for wanted in [f"{stem}.safetensors"] if stem else _WEIGHTS[:1]:
        try:
            return Path(hf_hub_download(repository, wanted))
        except Exception as error:  # clients raise their transport's own exceptions
            raise ModelError(
                f"cannot load '{wanted}' of 'open_clip/{name}/{tag}': {type(error).__name__}; check the network, or "
                "give --checkpoint FILE.safetensors. Pickled weights are never opened"
            ) from error
    raise ModelError(f"there are no weights of 'open_clip/{name}/{tag}'")


def _check(cfg: Any, error: type[ComcatError]) -> None:
    """Raise unless a ``model_cfg`` is plain data of a sane size that leads nowhere."""
    if not isinstance(cfg, dict) or "embed_dim" not in cfg or not isinstance(cfg.get("vision_cfg"), dict):
        raise error("a model_cfg of open_clip has embed_dim and vision_cfg")
    parts = ((_OUTER, cfg), (_VISION, cfg["vision_cfg"]), (_TEXT, cfg.get("text_cfg") or {}))
    for known, part in parts:
        if not isinstance(part, dict) or set(part) - known:
            raise error(f"the model_cfg has unknown fields {some(sorted(set(part) - known)) if part else part}")
        for key, value in part.items():
            if key in ("vision_cfg", "text_cfg", "hf_tokenizer_name"):
                continue
            if key == "hf_model_name" and value:
                raise error(f"the text tower {shown(value)} would be looked for on the network; open the image tower")
            if key == "timm_model_name" and value and not (isinstance(value, str) and timm.is_model(value)):
                raise error(f"timm has no architecture {shown(value)}, which the model_cfg names")
            if key != "timm_model_name":
                check_value(key, value, error)
            layers = value if isinstance(value, (list, tuple)) else [value]
            if key == "layers" and sum(n for n in layers if isinstance(n, int)) > _MOST_LAYERS:
                raise error(f"layers is {shown(value)}; no architecture has more than {_MOST_LAYERS} layers")


def _translated(prepared: Mapping[str, Any]) -> dict[str, Any]:
    """``preprocess_cfg`` in the words of timm."""
    modes = {"shortest": "center", "longest": "border", "squash": "squash"}
    config = {name: tuple(prepared[name]) for name in ("mean", "std") if prepared.get(name) is not None}
    interpolation = prepared.get("interpolation") or "bicubic"
    mode = modes.get(prepared.get("resize_mode") or "shortest", "center")
    return {**config, "interpolation": interpolation, "crop_pct": 1.0, "crop_mode": mode}


# -- reading a model off ----------------------------------------------------------------------------------------------


def _read_off(model: Any) -> dict[str, Any]:
    """The ``model_cfg`` of plain transformers; of others what is there, which does not build them."""
    visual = getattr(model, VISUAL, model)
    if not isinstance(visual, VisionTransformer):
        return {}
    quick = any(isinstance(module, QuickGELU) for module in visual.modules())
    cfg: dict[str, Any] = {"embed_dim": visual.output_dim, "quick_gelu": quick, "vision_cfg": _vision(visual)}
    if visual is model:
        return cfg
    if model.logit_bias is not None:
        cfg["init_logit_bias"] = 0.0
    text: Any = getattr(model, "text", model)
    pool = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", "argmax")
    read = {
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "pool_type": pool,
        **_blocks(text.transformer),
    }
    heads = text.transformer.resblocks[0].attn.num_heads
    return {**cfg, "output_dict": model.output_dict, "text_cfg": {**read, "heads": heads}}


def _vision(visual: Any) -> dict[str, Any]:
    blocks = _blocks(visual.transformer)
    return {
        **blocks,
        "head_width": blocks["width"] // visual.transformer.resblocks[0].attn.num_heads,
        "patch_size": visual.patch_size[0],
        "image_size": list(visual.image_size),
        "pool_type": visual.pool_type,
        "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
        "final_ln_after_pool": visual.final_ln_after_pool,
        "output_tokens": visual.output_tokens,
    }


def _blocks(transformer: Any) -> dict[str, Any]:
    first = transformer.resblocks[0]
    width, hidden = transformer.width, first.mlp.c_fc.out_features
    scaled = not isinstance(first.ls_1, nn.Identity)
    ratio = hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
    return {
        "width": width,
        "layers": transformer.layers,
        "mlp_ratio": ratio,
        "ls_init_value": 0.1 if scaled else None,
    }
