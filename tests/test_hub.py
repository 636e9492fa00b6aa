"""Pushing to the Hub and loading from it, against a stand-in on this machine."""

import json
import re
import shutil
import traceback
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import comcat
from comcat.models.opening import load_model
from comcat.sharing.model_card import MARK, public
from conftest import VIT, randomize, vit
from hub_stand_in import TOKENS, StandIn, running
from test_cli import ARGS, NAME, Result, model_options
from test_cli_errors import refused
from test_data import make_folder

ALICE, BOB = TOKENS
REPOSITORY = "alice/small"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small model as the command writes it, with its accuracy; tests must not change it."""
    root = tmp_path_factory.mktemp("hub")
    make_folder(root / "data" / "train", per_class=14)
    make_folder(root / "data" / "val", per_class=4)
    model = randomize(load_model(NAME, model_args=ARGS, pretrained=False))
    save_file(model.state_dict(), root / "dense.safetensors")
    options = [*model_options(root), "--data", root / "data", "--keep", 0.5, "--method", "spectrum"]
    result = Result(["compress", NAME, *options, "--out", root / "small"])
    assert result.code == 0, result.err
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running() as stand_in:
        constants = import_module("huggingface_hub.constants")
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.address)
        template = stand_in.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", ALICE)
        yield stand_in


def push(folder: Path, *options: object, name: str = REPOSITORY) -> Result:
    return Result(["push", folder, name, *options])


def test_there_and_back(place, hub: StandIn):
    result = push(place / "small", "--json", "--message", "the first")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["url"] == f"{hub.address}/{REPOSITORY}"
    assert hub.repositories[REPOSITORY]["titles"][document["commit"]] == "the first"
    files = hub.files(REPOSITORY)
    assert set(files) - {".gitattributes"} == set(document["files"])
    assert set(document["files"]) == {"comcat.json", "model.safetensors", "plan.json", "report.png", "README.md"}
    for name in ("comcat.json", "model.safetensors"):
        assert files[name] == (place / "small" / name).read_bytes()
    here = comcat.load(place / "small").state_dict()
    for model in (comcat.load(f"hf-hub:{REPOSITORY}"), load_model(REPOSITORY), load_model(f"hf-hub:{REPOSITORY}")):
        there = model.state_dict()
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)
    data = ["--data", place / "data", "--json"]
    found = [json.loads(Result(["evaluate", model, *data]).out) for model in (REPOSITORY, place / "small")]
    assert found[0]["top1"] == found[1]["top1"]


def test_nothing_of_this_machine_is_given_away(place, hub: StandIn):
    assert push(place / "small").code == 0
    for name, content in hub.files(REPOSITORY).items():
        assert str(place).encode() not in content, name
    assert public(f"comcat compress {place}/x --data={place}/data --keep 0.5 org/name hfds/a/b ./here") == (
        "comcat compress x --data=data --keep 0.5 org/name hfds/a/b here"
    )
    assert public("comcat 'never closed") == ""


def test_revisions(place, hub: StandIn, tmp_path):
    other = comcat.compress(vit(dtype=torch.float32), comcat.Plan({"blocks.0.attn": {"vo": 2}}))
    comcat.save(other, tmp_path / "other")
    assert push(place / "small").code == 0
    first = hub.repositories[REPOSITORY]["branches"]["main"]
    result = push(tmp_path / "other", "--revision", "v2")
    assert result.code == 0, result.err
    assert f"comcat.load('hf-hub:{REPOSITORY}@v2')" in result.out
    assert "report.json" not in hub.files(REPOSITORY, "v2")
    assert "plan.json" not in hub.files(REPOSITORY, "v2")  # of the model before: this one has none
    assert hub.repositories[REPOSITORY]["branches"]["main"] == first
    for model in (
        comcat.load(f"hf-hub:{REPOSITORY}", revision="v2"),
        comcat.load(f"hf-hub:{REPOSITORY}@v2"),
        load_model(f"{REPOSITORY}@v2"),
    ):
        assert model.num_classes == VIT["num_classes"]
    assert comcat.load(f"hf-hub:{REPOSITORY}", revision=first).num_classes == ARGS["num_classes"]
    with pytest.raises(comcat.CheckpointError, match="it has no revision 'v3'; name a branch, a tag or a commit"):
        comcat.load(f"hf-hub:{REPOSITORY}", revision="v3")
    for name in (f"hf-hub:{REPOSITORY}@v3", f"{REPOSITORY}@v3"):
        refused(
            Result(["evaluate", name, "--data", place / "data"]), "it has no revision 'v3'; name a branch, a tag or a"
        )
    with pytest.raises(comcat.CheckpointError, match="is a directory, which has no revisions"):
        comcat.load(place / "small", revision="v2")


def test_the_card(place, hub: StandIn):
    assert push(place / "small", "--license", "apache-2.0", "--base-model", "org/vit").code == 0
    text = hub.files(REPOSITORY)["README.md"].decode()
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(head)
    assert data["base_model"] == "org/vit"
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "comcat"
    assert data["pipeline_tag"] == "image-classification"
    assert {"comcat", "compression", "timm"} <= set(data["tags"])
    made = json.loads((place / "small" / "report.json").read_text())
    result = data["model-index"][0]["results"][0]
    assert (result["dataset"]["name"], result["dataset"]["split"]) == ("data", "val")
    assert result["metrics"][0] == {
        "type": "accuracy",
        "value": round(made["compressed"]["evaluation"]["top1"], 2),
        "name": "top-1",
    }
    assert MARK in body
    assert f'model = comcat.load("hf-hub:{REPOSITORY}")' in body
    assert "![what every layer kept](report.png)" in body
    assert "--checkpoint dense.safetensors" in body
    for layer in made["report"]["layers"]:
        assert f"`{layer['name']}`" in body
    for column in ("dense", "compressed"):
        assert f"{made[column]['evaluation']['top1']:.2f} %" in body
    assert "12 images" in body


def test_a_base_that_is_not_known_is_not_claimed(place, tmp_path):
    """The weights came from a file, so that neither the licence nor the repository of timm's are theirs."""
    result = push(place / "small", "--dry-run", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    data = yaml.safe_load(document["card"].split("---\n")[1])
    assert not {"base_model", "license"} & set(data)
    assert "whose licence is not recorded here" in document["card"]
    pretrained = shutil.copytree(place / "small", tmp_path / "small")
    made = json.loads((pretrained / "report.json").read_text())
    made["command"] = "comcat compress vit_tiny_patch16_224 --data data --keep 0.5"
    (pretrained / "report.json").write_text(json.dumps(made))
    document = json.loads(push(pretrained, "--dry-run", "--json").out)
    data = yaml.safe_load(document["card"].split("---\n")[1])
    assert data["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert data["license"] == "apache-2.0"


def test_what_files_say_is_no_markup(place, tmp_path):
    evil = shutil.copytree(place / "small", tmp_path / "small")
    made = json.loads((evil / "report.json").read_text())
    made["evaluated_on"] = "x](http://evil) <script>alert(1)</script> |`, split val"
    made["model"] = "a`<script>\n# Title"
    (evil / "report.json").write_text(json.dumps(made))
    card = json.loads(push(evil, "--dry-run", "--json").out)["card"]
    body = card.split("\n---\n", 1)[1]
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", body)
    assert not re.search(r"(?<!\\)\]\(http", body.partition("## Limits")[0])
    assert "\n# Title" not in body


def test_cards_of_others_stay(place, hub: StandIn, tmp_path):
    assert push(place / "small").code == 0
    hub.commit(REPOSITORY, "main", "by hand", {"README.md": b"# Mine"})
    result = push(place / "small")
    assert result.code == 0
    assert "README.md is not of comcat and is left as it is" in result.err
    assert hub.files(REPOSITORY)["README.md"] == b"# Mine"
    own = shutil.copytree(place / "small", tmp_path / "own")
    (own / "README.md").write_text("# The one in the directory")
    assert push(own).code == 0
    assert hub.files(REPOSITORY)["README.md"] == b"# The one in the directory"


def test_private_repositories(place, hub: StandIn, monkeypatch, tmp_path):
    assert push(place / "small", "--private").code == 0
    assert hub.repositories[REPOSITORY]["private"]
    monkeypatch.setenv("HF_TOKEN", BOB)
    options = ["--data", place / "data"]
    message = f"cannot load '{REPOSITORY}' from the Hub: there is no such repository, or it is private"
    for model in (REPOSITORY, f"hf-hub:{REPOSITORY}"):
        refused(Result(["evaluate", model, *options]), message)
    refused(push(place / "small"), r"cannot push to .*: no permission \(403\): log in with a token that may")
    monkeypatch.delenv("HF_TOKEN")
    refused(push(place / "small", name="alice/other"), r"no permission \(401\): log in")
    assert set(hub.repositories) == {REPOSITORY}


def test_from_the_cache(place, hub: StandIn, monkeypatch):
    assert push(place / "small").code == 0
    comcat.load(f"hf-hub:{REPOSITORY}")
    asked = len(hub.asked)
    monkeypatch.setattr(import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    assert comcat.load(f"hf-hub:{REPOSITORY}").num_classes == 3
    message = "cannot load 'alice/never' from the Hub: HF_HUB_OFFLINE is set and the cache does not hold it"
    with pytest.raises(comcat.CheckpointError, match=message):
        comcat.load("hf-hub:alice/never")
    refused(Result(["evaluate", "hf-hub:alice/never", "--data", place / "data"]), message)
    refused(push(place / "small"), "HF_HUB_OFFLINE is set: nothing can be pushed; unset it")
    assert len(hub.asked) == asked


def test_no_network(place, hub: StandIn, monkeypatch):
    monkeypatch.setattr(import_module("huggingface_hub.constants"), "ENDPOINT", "http://127.0.0.1:9")
    refused(push(place / "small"), f"^error: cannot push to '{REPOSITORY}': .*check the network")
    with pytest.raises(comcat.CheckpointError, match=r"the Hub does not answer .*check the network"):
        comcat.load(f"hf-hub:{REPOSITORY}")


@pytest.mark.parametrize("stored", [False, True])
def test_tokens_are_never_shown(place, hub: StandIn, monkeypatch, tmp_path, stored):
    """A server that quotes what it was sent."""
    hub.broken = True
    if stored:
        monkeypatch.delenv("HF_TOKEN")
        (tmp_path / "token").write_text(ALICE)
    result = push(place / "small")
    assert result.code == 1
    assert ALICE not in result.err + result.out
    assert "who sends" in result.err  # it was sent, and is not shown
    with pytest.raises(comcat.ComcatError) as caught:
        comcat.push(place / "small", REPOSITORY)
    assert ALICE not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("small", "'small' cannot be a repository: it is written ORG/NAME"),
        ("a/b/c", "'a/b/c' cannot be a repository: .*written ORG/NAME"),
        ("alice/bad name", "'alice/bad name' cannot be a repository"),
    ],
)
def test_names_that_cannot_be(place, name, message):
    refused(push(place / "small", name=name), message)


def test_directories_that_are_no_models(place, hub: StandIn, tmp_path):
    refused(push(place / "data"), "is not a model saved by comcat: it has no comcat.json")
    comcat.save(vit(dtype=torch.float32), tmp_path / "dense")
    refused(push(tmp_path / "dense"), "holds a dense model")
    cut = shutil.copytree(place / "small", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-8])
    refused(push(cut), "model.safetensors' has .* bytes instead of")
    assert hub.asked == []
    hub.create("alice/empty")
    with pytest.raises(comcat.CheckpointError, match="'alice/empty' is no model saved by comcat: it has no comcat"):
        comcat.load("hf-hub:alice/empty")
    with pytest.raises(comcat.CheckpointError, match="there is no such repository, or it is private"):
        comcat.load("hf-hub:alice/nothing")
    assert push(place / "small").code == 0
    with pytest.raises(comcat.ModelError, match="is a saved model: it takes neither a checkpoint nor model arguments"):
        load_model(REPOSITORY, model_args={"img_size": 9})


def test_stock_models(tmp_path, hub: StandIn):
    save_file(vit(dtype=torch.float32).state_dict(), tmp_path / "dense.safetensors")
    more = [x for k, v in VIT.items() for x in ("--model-arg", f"{k}={v}")]
    options = ["--checkpoint", tmp_path / "dense.safetensors", *more, "--data-free", "--keep", 0.9, "--stock"]
    assert Result(["compress", NAME, *options, "--out", tmp_path / "stock"]).code == 0
    result = push(tmp_path / "stock")
    assert result.code == 0, result.err
    files = hub.files(REPOSITORY)
    assert {"config.json", "model.safetensors", "plan.json", "README.md"} <= set(files)
    data = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert data["library_name"] == "timm"
    assert f'timm.create_model("hf-hub:{REPOSITORY}", pretrained=True)' in files["README.md"].decode()
