"""Images from prompts: every image has a seed of its own, so that it does not depend on what else is in its batch."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from ..errors import DataError
from ..hosts import clip
from ..progress import Progress
from .adapter.attached import Adapter, adapters
from .adapter.components import text_encoders, tokenizer_name
from .adapter.words import has_token, learned, placeholders

#: Entry of an image's ``info``: whether the pipeline's safety checker has taken offence at it.
FLAGGED = "comcat_flagged"

#: An emphasis of other programs: (V*:1.2).
_WEIGHT = re.compile(r"\([^()]*:\s*\d+(?:\.\d+)?\)")


@dataclass(frozen=True)
class Drawing:
    """How a pipeline draws; None is the pipeline's own.

    Attributes:
        steps, guidance_scale, negative_prompt: as the pipeline takes them; height, width: in pixels.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None


@torch.no_grad()
def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    progress: Progress | None = None,
    stage: str = "generate",
) -> list[list[Image.Image]]:
    """One image for every prompt and seed.

    Args:
        steps, guidance_scale, negative_prompt, height, width: as the pipeline takes them; its own by default.

    Returns:
        Per prompt, the images of all seeds.

    Raises:
        DataError: one of these is no such number or text; the pipeline does not take it, such as a negative prompt; or
            a learned word would be cut off at the end of a prompt, or is not known to this pipeline.
    """
    if isinstance(prompts, str):
        raise _no_list()
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    images: list[Image.Image] = []
    for batch in draw(pipe, jobs, Drawing(steps, guidance_scale, negative_prompt, height, width), batch_size):
        images += batch
        if progress:
            progress(stage, len(images), len(jobs))
    count = len(seeds)
    return [images[i * count : (i + 1) * count] for i in range(len(prompts))]


@torch.no_grad()
def draw(
    pipe: Any, jobs: Sequence[tuple[str, int]], drawing: Drawing, batch_size: int = 4, output_type: str = "pil"
) -> Iterator[list[Image.Image]]:
    """The images of pairs of a prompt and a seed, batch by batch.

    Args:
        output_type: as the pipeline takes it; with ``latent`` they are tensors that nothing has decoded.

    Raises:
        DataError: as :func:`generate`.
    """
    prompts, seeds = [prompt for prompt, _ in jobs], [seed for _, seed in jobs]
    sizes = {"steps": drawing.steps, "height": drawing.height, "width": drawing.width}
    _check_request(prompts, seeds, batch_size, sizes, drawing.guidance_scale)
    negative = drawing.negative_prompt
    check_words(pipe, [*dict.fromkeys(prompts), *([] if negative is None else [negative])])
    given = _arguments(pipe, drawing)
    with quiet(pipe):
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            options = dict(given)
            if negative is not None:
                options["negative_prompt"] = [negative] * len(batch)
            try:
                found = pipe(
                    prompt=[prompt for prompt, _ in batch],
                    generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
                    output_type=output_type,
                    **options,
                )
            except ValueError as error:  # its own checks, e.g. of the size
                raise DataError(f"{type(pipe).__name__} cannot draw this: {error}") from error
            for image, flag in zip(found.images, getattr(found, "nsfw_content_detected", None) or (), strict=False):
                image.info[FLAGGED] = bool(flag)
            yield list(found.images)


def _arguments(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    """What the pipeline is called with beside prompts and noise."""
    wanted = {("num_inference_steps" if name == "steps" else name): value for name, value in asdict(drawing).items()}
    given = {key: value for key, value in wanted.items() if value is not None}
    taken = inspect.signature(pipe.__call__).parameters
    unknown = [key for key in given if key not in taken]
    if "negative_prompt" in given and "true_cfg_scale" in taken:  # a distilled model: its pipeline would ignore it
        unknown.append("negative_prompt")
    if (drawing.height is None) != (drawing.width is None):  # some pipelines would ignore it
        raise DataError("give both height and width, or neither")
    if unknown:
        raise DataError(f"{type(pipe).__name__} takes no {unknown[0].replace('_', ' ')}; leave it out")
    if "clean_caption" in taken:  # captions are learned as they are written
        given["clean_caption"] = False
    return given


def _check_request(
    prompts: Any, seeds: Any, batch_size: Any, sizes: Mapping[str, Any], guidance_scale: float | None
) -> None:
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise _no_list()
    for name, value in {"batch_size": batch_size, **sizes}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise DataError(f"{name} is {value!r}, but must be a whole number of at least 1")
    for seed in seeds:
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise DataError(f"the seed {seed!r} must be a whole number of at most 64 bits")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise DataError(f"guidance_scale is {guidance_scale}, but must be a finite number")


def _no_list() -> DataError:
    return DataError("prompts must be a list of texts, such as ['a photo of a dog']")


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar, which is set to what it was afterwards."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = before


def check_prompts(pipe: Any, prompts: Sequence[str], *, without_token: bool = False) -> None:
    """Refuse prompts that do not say what the adapters have learned.

    Raises:
        DataError: there is no prompt, an empty one, or one without the token of an adapter that is on, with a word that
            nothing has learned, or so long that a learned word is cut off.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise DataError("a prompt is empty; say what to draw")
    for handle in adapters(pipe).values():
        if handle.token is None or not handle.enabled or without_token:
            continue
        lacking = [prompt for prompt in prompts if not has_token(prompt, handle.token.text)]
        if lacking:
            raise DataError(
                f"the prompt {lacking[0]!r} does not have {handle.token.text!r}, the word that {handle.name!r} has "
                f"learned{_example(handle)}; write it in, or pass --without-token"
            )
    check_words(pipe, prompts)
    known = set().union(*(tokenizer.get_vocab() for tokenizer in _tokenizers(pipe).values()), set())
    for prompt in prompts:
        unknown = [] if without_token else [word for word in placeholders(prompt) if word not in known]
        if unknown:
            there = [handle.token.text for handle in adapters(pipe).values() if handle.token is not None]
            raise DataError(
                f"nothing on this pipeline has learned {unknown[0]!r} of the prompt {prompt!r}; learned are "
                f"{', '.join(there) or 'no words'}. Give the adapter that has, or pass --without-token"
            )


def check_words(pipe: Any, texts: Sequence[str]) -> None:
    """Refuse texts whose learned words the pipeline would not see.

    Raises:
        DataError: a word stands behind the last token that a text encoder reads, or the pipeline has another tokenizer
            than the one that has learned it.
    """
    weighted = [found[0] for text in texts if (found := _WEIGHT.search(text)) is not None]
    if weighted:
        warnings.warn(
            f"{weighted[0]!r} is read as plain text: pipelines of diffusers know no weights. Encode the prompt with a "
            "library that does, and pass prompt_embeds to the pipeline",
            stacklevel=3,
        )
    for encoder, module in text_encoders(pipe).items():
        tokenizer = getattr(pipe, tokenizer_name(encoder), None)
        there = clip.known_ids(module)
        foreign = {word for word, i in learned(tokenizer).items() if i not in there}
        for text, word in ((text, word) for text in texts for word in foreign if has_token(text, word)):
            raise DataError(
                f"{word!r} in {text!r} is a learned word of this pipeline's {tokenizer_name(encoder)}, and its vectors "
                f"are in another text encoder than its {encoder}. Share both, e.g. by from_pipe, or neither"
            )
    for handle in adapters(pipe).values():
        if handle.token is None:
            continue
        word = handle.token.text
        for text in (text for text in texts if has_token(text, word)):
            for name, tokenizer in _tokenizers(pipe).items():
                if word not in learned(tokenizer):
                    raise DataError(
                        f"{word!r} in {text!r} is a word of the adapter {handle.name!r}, which was put on a pipeline "
                        f"that shares this one's model, but not its {name}. Share text encoder and tokenizer too, e.g. "
                        "by from_pipe, or load the adapter on a model of this pipeline's own"
                    )
                check_length(pipe, tokenizer, handle.token.words, text)


def check_length(pipe: Any, tokenizer: Any, words: Sequence[str], text: str) -> None:
    """Raise DataError where a tokenizer cuts off one of these learned words at the end of a text."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    whole = text if convert is None else convert(text, tokenizer)
    ids = {learned(tokenizer)[word] for word in words}
    found, room = tokenizer(whole, verbose=False).input_ids, tokenizer.model_max_length - 1  # the last one ends it
    lost = [place for place, i in enumerate(found) if i in ids and place >= room]
    if lost:
        raise DataError(
            f"the text {text!r} is {len(found)} tokens long, and {words[0]!r} stands at place {lost[0] + 1}: the text "
            f"encoder reads {tokenizer.model_max_length}, the rest is cut off. Write the word further in front, or a "
            "shorter text"
        )


def _tokenizers(pipe: Any) -> dict[str, Any]:
    """The tokenizers of the CLIP text encoders."""
    found = {tokenizer_name(name): getattr(pipe, tokenizer_name(name), None) for name in text_encoders(pipe)}
    return {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}


def _example(handle: Adapter) -> str:
    prompt = handle.info.get("prompt")
    return f" (it was taught with {prompt!r})" if prompt else ""
