"""The demo, with hardly any training: that every step is taken and everything is written."""

import json

import pytest
import torch

import comcat
from comcat_demos import vit, vit_demo
from test_cli import Result


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(vit_demo, "BUDGETS", (0.5, 0.3))
    monkeypatch.setattr(vit_demo, "TUNING_EPOCHS", 1)
    monkeypatch.setitem(vit.MODEL_ARGS, "depth", 2)
    out = tmp_path / "demo"
    threads = torch.get_num_threads()
    result = Result(["demo", "--out", out, "--epochs", 2, "--json"])
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert list(document["models"]) == ["dense", "50%", "30%", "30% tuned"]
    assert document["reloaded_identical"]
    assert document["models"]["dense"]["evaluation"]["images"] == 450
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "digits").rglob("*.png"))) == 1797
    assert sum(p.numel() for p in comcat.load(out).parameters()) == document["models"]["50%"]["params"]
    tuned = comcat.load(out / "finetuned")
    assert sum(p.numel() for p in tuned.parameters()) == document["models"]["30%"]["params"]
    assert torch.get_num_threads() == threads
    # What the demo suggests to try next works, and gives what the demo has shown.
    again = json.loads(Result(["evaluate", out, "--data", out / "digits", "--json"]).out)
    assert again["top1"] == document["models"]["50%"]["evaluation"]["top1"]
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]
    refused = Result(["demo", "--out", out])
    assert refused.code == 1
    assert "already holds something" in refused.err


def test_digits_are_split_by_class(tmp_path):
    vit.write_digits(tmp_path, seed=3)
    for digit in range(10):
        train, test = (len(list((tmp_path / s / str(digit)).iterdir())) for s in ("train", "test"))
        assert 0.2 < test / (train + test) < 0.3
