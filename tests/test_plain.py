"""A wrapped, quantized or empty model is refused at the start of every entry, with the way out."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import comcat
from comcat.errors import ModelError
from comcat.models.wrappers import check_plain
from conftest import calibrated, images, vit


def halves() -> comcat.Plan:
    return comcat.Plan({"blocks.0.attn": {"qk": 2}})


def peft_model(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"]))


def adapted(model: nn.Module) -> nn.Module:
    """The model inside a PEFT model, whose layers are PEFT's."""
    return peft_model(model).base_model.model


def part_compiled(model: nn.Module) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def quantized(model: nn.Module) -> nn.Module:
    model.head = torch.ao.nn.quantized.dynamic.Linear(15, 11)
    return model


def integers(model: nn.Module) -> nn.Module:
    model.head.weight = nn.Parameter(model.head.weight.to(torch.int8), requires_grad=False)
    return model


def empty(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("meta")


def lazy(model: nn.Module) -> nn.Module:
    model.head = nn.LazyLinear(11)
    return model


def subclass(model: nn.Module) -> nn.Module:
    class Packed(torch.Tensor):
        pass

    model.head.weight = nn.Parameter(model.head.weight.detach().as_subclass(Packed))
    return model


def traced(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, images(model, 1), check_trace=False)


def graph(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (images(model, 1),)).module()


WRONG: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "compiled": (lambda m: torch.compile(m, backend="eager"), r"compiled by torch\.compile: use model\._orig_mod"),
    "a compiled block": (part_compiled, r"module 'blocks\.1' is compiled .*: use model\.blocks\.1\._orig_mod"),
    "data parallel": (nn.DataParallel, r"wrapped in DataParallel: use model\.module"),
    "average": (torch.optim.swa_utils.AveragedModel, r"a weight average: use model\.module"),
    "peft": (peft_model, r"a PEFT model .*: model\.merge_and_unload\(\)"),
    "adapted": (adapted, r"module 'blocks\.0\.attn\.qkv' is adapted by PEFT: merge"),
    "quantized": (quantized, r"module 'head' is a quantized Linear: compress the model in floating point"),
    "integers": (integers, r"parameter 'head\.weight' is of int8: compress the model in floating point"),
    "tensor subclass": (subclass, r"parameter 'head\.weight' is a Packed, not an ordinary tensor"),
    "empty": (empty, r"parameter 'cls_token' is on the meta device, without values: load the weights"),
    "lazy": (lazy, r"parameter 'head\.weight' has no shape yet"),
    "traced": (traced, r"compiled by TorchScript: use the Python model"),
    "graph": (graph, r"a traced graph .*: use the Python model"),
    "no module": (lambda m: "vit", r"a model is a torch\.nn\.Module, not str; make one with timm\.create_model"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_plain_model_is_refused_with_the_way_out(wrong: str) -> None:
    make, message = WRONG[wrong]
    model = make(vit(dtype=torch.float32))
    with pytest.raises(ModelError, match=message):
        check_plain(model)


def test_every_entry_asks_first(tmp_path: Path) -> None:
    model = vit(dtype=torch.float32)
    calibration = calibrated(model, 32)
    wrapped = nn.DataParallel(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    budget = comcat.Budget(params=0.5)
    calls: list[Callable[[], Any]] = [
        lambda: comcat.calibrate(wrapped, [images(model)]),
        lambda: comcat.plan(wrapped, budget, calibration),
        lambda: comcat.check_budget(wrapped, budget),
        lambda: comcat.full_rank_plan(wrapped),
        lambda: comcat.compress(wrapped, halves()),
        lambda: comcat.compress_(wrapped, halves()),
        lambda: comcat.measure_latency(wrapped),
        lambda: comcat.save(wrapped, tmp_path / "m"),
        lambda: comcat.finetune(wrapped, None, []),
        lambda: comcat.search(wrapped, budget, []),
    ]
    for call in calls:
        with pytest.raises(ModelError, match=r"wrapped in DataParallel: use model\.module"):
            call()
    assert all(state[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_ordinary_models_pass(dtype: torch.dtype) -> None:
    check_plain(vit(dtype=dtype))
    check_plain(nn.Sequential(vit(dtype=dtype)))
