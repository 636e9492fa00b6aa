"""The page in a real browser: from photos to a picture by mouse alone, with a screenshot of every tab and state.

    python benchmarks/ui_in_browser.py --out shots      # with Chromium at /usr/bin/chromium and pip install playwright

The base is the digits pipeline, which has never seen a zero; the photos are five of them. Nothing is typed: photos go
through the file chooser, everything else is pressed or dragged. The page may ask for nothing outside this machine.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from comcat_demos import digits
from comcat_demos.digits_cache import load_or_train

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
FLAGS += ("--disable-component-update", "--disable-sync")


class Visit:
    """One window on the page; ``asked`` are the hosts that it asked for anything."""

    def __init__(self, browser: Any, address: str, shots: Path, **more: Any) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1360, "height": 1000}, **more)
        self.shots, self.asked, self.complaints = shots, set[str](), list[str]()
        self.page.on("request", lambda r: self.asked.add(r.url.split("/")[2] if "://" in r.url else "page itself"))
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.goto(address)
        self.page.wait_for_selector("#train-start", timeout=120_000)

    def shot(self, name: str, whole: bool = True) -> None:
        time.sleep(1.2)
        self.page.screenshot(path=self.shots / f"{name}.png", full_page=whole)
        print(f"  {name}.png", flush=True)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()
        time.sleep(1)

    def until(self, where: str, what: str, seconds: float = 300) -> None:
        self.page.locator(where).get_by_text(re.compile(what)).first.wait_for(timeout=1000 * seconds)


def customize(visit: Visit, photos: Path) -> None:
    """Photos, one of them none, then a training that is stopped and goes on."""
    page = visit.page
    visit.shot("1-customize-empty")
    page.locator("#train-start").click()
    visit.until("#train-problem", "no photos yet")
    visit.shot("2-customize-no-photos")
    with page.expect_file_chooser() as chosen:
        page.locator("#photos button").first.click()
    chosen.value.set_files(sorted(photos.iterdir()))
    visit.until("#photo-problem", "is no photo")
    visit.shot("3-customize-photos")
    page.locator("#train-start").click()
    visit.until("#train-card", "running", 60)
    visit.until("#train-card", r"train · 1\d\d of", 300)
    visit.shot("4-customize-running")
    page.locator("#train-stop").click()
    visit.until("#train-card", "stopped", 60)
    visit.shot("5-customize-stopped")
    page.locator("#train-resume").click()
    visit.until("#train-card", "running", 60)


def draw(visit: Visit) -> None:
    """The adapter from the library, beside the base."""
    page = visit.page
    visit.tab("Library")
    visit.shot("7-library")
    page.locator("#chosen input").click()
    page.get_by_role("option", name="concept").click()
    page.locator("h1").first.click()
    page.get_by_text("Strength of concept").wait_for()
    page.locator("#draw").click()
    visit.until("#draw-card", "done")
    page.locator("#pictures img").nth(3).wait_for()
    visit.shot("8-library-drawn")
    page.get_by_label("Where concept acts").click()
    page.get_by_role("option", name="left half").click()
    page.locator("#draw").click()
    page.get_by_text("concept 1, left half · seed 0").wait_for(timeout=60_000)
    visit.shot("8-library-left-half")
    page.locator("#save").click()
    page.get_by_text("Each holds its settings").wait_for()
    page.get_by_text("Export as a LoRA, or remove").click()
    page.locator("#one input").click()
    page.get_by_role("option", name="concept").click()
    page.get_by_role("button", name="Export as LoRA").click()
    page.get_by_text("Relative error").wait_for(timeout=200_000)
    visit.shot("9-library-exported")


def tiny_classifier(folder: Path) -> tuple[Path, Path]:
    """A random ViT as transformers saves it, and scans of digits in a folder for every class."""
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes: dict[str, Any] = {"image_size": digits.SIZE, "patch_size": 4, "hidden_size": 48, "intermediate_size": 96}
    labels = {"id2label": dict(enumerate(digits.WORDS)), "label2id": {word: i for i, word in enumerate(digits.WORDS)}}
    config = ViTConfig(**sizes, **labels, num_hidden_layers=4, num_attention_heads=3)
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    size = {"height": digits.SIZE, "width": digits.SIZE}
    ViTImageProcessor(size=size).save_pretrained(folder / "vit")
    for split in ("train", "test"):
        pixels, numbers = digits.real_images(split)
        for i, (image, number) in enumerate(zip(pixels[:300], numbers[:300].tolist(), strict=True)):
            place = folder / "images" / {"train": "train", "test": "val"}[split] / f"{number}-{digits.WORDS[number]}"
            place.mkdir(parents=True, exist_ok=True)
            scan = image.mul(255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(scan).save(place / f"{i:03d}.png")
    return folder / "vit", folder / "images"


def compress(visit: Visit, model: Path, images: Path, out: Path) -> None:
    """A small model and its report; names of folders cannot be chosen with the mouse."""
    page = visit.page
    visit.tab("Compress")
    visit.shot("10-compress-empty")
    page.locator("#compress-start").click()
    visit.until("#compress-problem", "no model yet")
    for field, text in (("model", model), ("images", images), ("out", out)):
        page.locator(f"#compress-{field}").locator("textarea, input").first.fill(str(text))
    page.locator("#compress-start").click()
    visit.until("#compress-card", "done", 400)
    page.locator("#report iframe").wait_for()
    visit.shot("11-compress-done", whole=False)
    page.locator("#report iframe").scroll_into_view_if_needed()
    page.mouse.wheel(0, 2000)
    visit.shot("12-compress-report", whole=False)


def work(arguments: argparse.Namespace, root: Path) -> None:
    photos = root / "photos"
    photos.mkdir()
    for i, photo in enumerate(digits.concept_images(count=5)):
        photo.save(photos / f"zero-{i}.png")
    (photos / "notes.txt").write_text("no image")
    pipeline = arguments.base
    if pipeline is None:
        pipeline = root / "digits"
        load_or_train().save_pretrained(pipeline)
    command = [sys.executable, "-m", "comcat", "ui", str(pipeline), "--folder", str(root / "adapters"), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert server.stdout is not None
        address = re.search(r"http://\S+?(?=;)", server.stdout.readline())[0]  # type: ignore[index]
        with sync_playwright() as player:
            browser = player.chromium.launch(executable_path=arguments.chromium, args=list(FLAGS))
            steps(arguments, browser, address, root, photos)
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        print("exit code of comcat ui after Ctrl-C:", server.wait(60))


def steps(arguments: argparse.Namespace, browser: Any, address: str, root: Path, photos: Path) -> None:
    first = Visit(browser, address, arguments.out)
    customize(first, photos)
    second = Visit(browser, address, arguments.out, color_scheme="dark")  # another window, while the first one trains
    second.until("#now", "Running: Training")
    second.shot("6-second-window-dark")
    first.until("#train-card", "done", 600)
    first.shot("6-customize-done")
    draw(first)
    second.tab("Library")
    second.shot("8-library-dark")
    compress(first, *tiny_classifier(root), root / "small")
    for visit in (first, second):
        assert visit.asked <= {address.removeprefix("http://"), "page itself"}, visit.asked
        print("errors in the browser's console:", visit.complaints or "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("shots"), help="folder of the screenshots")
    parser.add_argument("--base", type=Path, help="a pipeline's directory instead of the digits")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="comcat-ui-browser-") as folder:
        work(arguments, Path(folder))


if __name__ == "__main__":
    main()
