"""Compare the nodes with comcat on diffusers, in a ComfyUI that is installed here.

    python integrations/comfyui/verify.py /path/to/ComfyUI

A random model of Stable Diffusion 1.x with one level (320 channels, CLIP-L) is written as a checkpoint, and two random
adapters beside it. The nodes put them on the checkpoint as ComfyUI loads it, and text embeddings and noise predictions
are compared with those of the same pipeline in diffusers, in float32. Everything is written into a temporary folder.
Of the whole SD 1.5, SD 2.1 and SDXL, without weights, the names and shapes of all attention layers are compared.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from comcat import customize
from comcat.customize.adapter.components import find_addable

PROMPT = "a (photo of V*, the dog:1.0) by W*"
TOLERANCE = 1e-5
UNET = {
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
}


#: Of the whole models: ComfyUI's configuration, and what differs of diffusers' from SD 1.x.
FOUR = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
XL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}
LINEAR = {"num_head_channels": 64, "use_linear_in_transformer": True}
WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SD 1.5": ({**FOUR, "num_heads": 8, "context_dim": 768}, {"attention_head_dim": 8, "cross_attention_dim": 768}),
    "SD 2.1": (
        {**FOUR, **LINEAR, "context_dim": 1024},
        {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
    ),
    "SDXL": (
        {**XL, **LINEAR, "context_dim": 2048},
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
        },
    ),
}


def pipeline(tokenizer: Path) -> Any:
    """A random Stable Diffusion 1.x with one level."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(320,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    vae = AutoencoderKL(block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), latent_channels=4)
    words = CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77, local_files_only=True)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    extra: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(config), tokenizer=words, unet=unet, scheduler=scheduler, **extra
    )
    for part in (pipe.unet, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return pipe


def checkpoint(pipe: Any, path: Path) -> None:
    """One file as ComfyUI loads it."""
    import comfy.utils

    names, state = comfy.utils.unet_to_diffusers(UNET), pipe.unet.state_dict()
    found = {f"model.diffusion_model.{names[key]}": tensor for key, tensor in state.items()}
    text = {key.removeprefix("text_model."): tensor for key, tensor in pipe.text_encoder.state_dict().items()}
    found |= {
        f"cond_stage_model.transformer.text_model.{key}": t for key, t in text.items() if "position_ids" not in key
    }
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, path)


def adapters(pipe: Any, folder: Path) -> None:
    """Two, with other numbers than zeros: one with a learned word of two vectors and products in the text encoder."""
    for seed, (name, word) in enumerate({"dog": "V*", "cat": "W*"}.items()):
        encoders = {"text_encoder_rank": 2} if name == "dog" else {}
        handle = customize.add_adapter(pipe, name=name, rank=2 + seed, token=word, token_init="dog", **encoders)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in handle.named_parameters():
            if not key.startswith("token."):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
        customize.save_adapter(pipe, folder / f"{name}.safetensors", name=name)


@torch.no_grad()
def expected(pipe: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    text, _ = pipe.encode_prompt(PROMPT.replace("(", "").replace(":1.0)", ""), "cpu", 2, False)
    return text, pipe.unet(latents, torch.tensor([500]), encoder_hidden_states=text).sample


@torch.no_grad()
def found(model: Any, clip: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    import comfy.model_management

    text = clip.encode_from_tokens(clip.tokenize(PROMPT)).expand(2, -1, -1)
    comfy.model_management.load_models_gpu([model])
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    unet = model.model.diffusion_model
    return text, unet(latents, torch.tensor([500.0]), context=text, transformer_options=options)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def main(place_of_comfy: str) -> None:
    sys.argv = [sys.argv[0], "--cpu", "--fp32-text-enc"]
    sys.path.insert(0, place_of_comfy)
    import comfy.options

    comfy.options.enable_args_parsing()
    import folder_paths
    import nodes as comfy_nodes

    with tempfile.TemporaryDirectory() as place:
        folder_paths.models_dir = place
        for kind in ("checkpoints", "loras", "comcat"):
            (Path(place) / kind).mkdir()
            folder_paths.add_model_folder_path(kind, str(Path(place) / kind), is_default=True)
        pack = _pack()
        pipe = pipeline(Path(place_of_comfy) / "comfy" / "sd1_tokenizer")
        checkpoint(pipe, Path(place) / "checkpoints" / "tiny.safetensors")
        latents = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(7))
        model, clip, _ = comfy_nodes.CheckpointLoaderSimple().load_checkpoint("tiny.safetensors")
        adapters(pipe, Path(place) / "comcat")
        left = torch.zeros(16, 24)
        left[:, :12] = 1
        ways = {"everywhere": {}, "on halves": {"dog": left, "cat": 1 - left}}
        failed = False
        for name, masks in ways.items():
            customize.set_adapters(pipe, {"dog": 0.8, "cat": -0.5}, masks)
            wanted = expected(pipe, latents)
            given = {f"mask_{i}": masks[who][None] for i, who in enumerate(("dog", "cat"), 1) if who in masks}
            slots = {"adapter_3": "none", "strength_3": 1.0, "adapter_4": "none", "strength_4": 1.0, **given}
            stack = {
                "adapter_1": "dog.safetensors",
                "strength_1": 0.8,
                "adapter_2": "cat.safetensors",
                "strength_2": -0.5,
            }
            at_once = pack.ComcatAdapterStack().load(model, clip, **stack, **slots)
            one = pack.LoadComcatAdapter().load(model, "dog.safetensors", 0.8, clip, given.get("mask_1"))
            both = pack.LoadComcatAdapter().load(one[0], "cat.safetensors", -0.5, one[1], given.get("mask_2"))
            for how, (m, c) in {"stack": at_once, "one after the other": both}.items():
                text, noise = found(m, c, latents)
                errors = off(text, wanted[0]), off(noise, wanted[1])
                failed |= max(errors) > TOLERANCE
                print(f"{name}, {how}: text {errors[0]:.1e}, noise {errors[1]:.1e}")
        customize.set_adapters(pipe, {}, None)
        base = pipe.unet(latents, torch.tensor([500]), encoder_hidden_states=wanted[0]).sample
        effect = off(wanted[1], base)
        import comfy.model_management

        comfy.model_management.load_models_gpu([model])
        with torch.no_grad():
            plain = model.model.diffusion_model(
                latents, torch.tensor([500.0]), context=wanted[0], transformer_options={}
            )
        errors = (off(plain, base),)
        failed |= max(errors) > TOLERANCE or effect < 100 * TOLERANCE
        print(f"the base afterwards: noise {errors[0]:.1e}; the adapters change it by {effect:.1e}")
        failed |= _same_layers(importlib.import_module("comfyui_comcat.layers").of_unet)
        failed |= _as_lora(pack, comfy_nodes, model, clip, latents, Path(place))
    raise SystemExit(failed)


def _same_layers(of_unet: Any) -> bool:
    """Whether every attention layer of whole models has the name and the shape that files have for it."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    failed = False
    for name, (ours, theirs) in WHOLE.items():
        with torch.device("meta"):
            diffusers = UNet2DConditionModel(**theirs)
        known = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320}
        given = {key: list(value) if isinstance(value, list) else value for key, value in ours.items()}
        unet = UNetModel(
            **known, **given, use_spatial_transformer=True, device="meta", operations=comfy.ops.disable_weight_init
        )
        root = SimpleNamespace(model_config=SimpleNamespace(unet_config=ours), diffusion_model=unet)
        root.get_submodule = lambda path, unet=unet: unet.get_submodule(path.removeprefix("diffusion_model."))
        found = {key: attention.signature() for key, (_, attention) in of_unet(SimpleNamespace(model=root)).items()}
        wanted = {key: attention.signature() for key, attention in find_addable("unet", diffusers)[0].items()}
        failed |= found != wanted
        print(
            f"{name}: {len(found)} attention layers, {'the same' if found == wanted else 'NOT the same'} as diffusers'"
        )
    return failed


def _as_lora(pack: Any, comfy_nodes: Any, model: Any, clip: Any, latents: Tensor, place: Path) -> bool:
    """The LoRA that a node writes is loaded by ComfyUI, every key of it."""
    import comfy.lora

    result = pack.SaveComcatAsLora().save(model, "dog.safetensors", 1.0, "dog", clip)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    state = load_file(place / "loras" / "dog.safetensors")
    loaded = comfy.lora.load_lora(state, keys)
    modules = {key.rsplit(".lora", 1)[0] for key in state if ".lora" in key}
    m, _ = comfy_nodes.LoraLoader().load_lora(model, clip, "dog.safetensors", 1.0, 1.0)
    text = torch.zeros(2, 77, 768)

    def noise(patcher: Any) -> Tensor:
        import comfy.model_management

        comfy.model_management.load_models_gpu([patcher])
        with torch.no_grad():
            found: Tensor = patcher.model.diffusion_model(
                latents, torch.tensor([500.0]), context=text, transformer_options={}
            )
        return found

    change = off(noise(m), noise(model))
    print("; ".join(result["ui"]["text"]))
    print(f"ComfyUI loads {len(loaded)} of its {len(modules)} modules, which change the noise by {change:.1e}")
    return len(loaded) != len(modules) or not change > 0


def _pack() -> Any:
    """The node pack of this folder."""
    here = Path(__file__).parent
    spec = importlib.util.spec_from_file_location(
        "comfyui_comcat", here / "__init__.py", submodule_search_locations=[str(here)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return importlib.import_module("comfyui_comcat.nodes")


if __name__ == "__main__":
    main(sys.argv[1])
