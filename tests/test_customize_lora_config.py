"""What a LoRA's factors are multiplied with: never guessed in silence, and nothing from a file is run."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from comcat import CheckpointError
from comcat.customize import adapters, import_lora, remove_adapter
from comcat.customize.lora.lora_config import CONFIG_NAME, METADATA_KEY
from diffusion import inputs, model, output

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def pefts(folder: Path, **settings: Any) -> tuple[Path, Tensor]:
    """A LoRA as PEFT saves it, and what the model gives with it."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model("sd1"), PeftConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **settings))
    wrapped.base_model.model.to(torch.float64)
    wanted = output(wrapped, inputs(wrapped.base_model.model))
    wrapped.save_pretrained(folder)
    return folder / "adapter_model.safetensors", wanted


@pytest.fixture(scope="module")
def host():
    """Shared: every test leaves it as it was."""
    return model("sd1")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path, wanted = pefts(tmp_path_factory.mktemp("peft"), lora_alpha=8)
    return path, wanted


@pytest.fixture
def copied(file, tmp_path):
    """The file with its configuration, to be changed."""
    for name in ("adapter_model.safetensors", CONFIG_NAME):
        (tmp_path / name).write_bytes((file[0].parent / name).read_bytes())
    return tmp_path / "adapter_model.safetensors"


def refused(host: Any, path: Path, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        import_lora(host, path, rank=4, **options)
    assert not adapters(host)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 2, "use_rslora": True},
        {"lora_alpha": 2, "alpha_pattern": {"to_v": 6, f"^{PATH}": 5}},
        {"lora_alpha": 2, "alpha_pattern": {"attn1.to_out.0": 7}, "rank_pattern": {"attn2.to_q": 1}},
    ],
)
def test_the_configuration_beside_the_file_counts(host, tmp_path, settings):
    path, wanted = pefts(tmp_path, **settings)
    _, conversion = import_lora(host, path, rank=4)
    try:
        torch.testing.assert_close(output(host, inputs(host)), wanted, rtol=0, atol=1e-5)
        assert conversion.notes == []
    finally:
        remove_adapter(host, "lora")


def test_without_it_the_alpha_is_asked_for(host, file, copied):
    (copied.parent / CONFIG_NAME).unlink()
    refused(host, copied, r"alpha stands in adapter_config\.json, which is not beside it.*--lora-alpha")
    import_lora(host, copied, rank=4, lora_alpha=8)
    try:
        torch.testing.assert_close(output(host, inputs(host)), file[1], rtol=0, atol=1e-5)
    finally:
        remove_adapter(host, "lora")


def test_two_sources_of_one_alpha_are_refused(host, copied):
    refused(host, copied, "says itself what its alpha is; leave --lora-alpha", lora_alpha=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "DoRA files cannot be read"),
        ({"peft_type": "LOHA"}, "of the method 'LOHA'"),
        ({"bias": "lora_only"}, "biases were trained too"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'.*base weights that were changed"),
        ({"init_lora_weights": 1}, "init_lora_weights 1"),
        ({"layer_replication": [[0, 2]]}, "replicated"),
        ({"new_of_next_year": 3}, "setting 'new_of_next_year', which is not known"),
        ({"r": 5}, "says rank 5 for .* and the file has 2: they do not belong together"),
        ({"rank_pattern": {"to_v": 3}}, "says rank 3"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern"),
        ({"alpha_pattern": {r"(a+)+$": 3}}, r"the pattern '\(a\+\)\+\$'; only plain names"),
        ({"alpha_pattern": {"to_q|to_v": 3}}, "no regular expressions"),
        ({"rank_pattern": {"[": 3}}, "no regular expressions"),
    ],
)
def test_configurations_that_cannot_be_followed_are_refused(host, copied, changes, message):
    beside = copied.parent / CONFIG_NAME
    beside.write_text(json.dumps({**json.loads(beside.read_text()), **changes}))
    refused(host, copied, message)


@pytest.mark.parametrize(
    "text", ["[", "[]", "5", "[" * 100000, '{"r": ' + "9" * 5000 + "}", '{"lora_alpha": NaN}', "{}"]
)
def test_damaged_configurations_are_refused(host, copied, text):
    (copied.parent / CONFIG_NAME).write_text(text)
    refused(host, copied, CONFIG_NAME)
    (copied.parent / CONFIG_NAME).unlink()
    save_file(load_file(copied), copied, {METADATA_KEY: text if text != "{}" else '{"unet.r": 2}'})
    refused(host, copied, METADATA_KEY)


def test_what_is_no_regular_file_is_refused(host, copied):
    (copied.parent / CONFIG_NAME).unlink()
    os.mkfifo(copied.parent / CONFIG_NAME)
    refused(host, copied, "is no regular file")
    (copied.parent / CONFIG_NAME).unlink()
    copied.unlink()
    os.mkfifo(copied)
    refused(host, copied, "is no regular file")


def test_a_pattern_is_never_run(host, copied):
    """As a regular expression this one takes longer than anybody lives."""
    entries = {"unet.lora_alpha": 2, "unet.alpha_pattern": {"(.*a){25}" * 5: 3}}
    save_file(load_file(copied), copied, {METADATA_KEY: json.dumps(entries)})
    before = time.process_time()
    refused(host, copied, "no regular expressions")
    assert time.process_time() - before < 60


def edited(path: Path, edit: Any) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    edit(tensors, name, name.replace("lora_A", "lora_B"))
    save_file({key: t.contiguous() for key, t in tensors.items()}, path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, a, _: t.update({a: t[a].to(torch.int8)}), "is torch.int8, not of floating point"),
        (lambda t, a, _: t.update({a: t[a] > 0}), "is torch.bool, not of floating point"),
        (lambda t, a, _: t.update({a: t[a].to(torch.complex64)}), "C64"),
        (lambda t, a, b: t.update({a: t[a][:0], b: t[b][:, :0]}), "do not fit"),
        (lambda t, a, _: t.update({a: t[a].sum()}), "do not fit"),
        (lambda t, a, _: t.update({a: t[a][:, :1]}), "for a layer of 1 inputs and 10 outputs.*another base model"),
        (lambda t, _, b: t.update({b: t[b][:3]}), "for a layer of 10 inputs and 3 outputs"),
        (lambda t, a, _: t.update({a: t[a] * float("nan")}), "hold NaN or infinite values"),
        (lambda t, a, _: t.update({a.replace("lora_A.weight", "alpha"): torch.ones(2)}), "alpha' is no number"),
        (lambda t, a, _: t.update({a.replace("lora_A.weight", "alpha"): torch.tensor(float("inf"))}), "is no number"),
        (lambda t, a, _: t.update({a.replace("lora_A.weight", "scale_weight"): torch.ones(1)}), "scaled float8"),
    ],
)
def test_damaged_factors_are_refused(host, copied, edit, message):
    edited(copied, edit)
    refused(host, copied, message)


@torch.no_grad()
def test_float8_factors_are_plain_weights(host, copied):
    """As people ship them: every tensor cast. What counts is what the file holds."""
    half = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(copied).items()}
    save_file(half, copied)
    handle, _ = import_lora(host, copied, rank=4)
    got = {name: t.clone() for name, t in handle.state_dict().items()}
    remove_adapter(host, "lora")
    save_file({name: t.float() for name, t in half.items()}, copied)
    handle, _ = import_lora(host, copied, rank=4)
    for name, tensor in handle.state_dict().items():
        torch.testing.assert_close(got[name], tensor)
    remove_adapter(host, "lora")


def test_a_configuration_beside_another_kind_of_file_is_none_of_its(host, tmp_path):
    (tmp_path / CONFIG_NAME).write_text("{")
    halves = {f"unet.{PATH}.lora_A.weight": torch.ones(2, 10), f"unet.{PATH}.lora_B.weight": torch.ones(10, 2)}
    save_file(halves, tmp_path / "lora.safetensors")
    _, conversion = import_lora(host, tmp_path / "lora.safetensors", rank=2)
    remove_adapter(host, "lora")
    assert any("does not say what its alpha is" in note for note in conversion.notes)


def test_files_of_another_family_are_named(host, tmp_path):
    stems = {
        "lora_unet_double_blocks_0_img_attn_qkv": "those of FLUX in its original layout.*load_lora_weights",
        "transformer.single_transformer_blocks.0.attn.to_q": "those of FLUX",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": "those of Stable Diffusion XL",
    }
    for stem, message in stems.items():
        halves = {f"{stem}.lora_down.weight": torch.ones(2, 3), f"{stem}.lora_up.weight": torch.ones(5, 2)}
        save_file(halves, tmp_path / "other.safetensors")
        refused(host, tmp_path / "other.safetensors", message)
