"""Compress the denoiser of a text-to-image pipeline: a UNet, or a diffusion transformer.

recording = record(pipe, prompts, "recorded/")          what the denoiser is called with, over prompts and times
calibration = comcat.calibrate(pipe.unet, recording, outputs="features")
small = comcat.compress(pipe.unet, comcat.plan(pipe.unet, budget, calibration), calibration)
distill(small, pipe.unet, recording, out="run/")        a short training on the dense one's predictions
put(pipe, "unet", small)
"""

from typing import TYPE_CHECKING

from .. import _lazy

if TYPE_CHECKING:
    from .distill_config import DistillConfig
    from .distillation import distill
    from .pipeline_parts import component, put
    from .recorded_calls import Recording
    from .sampling_loop import record

__all__ = ["DistillConfig", "Recording", "component", "distill", "put", "record"]

# Where they live; they are imported on first use, PyTorch and diffusers with them.
_lazy.package(
    __name__,
    {
        "DistillConfig": "distill_config",
        "Recording": "recorded_calls",
        "component": "pipeline_parts",
        "distill": "distillation",
        "put": "pipeline_parts",
        "record": "sampling_loop",
    },
)

del TYPE_CHECKING  # no name of ours
