"""The demo's comparison: the same photos, steps and seeds for comcat, LoRA (PEFT) and full fine-tuning (DreamBooth).

All of them learn a token too, by the same rule; what differs is what else may change.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from comcat.customize.adapter.attached import Adapter, adapters, add_adapter, attach, new_adapter, remove_adapter
from comcat.customize.adapter.tokens import new_token
from comcat.customize.files.adapter_file import write_adapter
from comcat.customize.files.encoding import encode
from comcat.customize.pictures import save_png
from comcat.customize.teaching.customize_config import CustomizeConfig
from comcat.customize.teaching.examples import Photos
from comcat.customize.teaching.families import family_of
from comcat.customize.teaching.guards import frozen_pipeline
from comcat.customize.teaching.material import shapes_for
from comcat.customize.teaching.objective import Objective
from comcat.customize.teaching.photos import METADATA, find_photos
from comcat.customize.teaching.trainer import AdapterTrainer
from comcat.progress import Progress
from comcat.storage.atomic import tensor_bytes
from comcat.training.process import accelerated

from . import digits
from .contest_methods import PEFT, Method, put_on
from .digits_score import Classifier, generate, score

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "a photo of V*"
TOKEN = "V*"
_NAME = "concept"  # of the adapter; products or the token alone

#: LoRA and comcat run at half the rate that was best, and close to failing, in a sweep.
METHODS = (
    Method("base", "base"),
    Method("comcat, rank 1", "comcat", 1, 1e-2),
    Method("comcat, rank 2", "comcat", 2, 1e-2),
    Method("comcat, rank 4", "comcat", 4, 1e-2),
    # With 4 heads a LoRA of rank 2 r has as many parameters as products of rank r.
    Method("LoRA, rank 2", "lora", 2, 1e-2),
    Method("LoRA, rank 4", "lora", 4, 1e-2),
    Method("LoRA, rank 8", "lora", 8, 1e-2),
    Method("full fine-tuning", "full", 0, 3e-4),
)


class Drawn(Protocol):
    """What a pipeline drew, judged.

    Attributes:
        concept, retention: percent of images of the concept, and of the other prompts, that are right; the former NaN
            without a concept. details: more of the same, for JSON.
        images: the concept's (under None) and each digit's, (n, 3, 16, 16) in [0, 1].
    """

    @property
    def concept(self) -> float: ...
    @property
    def retention(self) -> float: ...
    @property
    def details(self) -> dict[str, Any]: ...
    @property
    def images(self) -> dict[int | None, Tensor]: ...


@dataclass(frozen=True)
class MethodOutcome:
    """What a method reached.

    Attributes:
        concept, retention: percent of images of V*, and of the other prompts, that show the right digit.
        seconds: of the training loop; cpu_seconds: the same without those that other processes took.
        bytes: of what has to be stored (float16); parameters: trained ones.
        peak: resident memory in bytes that training added at most; noisy, since it is that of the process.
    """

    method: Method
    concept: float
    retention: float
    seconds: float
    cpu_seconds: float
    bytes: int
    parameters: int
    peak: int
    scores: Drawn

    def to_dict(self) -> dict[str, Any]:
        kept = ("concept", "retention", "seconds", "cpu_seconds", "bytes", "parameters", "peak")
        values = {name: getattr(self, name) for name in kept}
        return {
            **asdict(self.method),
            **{name: None if value != value else value for name, value in values.items()},  # JSON has no NaN
            **self.scores.details,
        }


class Contest:
    """One base, one digit that it does not know, and what the methods make of five photos of it.

    Args:
        pipe: of :mod:`comcat_demos.digits`; folder: for photos and class images; digit: that it does not know.
    """

    def __init__(self, pipe: Any, folder: Path, digit: int, seed: int = 0, steps: int = 200) -> None:
        self.pipe, self.folder, self.digit, self.seed = pipe, folder, digit, seed
        self.config = CustomizeConfig(
            steps=steps,
            batch_size=5,
            token=TOKEN,
            token_init="digit",
            token_lr=0.05,
            weight_decay=0.0,
            warmup_steps=10,
            schedule="cosine",
            seed=seed,
        )

    @cached_property
    def classifier(self) -> Classifier:
        return Classifier()

    def photos(self) -> list[tuple[Image, str]]:
        """What the concept is taught from, with captions."""
        return [(image, PROMPT) for image in digits.concept_images(self.digit, 5, seed=self.seed)]

    def class_prompts(self) -> list[str]:
        """What the base draws and must not unlearn, one image each."""
        return [digits.prompt(d) for d in range(10) if d != self.digit for _ in range(8)]

    def score(self, prompt: str | None = PROMPT) -> Drawn:
        """Measure the pipeline as it is now; without a prompt, of the concept, the others alone."""
        return score(self.pipe, self.classifier, prompt, self.digit, count_concept=64, count_other=16, seed=self.seed)

    def prepare(self) -> None:
        """Write the photos, and images that the base draws of what it knows, with their captions."""
        _write(self.folder / "photos", self.photos())
        prompts = self.class_prompts()
        drawn = generate(self.pipe, prompts, seed=1000 + self.seed)
        _write(self.folder / "class-images", list(zip(map(_picture, drawn), prompts, strict=True)))

    def run(self, method: Method, save: Path | None = None, progress: Progress | None = None) -> MethodOutcome:
        """Train with one method, measure, and leave the pipeline as it was.

        Args:
            save: where to write comcat's adapter.
        """
        if method.kind == "base":
            scores = self.score(None)
            return MethodOutcome(method, float("nan"), scores.retention, 0.0, 0.0, 0, 0, 0, scores)
        original = self.pipe.unet
        copied = method.kind in ("full", *PEFT)
        if copied:
            self.pipe.unet = copy.deepcopy(original)  # the base stays for the others
        token_lr = self.config.token_lr if method.token_lr is None else method.token_lr
        config = replace(self.config, lr=method.lr or self.config.lr, token_lr=token_lr)
        try:
            with accelerated("no", self.seed, cpu=True) as accelerator, frozen_pipeline(self.pipe):
                material = self._material(config)
                with peak_memory() as peak:
                    handle = self._adapter(method, config)
                    if copied:
                        put_on(self.pipe.unet, method, self.seed)
                    # Added products are no parameters of the UNet: what asks for gradients in it is PEFT's, or all.
                    others = {name: p for name, p in self.pipe.unet.named_parameters() if p.requires_grad}
                    learner: Any = _Learner(handle, others)
                    objective = Objective(self.pipe.scheduler, config.snr_gamma)
                    trainer = AdapterTrainer(accelerator, family_of(self.pipe), objective, learner, *material, config)
                    start, cpu_start = time.perf_counter(), time.process_time()
                    for step in range(config.steps):
                        trainer.step(step)
                        if progress:
                            progress(method.name, step + 1, config.steps)
                    cpu_seconds = time.process_time() - cpu_start
                seconds = time.perf_counter() - start
            scores = self.score()
            tensors = {name: p.detach() for name, p in learner.named_parameters()}
            if save is not None:
                handle.requires_grad_(False)
                handle.info = {"prompt": PROMPT, "training": {"steps": config.steps, "lr": config.lr, "photos": 5}}
                write_adapter(handle, save)
            size = len(tensor_bytes(encode(tensors, "float16")))
            count = sum(t.numel() for t in tensors.values())
            return MethodOutcome(
                method, scores.concept, scores.retention, seconds, cpu_seconds, size, count, peak[0], scores
            )
        finally:
            if _NAME in adapters(self.pipe):
                remove_adapter(self.pipe, _NAME)
            self.pipe.unet = original

    def _adapter(self, method: Method, config: CustomizeConfig) -> Adapter:
        if method.kind == "comcat":
            return add_adapter(
                self.pipe, rank=method.rank, name=_NAME, token=TOKEN, token_init=config.token_init, seed=self.seed
            )
        handle = new_adapter(self.pipe, _NAME, 1.0)
        generator = torch.Generator().manual_seed(self.seed)
        handle.token = new_token(self.pipe, TOKEN, 1, config.token_init, generator)
        attach(handle)
        return handle

    def _material(self, config: CustomizeConfig) -> tuple[Photos, Photos]:
        family = family_of(self.pipe)
        _, shapes = shapes_for(family, config)
        found = [find_photos(self.folder / name, None) for name in ("photos", "class-images")]
        sources = [Photos(family, photos, shapes, seed=self.seed, stream=i) for i, photos in enumerate(found)]
        for source in sources:
            source.encode_all()
        return sources[0], sources[1]


class _Learner:
    """What :class:`AdapterTrainer` needs of an adapter, for methods that train other parameters beside a token."""

    def __init__(self, handle: Adapter, others: dict[str, nn.Parameter]) -> None:
        self.token = handle.token
        self._parameters = {**dict(handle.named_parameters()), **others}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._parameters.items()


def _write(folder: Path, pictures: Sequence[tuple[Image, str]]) -> None:
    lines = []
    for i, (image, caption) in enumerate(pictures):
        save_png(image, folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": caption}))
    (folder / METADATA).write_text("\n".join(lines) + "\n")


def _picture(image: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


@contextlib.contextmanager
def peak_memory(every: float = 0.005) -> Iterator[list[int]]:
    """How far resident memory rises above where it was, in bytes, looked at every few milliseconds."""
    import psutil

    process, peak, done = psutil.Process(), [0], threading.Event()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone can give freed memory back
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    start = process.memory_info().rss

    def watch() -> None:
        while not done.wait(every):
            peak[0] = max(peak[0], process.memory_info().rss - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
