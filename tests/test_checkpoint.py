"""What is saved comes back bitwise, or is refused with a reason; nothing half-written stays."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

import comcat
from comcat.errors import CheckpointError
from comcat.layers.heads import as_parameter
from comcat.planning.plan import Plan
from comcat.storage.atomic import CONFIG_NAME
from comcat.storage.checkpoint import TENSORS_NAME
from conftest import SWIN, VIT, assert_same_outputs, calibrated, images, make, swin, vit
from test_compress import half_plan


def compressed(model: nn.Module, statistics: bool = True) -> nn.Module:
    return comcat.compress(model, half_plan(model), calibrated(model, 16) if statistics else None)


def check_same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    x = images(a, 3)
    with torch.no_grad():
        assert_same_outputs(a(x), b(x))
    assert not b.training
    assert {n: type(m) for n, m in a.named_modules()} == {n: type(m) for n, m in b.named_modules()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    comcat.save(compressed(vit(dtype=torch.float32)), tmp_path / "out")
    return tmp_path / "out"


HOSTS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any] | None]] = {
    "vit": (vit, None),
    "distilled": (lambda **a: make("deit_tiny_distilled_patch16_224", **VIT, **a), None),
    "deit3": (lambda **a: make("deit3_small_patch16_224", **VIT, **a), None),
    "dinov2": (lambda **a: make("vit_small_patch14_dinov2", **VIT, **a), None),
    "clip": (lambda **a: make("vit_base_patch32_clip_quickgelu_224", **VIT, **a), None),
    "siglip": (lambda **a: make("vit_base_patch16_siglip_224", **VIT, **a), None),
    "swin": (swin, None),
    "registers": (lambda **a: vit(reg_tokens=4, **a), VIT | {"reg_tokens": 4}),
    "no bias": (lambda **a: vit(qkv_bias=False, **a), VIT | {"qkv_bias": False}),
    "grey": (lambda **a: vit(in_chans=1, **a), None),
    "average pooling": (
        lambda **a: vit(class_token=False, global_pool="avg", **a),
        VIT | {"class_token": False, "global_pool": "avg"},
    ),
}


@pytest.mark.parametrize("host", HOSTS)
def test_save_then_load_is_bitwise(host: str, tmp_path: Path) -> None:
    make_model, args = HOSTS[host]
    small = compressed(make_model(dtype=torch.float32))
    comcat.save(small, tmp_path / "out", model_args=args)
    again = comcat.load(tmp_path / "out")
    check_same(small, again)
    assert again.comcat.plan == small.comcat.plan
    assert again.comcat.report == small.comcat.report


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("host", ["vit", "swin", "dinov2"])
def test_save_then_load_in_any_dtype(host: str, dtype: torch.dtype, tmp_path: Path) -> None:
    small = compressed(HOSTS[host][0](dtype=dtype), statistics=False)
    comcat.save(small, tmp_path / "out")
    check_same(small, comcat.load(tmp_path / "out"))


def test_a_trained_model_can_be_saved(tmp_path: Path) -> None:
    small = compressed(vit(dtype=torch.float32)).train()
    small(images(small)).square().sum().backward()
    torch.optim.SGD(small.parameters(), 0.01).step()
    comcat.save(small, tmp_path / "out")
    assert small.training
    check_same(small.eval(), comcat.load(tmp_path / "out"))


def test_a_loaded_model_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    comcat.save(comcat.load(saved), tmp_path / "again")
    for name in (TENSORS_NAME, CONFIG_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_a_dense_model_can_be_saved(tmp_path: Path) -> None:
    model = vit(dtype=torch.float32)
    comcat.save(model, tmp_path / "out")
    check_same(model, comcat.load(tmp_path / "out"))


def test_the_directory_holds_two_small_files(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG_NAME, TENSORS_NAME]
    assert [p.name for p in saved.parent.iterdir()] == ["out"]
    small = comcat.load(saved)
    size = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    assert size <= (saved / TENSORS_NAME).stat().st_size < size + 20_000
    assert json.loads((saved / CONFIG_NAME).read_text())["architecture"]["name"] == "vit_tiny_patch16_224"


def test_the_data_config_comes_back(tmp_path: Path) -> None:
    model = vit(dtype=torch.float32)
    model.pretrained_cfg = model.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.77}
    comcat.save(compressed(model), tmp_path / "out")
    config = comcat.load(tmp_path / "out").pretrained_cfg
    assert (config["mean"], config["crop_pct"]) == ((0.1, 0.2, 0.3), 0.77)
    assert (config["input_size"], config["num_classes"]) == ((3, 14, 21), 11)


# -- refusals when loading --------------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((path / CONFIG_NAME).read_text())
    change(config)
    (path / CONFIG_NAME).write_text(json.dumps(config))


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        comcat.load(path)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_tensors(saved: Path, kept: int) -> None:
    content = (saved / TENSORS_NAME).read_bytes()
    (saved / TENSORS_NAME).write_bytes(content[:kept])
    refused(saved, "bytes instead of .*: it is truncated or was replaced; copy the model again")


@pytest.mark.parametrize("place", [0, 9, 5000, -1])
def test_a_flipped_byte(saved: Path, place: int) -> None:
    content = bytearray((saved / TENSORS_NAME).read_bytes())
    content[place] ^= 1
    (saved / TENSORS_NAME).write_bytes(content)
    refused(saved, "does not match its checksum: it was damaged or changed")


def replace_tensors(path: Path, content: bytes) -> None:
    (path / TENSORS_NAME).write_bytes(content)
    tensors = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(path, lambda config: config.update(tensors=tensors))


def test_not_safetensors(saved: Path) -> None:
    replace_tensors(saved, b"x" * 1000)
    refused(saved, "damaged or no safetensors file")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda s: s.pop("norm.weight"), "norm.weight"),
        (lambda s: s.update(extra=torch.zeros(3)), "extra"),
        (lambda s: s.update({"head.up.weight": torch.zeros(11, 7)}), "head.up.weight"),
    ],
)
def test_other_tensors(saved: Path, change: Callable[[dict[str, Any]], Any], name: str) -> None:
    state = load_file(saved / TENSORS_NAME)
    change(state)
    replace_tensors(saved, save(state))
    refused(saved, f"contradict the tensors: '{name}' should be .* but is ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(comcat_format=3, comcat_version="9.0"), r"has format 3 \(written by comcat 9.0\).*upgrade"),
        (lambda c: c.update(comcat_format="1"), "not a comcat model description"),
        (lambda c: c.pop("comcat_format"), "not a comcat model description"),
        (lambda c: c.update(colour=1, apple=2), "unknown fields apple, colour"),
        (lambda c: c.pop("plan"), "no fields plan"),
        (lambda c: c["plan"]["layers"]["head"].update(rank=5), r"contradict the tensors: 'head\.down\.weight'"),
        (lambda c: c["plan"]["layers"]["blocks.0.attn"].update(qk=2), r"'blocks\.0\.attn\.qkv\.weight' should be"),
        (lambda c: c["plan"]["layers"]["blocks.0.attn"].update(qk=99), "contradicts its architecture: .* qk is 99"),
        (lambda c: c["plan"]["layers"].pop("head"), r"'head\.weight' should be \(11, 15\) but is None"),
        (lambda c: c["plan"]["layers"].update({"blocks.8.attn": {}}), r"'blocks\.8\.attn' is not in this model"),
        (lambda c: c["plan"].update(extra=1), "is damaged: the plan has unknown fields extra"),
        (lambda c: c["plan"].update(comcat_plan=7), "is damaged: the plan has format 7"),
        (lambda c: c["architecture"].update(name="no_such_model"), "timm has no architecture 'no_such_model'"),
        (lambda c: c["architecture"]["args"].update(depth=3), r"'blocks\.2\..*' should be .* but is None"),
        (lambda c: c["architecture"]["args"].update(wheels=4), "timm cannot build .*wheels"),
        (lambda c: c["architecture"].pop("args"), r"no fields architecture\.args"),
        (lambda c: c["report"].pop("layers"), "is damaged: 'layers'"),
        (lambda c: c["report"].update(extra=1), "is damaged: .*extra"),
        (lambda c: c.update(report=3), "is damaged"),
        (lambda c: c.update(plan=[]), "is damaged: not a plan"),
        (lambda c: c.update(tensors={}), r"no fields tensors\.bytes, tensors\.sha256"),
        (lambda c: c["architecture"].update(name="hf-hub:someone/something"), "timm has no architecture 'hf-hub"),
    ],
)
def test_edited_descriptions(saved: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(saved, change)
    refused(saved, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_descriptions_that_are_no_json_object(saved: Path, text: str) -> None:
    (saved / CONFIG_NAME).write_text(text)
    refused(saved, "not valid JSON|not a comcat model description")


def test_directories_without_a_model(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "missing", f"not a model saved by comcat: it has no {CONFIG_NAME}")
    refused(tmp_path, f"not a model saved by comcat: it has no {CONFIG_NAME}")
    (saved / TENSORS_NAME).unlink()
    refused(saved, "cannot read .*No such file")


# -- refusals when saving ---------------------------------------------------------------------------------------------


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_an_existing_model_is_kept_unless_told(saved: Path) -> None:
    before = tree(saved.parent)
    other = compressed(vit(seed=5, dtype=torch.float32))
    with pytest.raises(CheckpointError, match="already holds something; choose another or overwrite it"):
        comcat.save(other, saved)
    assert tree(saved.parent) == before
    comcat.save(other, saved, overwrite=True)
    check_same(other, comcat.load(saved))
    assert [p.name for p in saved.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    message = "files that are not a comcat model" if overwrite else "already holds something"
    with pytest.raises(CheckpointError, match=message):
        comcat.save(vit(dtype=torch.float32), tmp_path, overwrite=overwrite)
    with pytest.raises(CheckpointError, match="is a file; choose a directory"):
        comcat.save(vit(dtype=torch.float32), tmp_path / "thesis.tex", overwrite=overwrite)
    assert tree(tmp_path) == {"thesis.tex": b"years of work"}


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    model = vit(dtype=torch.float32)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        comcat.save(model, path)
        check_same(model, comcat.load(path))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("fails", [errno.ENOSPC, errno.EDQUOT, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["write_bytes", "write_text", "rename"])
def test_a_failed_save_leaves_nothing_behind(
    saved: Path, monkeypatch: pytest.MonkeyPatch, at: str, fails: Any, overwrite: bool
) -> None:
    """The disk is full, or Ctrl-C comes, at any step: the old model stays, or there is none."""
    model = vit(seed=5, dtype=torch.float32)
    if not overwrite:
        shutil.rmtree(saved)
    before = tree(saved.parent)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(fails, "No space left on device") if isinstance(fails, int) else fails

    if at == "rename":
        import os

        real = os.rename
        monkeypatch.setattr("comcat.storage.atomic.exchange", fail)
        monkeypatch.setattr(
            "comcat.storage.atomic.os.rename", lambda a, b: fail() if str(a).endswith(".tmp") else real(a, b)
        )
    else:
        monkeypatch.setattr(Path, at, fail)
    expected = (
        (CheckpointError, "No space left on device; nothing was written") if isinstance(fails, int) else (fails, None)
    )
    with pytest.raises(expected[0], match=expected[1]):
        comcat.save(model, saved, overwrite=overwrite)
    monkeypatch.undo()
    assert tree(saved.parent) == before
    assert saved.exists() == overwrite


def test_what_was_written_half_is_refused(saved: Path) -> None:
    (saved / CONFIG_NAME).unlink()
    refused(saved, "not a model saved by comcat")


@pytest.mark.parametrize(
    "args",
    [
        {"reg_tokens": 4},
        {"qkv_bias": False},
        {"class_token": False, "global_pool": "avg"},
        {"init_values": 0.1},
        {"act_layer": "relu"},
        {"norm_layer": nn.Identity},
    ],
)
def test_what_cannot_be_read_off_must_be_given(args: dict[str, Any], tmp_path: Path) -> None:
    model = vit(dtype=torch.float32, **args)
    model.__dict__.pop("_model_args", None)  # newer versions of timm remember them
    small = compressed(model)
    with pytest.raises(CheckpointError, match=r"pass model_args=\{...\} with the arguments"):
        comcat.save(small, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    if "norm_layer" not in args:
        comcat.save(small, tmp_path / "out", model_args=VIT | args)
        check_same(small, comcat.load(tmp_path / "out"))


@pytest.mark.parametrize("model_args", [{"img_size": 14}, SWIN, {"wheels": 4}])
def test_wrong_model_args_are_noticed(model_args: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be rebuilt"):
        comcat.save(compressed(vit(dtype=torch.float32)), tmp_path / "out", model_args=model_args)
    assert not any(tmp_path.iterdir())


def test_model_args_that_are_no_plain_data_are_refused(tmp_path: Path) -> None:
    model = vit(dtype=torch.float32, norm_layer=nn.LayerNorm)
    with pytest.raises(CheckpointError):
        comcat.save(model, tmp_path / "out", model_args=VIT | {"norm_layer": nn.LayerNorm})


def test_a_model_that_is_not_from_timm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not come from timm\.create_model"):
        comcat.save(nn.Linear(3, 5), tmp_path / "out")


def test_a_changed_module_is_noticed(tmp_path: Path) -> None:
    """The tensors would fit, yet the rebuilt model computes something else."""
    model = vit(dtype=torch.float32)
    model.blocks[0].mlp.act = nn.ReLU()
    with pytest.raises(CheckpointError, match="the rebuilt model computes something else"):
        comcat.save(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_model_compressed_twice_can_be_saved(tmp_path: Path) -> None:
    once = comcat.compress(vit(dtype=torch.float32), comcat.Plan({"blocks.0.attn": {"qk": 2}}))
    twice = comcat.compress(once, comcat.Plan({"head": {"rank": 3}}))
    comcat.save(twice, tmp_path / "out")
    check_same(twice, comcat.load(tmp_path / "out"))


def test_strides_are_those_of_a_file(tmp_path: Path) -> None:
    """An axis of length 1 may have any stride, and kernels round by strides: made and loaded models have the same."""
    model = comcat.compress(vit(), Plan({"head": {"rank": 1}, "blocks.0.mlp": {"fc1": 1}}))
    comcat.save(model, tmp_path / "m")
    again = comcat.load(tmp_path / "m")
    strides = {name: tensor.stride() for name, tensor in again.state_dict().items()}
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides
    wide = torch.ones(3, 1).mT
    assert wide.is_contiguous()
    assert wide.stride() == (1, 1)
    assert as_parameter(wide, wide).stride() == (3, 1)
