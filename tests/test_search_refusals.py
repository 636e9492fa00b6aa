"""What a search refuses: images to evaluate on first of all."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import comcat
from comcat import DataError, MetricError, SearchConfig, TrainingError
from comcat.data import load_dataset
from comcat.data.training_set import training_loader
from conftest import images, vit
from test_data import make_folder
from test_search import HALF, host, loader, settings, statistics  # noqa: F401 - fixtures

# The fixtures are used by name.
# ruff: noqa: F811


class Split(TensorDataset):
    """Like the data sets of torchvision and Hugging Face, it may say what part of the data it is."""

    def __init__(self, model: nn.Module, **said: Any) -> None:
        super().__init__(images(model, 8), torch.arange(8) % 11)
        vars(self).update(said)


class Wrapper(Dataset):
    def __init__(self, data: Any, name: str) -> None:
        setattr(self, name, data)
        self.inner = data

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


class NamedSplit(str):
    """As Hugging Face names splits: ``test[:50%]``."""


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"split": "test"}, "the split 'test', which is for evaluation.*Give the training split"),
        ({"split": "val"}, "the split 'val'"),
        ({"split": NamedSplit("validation[:50%]")}, "the split 'validation"),
        ({"split": "train+test"}, "the split 'train.test'"),
        ({"train": False}, r"Split\(train=False\), which is for evaluation; give train=True"),
    ],
)
def test_evaluation_data_are_refused(host: nn.Module, said: dict[str, Any], message: str) -> None:
    """However deep they are wrapped."""
    data = Split(host, **said)
    wrapped = [data, Subset(data, range(4)), Wrapper(data, "images"), Subset(Wrapper(data, "data"), [0, 1])]
    for each in [*wrapped, ConcatDataset([Split(host, split="train"), data])]:
        with pytest.raises(DataError, match=message):
            comcat.search(host, HALF, DataLoader(each, batch_size=2), settings())


@pytest.mark.parametrize("split", ["test", "validation"])
def test_our_own_evaluation_data_are_refused(host: nn.Module, tmp_path: Path, split: str) -> None:
    for name in ("train", split):
        make_folder(tmp_path / name, per_class=2, size=21)
    config = {"input_size": (3, 14, 21)}
    given = training_loader(load_dataset(str(tmp_path), split, config, num_classes=3), 2, config, workers=0)
    with pytest.raises(DataError, match=f"the split '{split}', which is for evaluation"):
        comcat.search(host, HALF, given, settings())


def test_training_data_pass(host: nn.Module) -> None:
    refuse = import_module("comcat.rank_search.halves").refuse_evaluation_data
    for data in (Split(host, split="train"), Split(host, train=True), Split(host), Subset(Split(host), [0])):
        refuse(DataLoader(data))
        refuse(DataLoader(data), DataLoader(Split(host, split="test")))
        with pytest.raises(DataError, match="read the same data set; search on the training split"):
            refuse(DataLoader(Subset(data, [0])), DataLoader(Subset(data, [1])))


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield from ()


def test_unfit_loaders_are_refused(host: nn.Module, statistics: comcat.Calibration) -> None:
    def run(data: Any) -> None:
        comcat.search(host, HALF, data, settings(), calibration=statistics)

    x = images(host, 12)
    with pytest.raises(TrainingError, match="random access"):
        run(DataLoader(Endless()))
    with pytest.raises(TrainingError, match="needs a torch DataLoader"):
        run([(x, torch.zeros(12).long())])
    with pytest.raises(DataError, match=r"batches of \(images, labels\)"):
        run(DataLoader(TensorDataset(x), batch_size=4))
    with pytest.raises(DataError, match="no label"):
        run(DataLoader(TensorDataset(x, -torch.ones(12).long()), batch_size=4))
    with pytest.raises(DataError, match="label 11 is none of the model's"):
        run(DataLoader(TensorDataset(x, torch.full((12,), 11)), batch_size=4))
    with pytest.raises(comcat.ModelError, match="the model does not answer as it should: outputs are said to be maps"):
        comcat.search(host, HALF, loader(host), settings(outputs="maps"))
    with pytest.raises(TrainingError, match=r"the model's weights are torch.bfloat16.*model.float\(\)"):
        comcat.search(vit().bfloat16(), HALF, loader(host), settings())
    with pytest.raises(TrainingError, match="nothing to resume without out"):
        comcat.search(host, HALF, loader(host), settings(), resume=True)


def test_a_loss_that_is_not_finite(host: nn.Module, statistics: comcat.Calibration, tmp_path: Path) -> None:
    x = images(host, 12)
    x[9] = float("nan")
    data = DataLoader(TensorDataset(x, torch.arange(12) % 11), batch_size=2)
    config = settings(max_steps=50, log_every=40, checkpoint_every=3)
    with pytest.raises(TrainingError, match=r"NaN or infinite since batch 5 .*; the checkpoint of batch 3 is kept"):
        comcat.search(host, HALF, data, config, calibration=statistics, out=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    with pytest.raises(TrainingError, match=r"since batch \d of the search; nothing is kept. Try a lower weight_lr"):
        comcat.search(host, HALF, loader(host), settings(weight_lr=1e30), calibration=statistics)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objectve": "exact"}, "no setting 'objectve'; did you mean objective"),
        ({"objective": "both"}, "objective is 'both'; choose one of two-sided, one-sided, exact"),
        ({"temperature": [5]}, "temperature has 1 values; give the first and the last"),
        ({"temperature": [5, 0]}, "temperature is 0, but must be at least 0.001"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"max_steps": 1}, "max_steps is 1, but must be at least 2"),
        ({"candidates": 1}, "candidates is 1, but must be at least 2"),
        ({"lr": "fast"}, "lr is 'fast', but must be a number"),
    ],
)
def test_wrong_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        SearchConfig.from_dict(values)
    assert SearchConfig.from_dict(SearchConfig(beta=2).to_dict()) == SearchConfig(beta=2)


def test_sharded_weights_are_refused(host: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.is_fsdp2", property(lambda self: True))
    with pytest.raises(comcat.TrainingError, match="run it without FSDP"):
        comcat.search(host, comcat.Budget(params=0.5), loader(host), settings())


def test_metrics_that_do_not_work(host: nn.Module, statistics: comcat.Calibration, tmp_path: Path) -> None:
    """Known before the first step."""
    given: Any = {"calibration": statistics, "out": tmp_path}
    with pytest.raises(TrainingError, match="a metric needs images to be computed on; give eval_loader"):
        comcat.search(host, HALF, loader(host), settings(), evaluate=lambda model, batches: 1.0, **given)
    same = loader(host)
    with pytest.raises(DataError, match="the search and the evaluation read the same data set"):
        comcat.search(host, HALF, same, settings(), eval_loader=same, **given)
    batches = [(images(host, 3), torch.arange(3))]
    for metric, message in (
        (lambda model, loader: 1 / 0, "raised ZeroDivisionError"),
        (lambda model, loader: None, "which is no number"),
    ):
        with pytest.raises(MetricError, match=message):
            comcat.search(host, HALF, loader(host), settings(), eval_loader=batches, evaluate=metric, **given)
    assert not (tmp_path / "checkpoints").exists()
