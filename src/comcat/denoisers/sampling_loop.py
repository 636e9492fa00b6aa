"""The calls of a denoiser in its pipeline's own sampling loop: its inputs at all times, guidance included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..customize.adapter.attached import adapters
from ..customize.generation import Drawing, draw
from ..errors import CalibrationError, ModelError
from ..models.modes import frozen
from ..progress import Progress
from .denoiser_calls import batches_of
from .pipeline_parts import component
from .recorded_calls import Recording, Settings, Writer

#: Share of the calls of every picture that is recorded where nothing else is said.
SHARE = 0.2


def record(
    pipe: Any,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    name: str | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    share: float = SHARE,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Recording:
    """Draw ``prompts`` and record what the denoiser is called with, without decoding the pictures.

    Of every batch of pictures each ``1 / share``-th call is kept, beginning one later in every batch, so that all times
    come in turn. Memory holds one batch of pictures; the recording is on disk.

    Args:
        folder: directory for the recording, empty or not there.
        name: of the component, see :func:`component`.
        seeds: one picture of every prompt for each; steps, guidance_scale, negative_prompt, height, width: as the
            pipeline takes them.
        share: of the calls, above 0 and up to 1.
        batch_size: pictures that are drawn together.
        progress: called as ``progress("record", pictures done, pictures in all)``.

    Raises:
        CalibrationError: no prompts, a share that is none, or inputs that cannot be recorded.
        ModelError: no such component, or one that carries adapters. DataError: what the pipeline does not take.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise CalibrationError("there are no prompts to calibrate on; give what the model is to draw")
    if not 0 < share <= 1:
        raise CalibrationError(f"the share of calls is {share}, but must be above 0 and at most 1")
    chosen, model = component(pipe, name)
    if carried := adapters(pipe):
        raise ModelError(f"the pipeline carries the adapters {', '.join(carried)}; remove them first")
    writer = Writer(Path(folder))
    every, calls, batches = max(1, round(1 / share)), 0, 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        if (calls_here[0] + batches) % every == 0:
            for batch in batches_of(module, args, kwargs):
                writer.add(batch)
        calls_here[0] += 1
        calls += 1

    calls_here = [0]
    jobs = [(text, seed) for text in texts for seed in seeds]
    drawing = Drawing(steps, guidance_scale, negative_prompt, height, width)
    loop = draw(pipe, jobs, drawing, batch_size, output_type="latent")
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with frozen(model):
            for _ in loop:
                batches, calls_here[0] = batches + 1, 0
                if progress:
                    progress("record", min(batches * batch_size, len(jobs)), len(jobs))
    finally:
        handle.remove()
    if not writer.rows:
        raise CalibrationError(
            f"none of the {calls} calls of the {chosen} was recorded: the pipeline makes too few steps for a share of "
            f"{share}; give more steps or a larger share"
        )
    return writer.close(
        Settings(
            component=chosen,
            model=type(model).__name__,
            prompts=len(texts),
            seeds=list(seeds),
            steps=steps,
            guidance_scale=guidance_scale,
            share=share,
            calls=calls,
        )
    )
