"""LoRA files: what is written loads into pipelines without a word, and reads back."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comcat.customize.lora.algebra import LoraWeights
from comcat.customize.lora.keys import read_lora, to_diffusers, to_kohya
from comcat.customize.lora.lora_config import METADATA_KEY, LoraConfig
from comcat.errors import CheckpointError

Factors = dict[str, dict[str, LoraWeights]]

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_" + PATH.replace(".", "_")
NAMES = {"unet": [PATH]}


def text_config() -> Any:
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": 12, "intermediate_size": 13, "num_attention_heads": 3, "num_hidden_layers": 2}
    tokens = {"vocab_size": 23, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return CLIPTextConfig(**sizes, **tokens, projection_dim=12)


def unet(**args: Any) -> Any:
    from diffusers import UNet2DConditionModel

    sizes = {"sample_size": 8, "block_out_channels": (8, 12, 16), "norm_num_groups": 4, "attention_head_dim": 2}
    return UNet2DConditionModel(cross_attention_dim=12, layers_per_block=2, **sizes, **args)


def sd() -> Any:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    blocks = unet(
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    unused = ("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    parts = {"unet": blocks, "text_encoder": CLIPTextModel(text_config())}
    return StableDiffusionPipeline(**parts, **dict.fromkeys(unused), requires_safety_checker=False)


def sdxl() -> Any:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    blocks = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
    )
    encoders = {"text_encoder": CLIPTextModel(text_config())}
    encoders["text_encoder_2"] = CLIPTextModelWithProjection(text_config())
    unused = ("vae", "tokenizer", "tokenizer_2", "scheduler")
    return StableDiffusionXLPipeline(unet=blocks, **encoders, **dict.fromkeys(unused), add_watermarker=False)


PIPELINES = {"sd": sd, "sdxl": sdxl}
LAYOUTS: dict[str, Callable[[Factors, str], dict[str, Tensor]]] = {
    "diffusers": lambda factors, model: to_diffusers(factors),
    "kohya": lambda factors, model: to_kohya(factors, sdxl=model == "sdxl"),
}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def components(pipe: Any) -> dict[str, nn.Module]:
    return {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}


def module_names(pipe: Any) -> dict[str, list[str]]:
    return {name: list(dict(module.named_modules())) for name, module in components(pipe).items()}


def random_factors(pipe: Any, ranks: tuple[int, ...] = (3,)) -> Factors:
    """A random LoRA of every attention projection, the ranks taken in turn."""
    generator = torch.Generator().manual_seed(0)
    factors: Factors = {}
    for component, model in components(pipe).items():
        layers = [(path, m) for path, m in model.named_modules() if path.endswith(PROJECTIONS)]
        for i, (path, layer) in enumerate(layers):
            rank = ranks[i % len(ranks)]
            down = torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, rank, generator=generator)
            factors.setdefault(component, {})[path] = LoraWeights(down, up)
    return factors


def assert_same(factors: Factors, expected: Factors, exact: bool) -> None:
    assert {c: set(modules) for c, modules in factors.items()} == {c: set(m) for c, m in expected.items()}
    for component, modules in expected.items():
        for path, (down, up) in modules.items():
            found = factors[component][path]
            torch.testing.assert_close(found.up @ found.down, up @ down, rtol=0, atol=0 if exact else 1e-5)


@pytest.fixture
def spoken() -> Iterator[list[str]]:
    """What the libraries log at the level of warnings."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("diffusers", "transformers", "peft", ""):
            logger = logging.getLogger(name)
            patch.setattr(logger, "handlers", [*logger.handlers, handler])
        yield records


@pytest.mark.parametrize("ranks", [(3,), (3, 2, 5)], ids=["one rank", "several ranks"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", PIPELINES)
def test_diffusers_loads_what_is_written(model: str, layout: str, ranks: tuple[int, ...], spoken: list[str]) -> None:
    pipe = PIPELINES[model]()
    factors = random_factors(pipe, ranks)
    names = module_names(pipe)
    base = {c: {path: m.get_submodule(path) for path in factors[c]} for c, m in components(pipe).items()}
    tensors = LAYOUTS[layout](factors, model)
    spoken.clear()
    pipe.load_lora_weights(tensors)
    assert spoken == []
    for component, modules in factors.items():
        for path, (down, up) in modules.items():
            layer, wrapped = base[component][path], getattr(pipe, component).get_submodule(path)
            assert layer is not wrapped
            x = torch.randn(7, layer.in_features)
            torch.testing.assert_close(wrapped(x), layer(x) + x @ (up @ down).mT, rtol=1e-5, atol=1e-5)
    found = read_lora(tensors, names)
    assert found.unmatched == []
    assert_same(found.factors, factors, exact=len(ranks) == 1)


def test_kohya_names() -> None:
    """Names as sd-scripts writes them."""
    lora = LoraWeights(torch.ones(2, 3), torch.ones(5, 2))
    blocks = {
        "down_blocks.2.attentions.1": "input_blocks_8_1",
        "down_blocks.1.attentions.0": "input_blocks_4_1",
        "mid_block.attentions.0": "middle_block_1",
        "up_blocks.0.attentions.2": "output_blocks_2_1",
        "up_blocks.1.attentions.0": "output_blocks_3_1",
    }
    rest = "transformer_blocks.0.attn2.to_out.0"
    text = {"encoder.layers.1.self_attn.q_proj": lora}
    for path, original in blocks.items():
        factors = {"unet": {f"{path}.{rest}": lora}, "text_encoder": text}
        flat = path.replace(".", "_")
        halves = ("lora_down.weight", "lora_up.weight", "alpha")
        names = [f"lora_unet_{flat}_transformer_blocks_0_attn2_to_out_0"]
        names.append("lora_te_text_model_encoder_layers_1_self_attn_q_proj")
        assert set(to_kohya(factors, sdxl=False)) == {f"{name}.{half}" for name in names for half in halves}
        names = [f"lora_unet_{original}_transformer_blocks_0_attn2_to_out_0"]
        names += [f"lora_te{i}_text_model_encoder_layers_1_self_attn_q_proj" for i in (1, 2)]
        written = to_kohya({**factors, "text_encoder_2": text}, sdxl=True)
        assert set(written) == {f"{name}.{half}" for name in names for half in halves}
        assert {float(written[f"{name}.alpha"]) for name in names} == {2.0}


@pytest.mark.parametrize(
    ("component", "path", "sdxl"),
    [
        ("transformer", "transformer_blocks.0.attn.to_q", False),
        ("text_encoder_2", "text_model.encoder.layers.0.self_attn.q_proj", False),
        ("unet", "time_embedding.linear_1", True),
    ],
)
def test_kohya_has_no_name_for(component: str, path: str, sdxl: bool) -> None:
    with pytest.raises(CheckpointError, match="write the diffusers layout instead"):
        to_kohya({component: {path: LoraWeights(torch.ones(2, 3), torch.ones(5, 2))}}, sdxl=sdxl)


def test_diffusers_layout_serves_transformers() -> None:
    lora = LoraWeights(torch.ones(2, 3), torch.ones(5, 2))
    factors = {"transformer": {"transformer_blocks.0.attn.to_q": lora}}
    tensors = to_diffusers(factors)
    assert set(tensors) == {f"transformer.transformer_blocks.0.attn.to_q.lora_{half}.weight" for half in "AB"}
    assert_same(read_lora(tensors, {"transformer": ["transformer_blocks.0.attn.to_q"]}).factors, factors, exact=True)


ORIGINAL = STEM.replace("down_blocks_0_attentions_0", "input_blocks_1_1")
OLD = "unet." + PATH.replace("attn1.", "attn1.processor.")


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"unet.{PATH}.lora_A.weight", f"unet.{PATH}.lora_B.weight"),
        (f"unet.{PATH}.lora_A.default.weight", f"unet.{PATH}.lora_B.default.weight"),
        (f"base_model.model.{PATH}.lora_A.weight", f"base_model.model.{PATH}.lora_B.weight"),
        (f"unet.{PATH}.lora.down.weight", f"unet.{PATH}.lora.up.weight"),
        (f"{OLD}_lora.down.weight", f"{OLD}_lora.up.weight"),
        (f"{OLD[5:]}_lora.down.weight", f"{OLD[5:]}_lora.up.weight"),
        (f"{STEM}.lora_down.weight", f"{STEM}.lora_up.weight"),
        (f"{ORIGINAL}.lora_down.weight", f"{ORIGINAL}.lora_up.weight"),
    ],
)
def test_layouts_of_all_ages_are_read(down: str, up: str) -> None:
    lora = LoraWeights(torch.randn(2, 3), torch.randn(5, 2))
    tensors = {down: lora.down, up: lora.up}
    if down.startswith("base_model"):  # its alpha stands beside the file
        with pytest.raises(
            CheckpointError, match=r"alpha stands in adapter_config\.json, which is not beside it.*--lora-alpha"
        ):
            read_lora(tensors, NAMES)
    found = read_lora(tensors, NAMES, config=LoraConfig(lora_alpha=2))
    assert found.unmatched == []
    assert bool(found.notes) == (not down.startswith("base_model"))
    assert_same(found.factors, {"unet": {PATH: lora}}, exact=True)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize(
    "stem", ["out_proj.lora_A", "out_proj.lora_linear_layer.down", "to_out_lora.down", "out_proj.lora.down"]
)
def test_text_encoders_are_read_with_and_without_their_prefix(stem: str, prefix: str) -> None:
    lora = LoraWeights(torch.randn(2, 3), torch.randn(5, 2))
    path = f"{prefix}encoder.layers.0.self_attn.out_proj"
    down = f"text_encoder.text_model.encoder.layers.0.self_attn.{stem}.weight"
    up = down.replace("lora_A", "lora_B").replace("down", "up")
    found = read_lora({down: lora.down, up: lora.up}, {"text_encoder": [path]})
    assert_same(found.factors, {"text_encoder": {path: lora}}, exact=True)


def test_the_output_projection_of_old_files() -> None:
    path = PATH.replace("to_q", "to_out.0")
    stem = OLD.replace("to_q", "to_out_lora")
    tensors = {f"{stem}.down.weight": torch.ones(2, 3), f"{stem}.up.weight": torch.ones(5, 2)}
    assert list(read_lora(tensors, {"unet": [path.removesuffix(".0"), path]}).factors["unet"]) == [path]


@pytest.mark.parametrize("stem", [STEM, f"unet.{PATH}"])
def test_alpha_is_folded(stem: str) -> None:
    down, up = torch.randn(4, 3), torch.randn(5, 4)
    halves = ("lora_down", "lora_up") if stem == STEM else ("lora_A", "lora_B")
    tensors = {f"{stem}.{halves[0]}.weight": down.half(), f"{stem}.{halves[1]}.weight": up.half()}
    found = read_lora({**tensors, f"{stem}.alpha": torch.tensor(1.0)}, NAMES).factors["unet"][PATH]
    assert found.down.dtype == found.up.dtype == torch.float32
    torch.testing.assert_close(found.up, up.half().float() / 4)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8, "r": 4}, 2.0),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {f"^{PATH}": 2}}, 0.5),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"1.to_k": 2}}, 2.0),
        ({"lora_alpha": 8, "r": 4, "use_rslora": True}, 4.0),
    ],
)
def test_alpha_of_the_header_is_folded(config: dict[str, Any], scale: float) -> None:
    factors = {"unet": {PATH: LoraWeights(torch.randn(4, 3), torch.randn(5, 4))}}
    metadata = {METADATA_KEY: json.dumps({f"unet.{key}": value for key, value in config.items()})}
    found = read_lora(to_diffusers(factors), NAMES, metadata).factors["unet"][PATH]
    torch.testing.assert_close(found.up, factors["unet"][PATH].up * scale)


def test_what_belongs_to_no_module_is_reported() -> None:
    lora = LoraWeights(torch.ones(2, 3), torch.ones(5, 2))
    tensors = to_diffusers({"unet": {PATH: lora, "conv_in": lora}, "text_encoder_2": {"x.q_proj": lora}})
    found = read_lora({**tensors, "embedding": torch.ones(2)}, NAMES)
    assert list(found.factors["unet"]) == [PATH]
    assert set(found.unmatched) == {"embedding", "text_encoder_2.x.q_proj", "unet.conv_in"}
    with pytest.raises(CheckpointError, match=r"nothing.*another base model"):
        read_lora(tensors, {"unet": ["other"]})
    with pytest.raises(CheckpointError, match=r"\(a, b, c and 1 more\)"):
        read_lora(dict.fromkeys("abcd", torch.ones(2)), NAMES)


@pytest.mark.parametrize(
    ("key", "method"),
    [
        (f"{STEM}.dora_scale", "DoRA"),
        (f"unet.{PATH}.lora_magnitude_vector", "DoRA"),
        (f"{STEM}.lokr_w1", "LoKr"),
        (f"{STEM}.hada_w1_a", "LoHa"),
        (f"{STEM}.lora_mid.weight", "LoCon"),
        (f"{STEM}.oft_blocks", "OFT"),
        (f"{STEM}.diff", "weight-difference"),
        (f"unet.{PATH}.lora_B.bias", "bias"),
    ],
)
def test_other_methods_are_refused_by_name(key: str, method: str) -> None:
    tensors = to_kohya({"unet": {PATH: LoraWeights(torch.ones(2, 3), torch.ones(5, 2))}}, sdxl=False)
    with pytest.raises(CheckpointError, match=method):
        read_lora({**tensors, key: torch.ones(2)}, NAMES)
    with pytest.raises(CheckpointError, match="DoRA"):
        read_lora(tensors, NAMES, {METADATA_KEY: json.dumps({"unet.use_dora": True})})


def test_damaged_files_are_refused() -> None:
    down, up = f"{STEM}.lora_down.weight", f"{STEM}.lora_up.weight"
    with pytest.raises(CheckpointError, match="only the down factor"):
        read_lora({down: torch.ones(2, 3)}, NAMES)
    with pytest.raises(CheckpointError, match="do not fit"):
        read_lora({down: torch.ones(2, 3), up: torch.ones(5, 3)}, NAMES)
    both = {down: torch.ones(2, 3), up: torch.ones(5, 2)}
    with pytest.raises(CheckpointError, match="two entries"):
        read_lora({**both, **to_diffusers({"unet": {PATH: LoraWeights(both[down], both[up])}})}, NAMES)
