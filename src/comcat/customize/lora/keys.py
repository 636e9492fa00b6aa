"""Names inside LoRA files: ``{component: {module path: (down, up)}}`` to and from state dicts.

Two layouts are written, and read back with any alpha folded into ``up``:

* diffusers (PEFT): ``unet.<module path>.lora_A.weight`` / ``.lora_B.weight``, for every model; no alpha, scale 1.
* kohya (sd-scripts, ComfyUI, AUTOMATIC1111): ``lora_unet_<path with underscores>.lora_down.weight`` /
  ``.lora_up.weight`` / ``.alpha``, for Stable Diffusion. Versions 1 and 2 use the block names of diffusers, SDXL those
  of the original UNet: ``input_blocks_N_1``, ``middle_block_1``, ``output_blocks_N_1``.

Text encoders carry the prefix ``text_model.`` in files, whether or not the installed transformers has that level.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...wording import some
from .algebra import LoraWeights
from .lora_config import CONFIG_NAME, LoraConfig, configs_in, scale

#: What a LoRA changes: component -> module path -> (down, up).
LoraFactors = Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]

#: Blocks per stage of the encoder of an SDXL UNet, its sampler included; the distilled ones keep it.
SDXL_STAGE = 3

_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
#: Parts of key names that only other methods have.
_UNSUPPORTED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "lora_mid": "Tucker-decomposed convolution (LoCon with lora_mid)",
    "oft_": "OFT",
    "glora": "GLoRA",
    ".diff": "weight-difference",
    "lora_B.bias": "LoRA-with-bias",
    "scale_weight": "scaled float8",
    "weight_scale": "scaled float8",
    "scale_inv": "scaled float8",
    "quant_state": "quantized",
    ".scalar": "LyCORIS-with-scalar",
}
#: Parts of names by which one knows what a file was made for, and in whose layout.
_FAMILIES = (
    (
        ("double_blocks", "single_blocks"),
        "FLUX in its original layout (for a pipeline of diffusers, load the file with "
        "load_lora_weights and write it again with save_lora_weights)",
    ),
    (
        ("joint_blocks",),
        "Stable Diffusion 3 in its original layout (for a pipeline of diffusers, load the file with "
        "load_lora_weights and write it again with save_lora_weights)",
    ),
    (("single_transformer_blocks",), "FLUX"),
    (("input_blocks", "output_blocks", "lora_te2_", "text_encoder_2"), "Stable Diffusion XL"),
    (("down_blocks", "up_blocks", "mid_block"), "the UNet of Stable Diffusion"),
    (("transformer_blocks",), "a transformer such as FLUX, Stable Diffusion 3 or PixArt"),
)
_HALF = re.compile(r"(.+?)(?:[._]lora\.|\.lora_linear_layer\.|\.lora_)(down|up|A|B)(?:\.\w+)?\.weight")
_ALPHA = re.compile(r"(.+?)(?:[._]lora|\.lora_linear_layer)?\.alpha")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class LoraFile(NamedTuple):
    """What :func:`read_lora` found."""

    factors: dict[str, dict[str, LoraWeights]]  # component -> module path -> (down, up), ``W + up @ down``
    unmatched: list[str]  # entries that belong to no module of the model, as the file names them
    notes: list[str]  # what had to be taken for granted


def to_diffusers(factors: LoraFactors) -> dict[str, Tensor]:
    """State dict for ``pipe.load_lora_weights``.

    Args:
        factors: component (``unet``, ``transformer``, ``text_encoder``, ...) -> path of an ``nn.Linear`` in it ->
            down (R, D_in), up (D_out, R).
    """
    tensors = {}
    for component, modules in factors.items():
        for path, (down, up) in modules.items():
            name = f"{component}.{_file_path(component, path)}"
            tensors[f"{name}.lora_A.weight"] = down.detach().contiguous()
            tensors[f"{name}.lora_B.weight"] = up.detach().contiguous()
    return tensors


def to_kohya(factors: LoraFactors, sdxl: bool) -> dict[str, Tensor]:
    """State dict in the layout of sd-scripts, which also diffusers reads.

    All layers get the same alpha, the largest rank, and layers of lower rank are rescaled to it: loaders disagree on
    alphas that differ by layer (that of diffusers loses them for attention layers), none on ranks that do. Diffusers
    knows this layout in a text encoder by its ``out_proj`` entries only.

    Args:
        factors: as for :func:`to_diffusers`.
        sdxl: name the blocks of the UNet and the text encoders as for SDXL.

    Raises:
        CheckpointError: a component that is not a Stable Diffusion UNet or text encoder, or, for SDXL, a layer of the
            UNet outside its transformer blocks.
    """
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if sdxl else "lora_te_"}
    if sdxl:
        prefixes["text_encoder_2"] = "lora_te2_"
    alpha = max((down.shape[0] for modules in factors.values() for down, _ in modules.values()), default=1)
    tensors = {}
    for component, modules in factors.items():
        if modules and component not in prefixes:
            raise CheckpointError(
                f"the kohya layout has no names for the {component} of this model; write the diffusers layout instead"
            )
        for path, (down, up) in modules.items():
            written = _sdxl_path(path) if sdxl and component == "unet" else _file_path(component, path)
            if written is None:
                raise CheckpointError(
                    "the kohya layout of SDXL is written for layers in transformer blocks only; "
                    "write the diffusers layout instead"
                )
            name = prefixes[component] + written.replace(".", "_")
            share = (down.shape[0] / alpha) ** 0.5
            tensors[f"{name}.lora_down.weight"] = (down.detach() * share).contiguous()
            tensors[f"{name}.lora_up.weight"] = (up.detach() * share).contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def read_lora(
    tensors: Mapping[str, Tensor],
    module_names: Mapping[str, Iterable[str]],
    metadata: Mapping[str, str] | None = None,
    *,
    config: LoraConfig | None = None,
    lora_alpha: float | None = None,
) -> LoraFile:
    """Read a LoRA in the layout of diffusers (PEFT, or one of its two older ones) or of kohya.

    Args:
        tensors: the state dict of the file.
        module_names: component -> paths of its modules (``dict(model.named_modules())``), to which the underscores of
            kohya are resolved.
        metadata: the header of the safetensors file, where diffusers stores alphas.
        config: what PEFT has written beside the file; it counts for entries that PEFT has named.
        lora_alpha: alpha of all layers for which nothing in the file says what theirs is.

    Returns:
        ``LoraFile``; alpha / rank is folded into ``up``, half precision and float8 are widened to float32, and
        convolutions keep their shape.

    Raises:
        CheckpointError: another method than LoRA, an alpha that nothing states, a layer with one factor only or factors
            that do not fit, or a file in which nothing belongs to the model.
    """
    _refuse_other_methods(tensors)
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    unmatched = []
    for key, tensor in tensors.items():
        if match := _HALF.fullmatch(key):
            halves.setdefault(match[1], {})["down" if match[2] in ("down", "A") else "up"] = tensor
        elif match := _ALPHA.fullmatch(key):
            alphas[match[1]] = _number(key, tensor)
        else:
            unmatched.append(key)
    modules = {component: set(names) for component, names in module_names.items()}
    flat = _flat_names(modules)
    stated = configs_in(metadata or {})
    factors: dict[str, dict[str, LoraWeights]] = {}
    silent = []  # layers about whose alpha the file says nothing
    for stem, pair in halves.items():
        found = flat.get(stem) or _resolve(stem, modules)
        if found is None:
            unmatched.append(stem)
            continue
        component, path = found
        if path in factors.setdefault(component, {}):
            raise CheckpointError(f"two entries of the LoRA file change {component}.{path}; it mixes layouts")
        down, up = _checked(stem, pair)
        rank, names = down.shape[0], (path, f"text_model.{path}")
        beside = config if is_pefts_own(stem, tensors) else None
        if stem in alphas:
            factor = scale(alphas[stem], rank)
        elif (known := stated.get(component) or beside) is not None:
            factor = known.factor(names, rank)
        elif lora_alpha is not None:
            silent.append(stem)
            factor = scale(lora_alpha, rank)
        elif is_pefts_own(stem, tensors):
            raise CheckpointError(
                f"this LoRA is as PEFT saves it, and its alpha stands in {CONFIG_NAME}, which is not beside it. Put it "
                "there, or give the alpha: --lora-alpha (in Python lora_alpha=); for rsLoRA alpha times the square "
                "root of the rank"
            )
        elif alphas:
            raise CheckpointError(
                f"the LoRA file holds an alpha for other layers, but none for {stem!r}; it is incomplete. Get a whole "
                "one, or give the alpha of such layers: --lora-alpha (in Python lora_alpha=)"
            )
        else:
            silent.append(stem)
            factor = 1.0
        factors[component][path] = _scaled(stem, down, up, factor)
    if not any(factors.values()):
        raise CheckpointError(
            f"nothing in the LoRA file belongs to this model ({some(unmatched)}){_family(unmatched)}; is it made for "
            "another base model?"
        )
    if lora_alpha is not None and not silent:
        raise CheckpointError("the LoRA file says itself what its alpha is; leave --lora-alpha (lora_alpha) out")
    notes = []
    if silent and lora_alpha is None:
        notes.append(
            "the LoRA file does not say what its alpha is; its factors are taken as they are (alpha = rank), as "
            "diffusers takes them. If it was trained with another one, give --lora-alpha"
        )
    return LoraFile(factors, unmatched, notes)


def _refuse_other_methods(tensors: Mapping[str, Tensor]) -> None:
    for key in tensors:
        for part, method in _UNSUPPORTED.items():
            if part in key:
                raise CheckpointError(f"{method} files cannot be read, only ordinary LoRA ones (found {key!r})")


def is_pefts_own(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an entry is named as PEFT names those of one model; its alpha is never in such a file."""
    if name.startswith("base_model.model."):
        return True
    stem = name.partition(".lora_A")[0]
    bare = stem.partition(".")[0] not in _COMPONENTS and "." in stem
    return bare and any(f"{stem}.lora_A{which}.weight" in tensors for which in ("", ".default"))


def _number(key: str, tensor: Tensor) -> float:
    value = float(tensor) if tensor.numel() == 1 and not tensor.is_complex() else float("nan")
    if tensor.dtype == torch.bool or not math.isfinite(value):
        raise CheckpointError(f"the LoRA file is damaged: {key!r} is no number")
    return value


def _checked(stem: str, pair: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both factors of a layer, as float32 or float64."""
    if len(pair) < 2:
        raise CheckpointError(f"the LoRA file holds only the {next(iter(pair))} factor of {stem!r}; it is incomplete")
    for name, half in pair.items():
        if not half.is_floating_point():
            raise CheckpointError(
                f"the {name} factor of {stem!r} is {half.dtype}, not of floating point; it is no LoRA's"
            )
    down, up = (half if half.dtype == torch.float64 else half.float() for half in (pair["down"], pair["up"]))
    rank = down.shape[0] if down.dim() else 0
    if rank < 1 or down.dim() < 2 or down.dim() != up.dim() or up.shape[1] != rank or not up.numel():
        raise CheckpointError(f"the factors of {stem!r} do not fit: {tuple(down.shape)} and {tuple(up.shape)}")
    return down, up


def _scaled(stem: str, down: Tensor, up: Tensor, factor: float) -> LoraWeights:
    """The factors of ``W + up @ down`` without any further scale."""
    up = up if factor == 1 else up * factor
    if not (down.isfinite().all() and up.isfinite().all()):
        raise CheckpointError(f"the factors of {stem!r} hold NaN or infinite values; use an intact file")
    return LoraWeights(down, up)


def _family(names: Iterable[str]) -> str:
    """What the names in a file say of the model that it is for."""
    for marks, kind in _FAMILIES:
        if any(mark in name for name in names for mark in marks):
            return f", whose names are those of {kind}"
    return ""


def _file_path(component: str, path: str) -> str:
    if component.startswith("text_encoder") and path.startswith("encoder."):
        return "text_model." + path
    return path


def _sdxl_path(path: str) -> str | None:
    """Path in the original SDXL UNet of a module below ``attentions``; inside of these blocks the names agree."""
    match = re.fullmatch(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.attentions\.(\d+)\.(.+)", path)
    if match is None:
        return None
    stage, block, layer, rest = match[1], int(match[2] or 0), int(match[3]), match[4]
    if stage == "down_blocks":  # input_blocks.0 is the first convolution
        return f"input_blocks.{1 + SDXL_STAGE * block + layer}.1.{rest}"
    if stage == "up_blocks":
        return f"output_blocks.{SDXL_STAGE * block + layer}.1.{rest}"
    return f"middle_block.1.{rest}"


def _flat_names(modules: Mapping[str, set[str]]) -> dict[str, tuple[str, str]]:
    """Every kohya name that a module of the model may have in a file."""
    flat = {}
    for prefix, component in _KOHYA_PREFIXES.items():
        for path in modules.get(component, ()):
            names = {_file_path(component, path)}
            if component == "unet" and (original := _sdxl_path(path)):
                names.add(original)
            for name in names:
                flat[prefix + name.replace(".", "_")] = (component, path)
    return flat


def _resolve(stem: str, modules: Mapping[str, set[str]]) -> tuple[str, str] | None:
    """Component and module path of a dotted name, whatever the age of the layout."""
    name = stem.removeprefix("base_model.model.").replace(".processor.", ".")
    component, _, path = name.partition(".")
    if component not in _COMPONENTS:  # files of one model alone have no prefix
        component, path = ("unet" if "unet" in modules else "transformer"), name
    parent, _, leaf = path.rpartition(".")
    spellings = [path, f"{path}.0"] if leaf == "to_out" else [path]
    if leaf in _OLD_TEXT:
        spellings.append(f"{parent}.{_OLD_TEXT[leaf]}")
    for spelling in spellings:
        for candidate in (spelling, f"text_model.{spelling}", spelling.removeprefix("text_model.")):
            # the container ``to_out`` is no layer
            if candidate in modules.get(component, ()) and f"{candidate}.0" not in modules[component]:
                return component, candidate
    return None
