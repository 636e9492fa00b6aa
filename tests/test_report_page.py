"""The HTML report: what it says, that nothing in it runs or reaches out, and how it is refused."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import comcat
from comcat import LayerReport, Report
from comcat.models.opening import load_model
from comcat.report.figures import draw_kept, kept_by_part
from comcat.report.method_words import budget_words
from comcat.report.page import PAGE_NAME
from comcat.runtimes.bench import Bench, BenchRow
from conftest import VIT, images, randomize, swin, vit
from test_cli import ARGS, NAME, Result, model_options
from test_cli_errors import refused
from test_data import make_folder

#: A legal name of a folder, and so of a class, that is an attack on whoever opens a page that does not escape it.
EVIL = "<img src=x onerror=alert(1)>"
VOID = ("meta", "img")


class Page(HTMLParser):
    """Tags, attributes and visible text; raises where elements are not closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_harmless(text: str) -> Page:
    """Nothing that runs, and nothing from elsewhere."""
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "srcset", "action", "data"):
            assert re.match("#|data:image/(png|jpeg);base64,", value), value
    assert "@import" not in text
    assert "url(" not in text
    assert "Content-Security-Policy" in text
    return page


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images in splits, dense weights, and a small model as the command writes it; tests must not change them."""
    root = tmp_path_factory.mktemp("report")
    make_folder(root / "data" / "train", per_class=14)
    make_folder(root / "data" / "val", per_class=6)
    (root / "data" / "val" / "class2").rename(root / "data" / "val" / EVIL)
    (root / "data" / "train" / "class2").rename(root / "data" / "train" / EVIL)
    model = randomize(load_model(NAME, model_args=ARGS, pretrained=False), seed=4)
    save_file(model.state_dict(), root / "dense.safetensors")
    options = ["--data", root / "data", "--keep", 0.25, "--calibration", root / "stats", "--mean", 0.4, 0.5, 0.6]
    result = Result(["compress", NAME, *model_options(root), *options, "--out", root / "small", "--seed", 5])
    assert result.code == 0, result.err
    return root


def report(folder: Path, *options: object) -> Result:
    return Result(["report", folder, *options])


def test_what_the_directory_knows(place, tmp_path):
    out = tmp_path / "deep" / "page.html"
    result = report(place / "small", "--out", out, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out) == {
        "model": str(place / "small"),
        "out": str(out),
        "bytes": out.stat().st_size,
    }
    page = check_harmless(out.read_text())
    made = json.loads((place / "small" / "report.json").read_text())
    layers = made["report"]["layers"]
    for layer in layers:
        assert layer["name"] in page.text
        for part, kept in layer["ranks"].items():
            assert f"{kept}/{layer['full'][part]}" in page.text
    assert f"{made['compressed']['evaluation']['top1']:.2f} %" in page.text
    assert "25 % of the parameters of the model" in page.text
    assert f"spectrum: {'by the spectra'}" in page.text
    assert "42 images, errors weighed by output gradients" in page.text
    assert "comcat compress " + NAME in page.text
    assert "--seed 5" in page.text
    assert f"torch {torch.__version__.partition('+')[0]}" in page.text
    assert "comcat.load('small')" in page.text
    assert "Changed answers" not in page.text


def test_with_the_dense_model_and_images(place, tmp_path):
    out = tmp_path / "page.html"
    options = ["--dense-checkpoint", place / "dense.safetensors", "--calibration", place / "stats"]
    result = report(place / "small", "--out", out, *options, "--data", place / "data", "--batch-size", 5)
    assert result.code == 0, result.err
    text = out.read_text()
    page = check_harmless(text)
    assert "Energies of the activations on 42 images" in page.text
    # The same scores as when the model was made: the normalization is that of the saved model.
    made = json.loads((place / "small" / "report.json").read_text())
    for column in ("dense", "compressed"):
        assert f"{made[column]['evaluation']['top1']:.2f} %" in page.text
    agreement = Result(
        ["evaluate", place / "small", "--data", place / "data", "--json", "--reference", write_dense(place, tmp_path)]
    )
    same = json.loads(agreement.out)["agreement"]["same"]
    changed = round(18 * (1 - same / 100))
    assert changed > 0
    assert f"{changed} of 18 images" in page.text
    assert text.count("data:image/png;base64,") == min(changed, 36)
    assert EVIL in page.text  # as words, not as a tag


def test_answers_of_another_kind(place, tmp_path):
    out, dense = tmp_path / "page.html", ["--dense", write_dense(place, tmp_path), "--data", place / "data"]
    result = report(place / "small", "--out", out, *dense, "--outputs", "labels", "--no-labels")
    assert result.code == 0, result.err
    assert "The images on which the outputs (labels) differ most" in check_harmless(out.read_text()).text
    options = ["--out", tmp_path / "other.html", *dense]
    refused(report(place / "small", *options, "--outputs", "labels"), "outputs that are labels need 0 or 1")
    refused(report(place / "small", *options, "--outputs", "smells"), "unknown kind of outputs 'smells'")


def write_dense(place: Path, folder: Path) -> Path:
    """The dense model as comcat saves it, with the normalization of the small one."""
    model = load_model(NAME, checkpoint=place / "dense.safetensors", model_args=ARGS)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.4, 0.5, 0.6)}
    comcat.save(model, folder / "dense")
    return folder / "dense"


def test_the_dense_model_by_its_name_and_spectra_of_weights(place, tmp_path):
    out = tmp_path / "page.html"
    result = report(place / "small", "--out", out, "--dense", write_dense(place, tmp_path))
    assert result.code == 0, result.err
    page = check_harmless(out.read_text())
    assert "Energies of the weights alone" in page.text
    assert page.tags.count("svg") > len(json.loads((place / "small" / "plan.json").read_text())["layers"])


def test_names_are_words(tmp_path):
    model = vit(dtype=torch.float32)
    small = comcat.compress(model, comcat.Plan({"blocks.0.attn": {"qk": 1, "vo": 1}, "blocks.1.mlp": {"neurons": 2}}))
    comcat.save(small, tmp_path / "m")
    names = ["<script>alert(1)</script>", '"><svg/onload=alert(2)>', "a & b", "\x1b]0;title\x07", *"efghijk"]
    batches = [(images(model, 64), torch.arange(64) % 11)]
    place = "</style><script>alert(3)</script>"
    out = comcat.write_report(tmp_path / "m", dense=model, loader=batches, names=names, place=place)
    assert out == tmp_path / "m" / PAGE_NAME
    page = check_harmless(out.read_text())
    assert "<script>alert(3)</script>" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert "\x1b" not in out.read_text()
    # A directory with its page is still one that comcat made, and no other writer of models minds it.
    comcat.save(small, tmp_path / "m", overwrite=True)
    assert not out.exists()


def test_outputs_that_are_no_classes(tmp_path):
    model = swin(dtype=torch.float32, num_classes=0)
    comcat.save(comcat.compress(model, comcat.Plan({"layers.0.blocks.0.attn": {"vo": 2}})), tmp_path / "m")
    out = comcat.write_report(tmp_path / "m", dense=model, loader=[images(model, 9)], labelled=False)
    page = check_harmless(out.read_text())
    assert "The images on which the outputs (features) differ most" in page.text
    assert page.tags.count("img") == 9


def test_left_dense_and_notes(tmp_path):
    model = vit(dtype=torch.float32, qk_norm=True)
    plan = comcat.Plan({"blocks.0.attn": {"vo": 2}}, estimate={"params": 3})
    with pytest.warns(UserWarning, match="the plan expected 3 params"):
        small = comcat.compress(model, plan)
    comcat.save(small, tmp_path / "m", model_args={**VIT, "qk_norm": True})
    page = check_harmless(comcat.write_report(tmp_path / "m").read_text())
    assert small.comcat.report.dense
    for entry in small.comcat.report.dense:
        assert " ".join(entry.reason.split()) in page.text
        assert entry.name in page.text
    assert "the plan expected 3 params" in page.text
    assert "Accuracy was not measured" in page.text
    assert "manual: written by hand" in page.text


def test_every_part_is_in_the_picture(tmp_path):
    ranks = {"qk": 2, "vo": 3, "channels": 2, "pairs": 1}
    layers = [
        LayerReport(f"b.{i}.attn", "attention", {part: n}, {part: 7}, 90, 40, 90, 40, 0.1)
        for i, (part, n) in enumerate(ranks.items())
    ]
    report = Report(layers, [], 360, 160, 360, 160, (3, 8, 8))
    assert set(kept_by_part(report)[1]) == set(ranks)
    draw_kept(report, tmp_path / "x.png", "all parts")


def test_after_fine_tuning(place, tmp_path):
    out = tmp_path / "tuned"
    options = ["--teacher-checkpoint", place / "dense.safetensors", "--data", place / "data", "--out", out]
    quick = ["--batch-size", 8, "--max-steps", 2, "--workers", 0, "--lr", 1e-3]
    result = Result(["finetune", place / "small", *options, *quick])
    assert result.code == 0, result.err
    assert report(out).code == 0
    page = check_harmless((out / PAGE_NAME).read_text())
    tuned = json.loads((out / "finetune.json").read_text())
    assert "comcat finetune" in page.text
    assert "2 steps" in page.text
    assert f"{tuned['after']['top1']:.2f} %" in page.text
    assert "top-1 over the epochs" in page.text


def test_times_in_runtimes(place, tmp_path):
    """The file is the one that comcat bench writes; what it says is words."""
    rows = [
        BenchRow(
            "dense <b>", "onnxruntime", "fp32", 8, 10.0, 9.5, 11.0, 800.0, 1.0, accuracy=61.25, metric="top-1", unit="%"
        ),
        BenchRow("small", "onnxruntime", "fp32", 8, 6.25, 6.0, 6.5, 1280.0, 1.6, mac_ratio=2.0),
        BenchRow("small int8", "openvino", "int8", 1, 2.0, 1.9, 2.2, 500.0, 3.1),
    ]
    machine = {"device": "a processor", "threads": 2, "torch_threads": 2, "runtimes": {"onnxruntime": "1.2"}}
    Bench(rows, {**machine, "versions": {}}, ["small in torch-compile: no compiler"], 40).save(tmp_path / "bench.json")
    out = tmp_path / "page.html"
    result = report(place / "small", "--bench", tmp_path / "bench.json", "--out", out)
    assert result.code == 0, result.err
    text = check_harmless(out.read_text()).text
    assert "Single images openvino, int8 small int8 3.10 ×" in text
    assert "Batches of 8 onnxruntime, fp32 dense <b> 1.00 ×" in text
    assert "6.25 ms (6.00 to 6.50)" in text
    assert "top-1 61.25 %" in text
    assert "Scores are of 40 images" in text
    assert "Left out: small in torch-compile: no compiler" in text
    assert "a processor, 2 threads; onnxruntime 1.2." in text
    options = ["--out", tmp_path / "other.html", "--bench"]
    refused(report(place / "small", *options, tmp_path / "none"), "there is no file .*none. Correct --bench")
    refused(
        report(place / "small", *options, place / "small" / "report.json"),
        "report.json' holds no times: write them with comcat bench DIR --out FILE",
    )
    (tmp_path / "cut.json").write_text((tmp_path / "bench.json").read_text()[:200])
    refused(report(place / "small", *options, tmp_path / "cut.json"), "cut.json': it is not valid JSON")


def test_times_of_another_model_are_refused(place, tmp_path):
    made = json.loads((place / "small" / "report.json").read_text())["report"]
    machine = {"device": "a processor", "threads": None, "runtimes": {}, "versions": {}}

    def of(*params: int | None) -> Path:
        rows = [BenchRow(f"m{n}", "torch", "fp32", 1, 2.0, 2.0, 2.0, 500.0, params=n) for n in params]
        Bench(rows, machine).save(tmp_path / "bench.json")
        return tmp_path / "bench.json"

    out = tmp_path / "page.html"
    for params in ((made["params_before"], made["params_after"], None), (None,)):  # exported files say nothing
        assert report(place / "small", "--out", out, "--overwrite", "--bench", of(*params)).code == 0
    out.unlink()
    message = (
        r"bench.json' holds the times of other models \('m7' with 7 parameters\), and this one has .* comcat bench"
    )
    refused(report(place / "small", "--out", out, "--bench", of(7, None)), message)
    assert not out.exists()


def test_stock_models(tmp_path):
    model = vit(dtype=torch.float32)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    more = [x for k, v in VIT.items() for x in ("--model-arg", f"{k}={v}")]
    out = tmp_path / "stock"
    options = ["--checkpoint", tmp_path / "dense.safetensors", *more, "--data-free", "--keep", 0.9, "--stock"]
    result = Result(["compress", NAME, *options, "--out", out])
    assert result.code == 0, result.err
    assert report(out).code == 0
    page = check_harmless((out / PAGE_NAME).read_text())
    assert "timm.create_model('local-dir:stock', pretrained=True)" in page.text
    refused(
        report(out, "--overwrite", "--dense-checkpoint", tmp_path / "dense.safetensors"),
        "does not say what it was made from: name the dense model with --dense MODEL",
    )


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"params": 0.5, "of": "model"}, "50 % of the parameters of the model"),
        ({"params": None, "macs": 0.25, "of": "parts"}, "25 % of the MACs of the compressed parts"),
        ({"params": 11_000_000}, "at most 11.00 M parameters"),
        ({"latency": 0.6, "of": "model"}, "60 % of the time of the model"),
        ({"latency": 12_500_000}, "at most 12.5 ms for a batch"),
        ({"something": 3}, "something 3"),
    ],
)
def test_budgets_in_words(budget, words):
    assert budget_words(budget) == words


def test_refused(place, tmp_path):
    dense = write_dense(place, tmp_path)
    refused(report(dense), "holds a dense model, of which there is nothing to report")
    refused(report(place / "data"), "is not a model saved by comcat: it has no comcat.json")
    refused(report(tmp_path / "nowhere"), "is not a model saved by comcat")
    small = shutil.copytree(place / "small", tmp_path / "small")
    (small / PAGE_NAME).write_text("mine")
    refused(report(small), "report.html' exists already. Choose another name or overwrite it")
    assert (small / PAGE_NAME).read_text() == "mine"
    assert report(small, "--overwrite").code == 0
    for option, value in (("--data", place / "data"), ("--calibration", place / "stats"), ("--dense-arg", "a=1")):
        refused(report(small, "--overwrite", option, value), f"{option}.*goes with the dense model", code=2)
    refused(report(small, "--overwrite", "--dense-checkpoint", tmp_path / "none"), "there is no file .*none")
    other = comcat.compress(vit(dtype=torch.float32), comcat.Plan({"blocks.0.attn": {"vo": 2}}))
    comcat.save(other, tmp_path / "other")
    refused(report(small, "--overwrite", "--dense", tmp_path / "other"), "the dense model has .* parameters, and the")
    refused(
        report(small, "--out", tmp_path / "x.html", "--dense", dense, "--calibration", place / "dense.safetensors"),
        "calibration",
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dense", {"params": "many"}, "report.json' is damaged: dense.params is 'many'"),
        ("model", 3, "report.json' is damaged: model is 3"),
        ("versions", [], "report.json' is damaged: versions"),
        ("dense", {"params": 3, "macs": 3, "bytes": 3, "evaluation": {"images": 2, "outputs": "smell"}}, "'smell'"),
    ],
)
def test_damaged(place, tmp_path, field, value, message):
    small = shutil.copytree(place / "small", tmp_path / "small")
    document = json.loads((small / "report.json").read_text())
    (small / "report.json").write_text(json.dumps({**document, field: value}))
    refused(report(small), message)
    assert not (small / PAGE_NAME).exists()


def test_places_that_take_nothing(place, tmp_path):
    refused(report(place / "small", "--out", tmp_path, "--overwrite"), "cannot write .*: it is a directory")
    if os.geteuid():  # who may write everywhere is refused by the system alone
        tmp_path.chmod(0o500)
        refused(report(place / "small", "--out", tmp_path / "x.html"), "may not be written to; choose another place")
        tmp_path.chmod(0o700)
    (tmp_path / "file").write_text("a file where a directory should be")
    refused(report(place / "small", "--out", tmp_path / "file" / "x.html"), "cannot write .*x.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_images_need_the_dense_model(place, tmp_path):
    with pytest.raises(comcat.DataError, match="give the dense model too"):
        comcat.write_report(place / "small", tmp_path / "x.html", loader=[torch.zeros(1, 3, 8, 8)])
    stats = comcat.Calibration.load(place / "stats")
    with pytest.raises(comcat.CalibrationError, match="give the dense model too"):
        comcat.write_report(place / "small", tmp_path / "x.html", calibration=stats)
    assert not list(tmp_path.iterdir())
