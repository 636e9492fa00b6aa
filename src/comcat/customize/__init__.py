"""Customize a text-to-image diffusion model: per-head products of low rank, added to a frozen model.

``add_adapter`` -> train -> ``save_adapter``; later ``load_adapter`` -> ``generate``. Source: COMCAT (arXiv 2305.17235),
Eq. 8.
"""

from typing import TYPE_CHECKING

from .. import _lazy

if TYPE_CHECKING:
    from .adapter.attached import Adapter, adapters, add_adapter, get_adapter, remove_adapter, set_adapters
    from .files.adapter_file import load_adapter, read_adapter, save_adapter
    from .generation import generate
    from .judging.contestants import Contestant
    from .judging.judge import judge
    from .judging.judgement import Judgement
    from .lora.exporting import Conversion, export_lora
    from .lora.importing import import_lora
    from .pipelines import open_pipeline
    from .shrinking.shrink import Shrunk, shrink_adapter
    from .teaching.customize_config import CustomizeConfig
    from .teaching.teach import train

__all__ = [
    "Adapter",
    "Contestant",
    "Conversion",
    "CustomizeConfig",
    "Judgement",
    "Shrunk",
    "adapters",
    "add_adapter",
    "export_lora",
    "generate",
    "get_adapter",
    "import_lora",
    "judge",
    "load_adapter",
    "open_pipeline",
    "read_adapter",
    "remove_adapter",
    "save_adapter",
    "set_adapters",
    "shrink_adapter",
    "train",
]

# Where they live; they are imported on first use, PyTorch and transformers with them.
_lazy.package(
    __name__,
    {
        "Adapter": "adapter.attached",
        "Contestant": "judging.contestants",
        "Conversion": "lora.exporting",
        "CustomizeConfig": "teaching.customize_config",
        "Judgement": "judging.judgement",
        "adapters": "adapter.attached",
        "add_adapter": "adapter.attached",
        "export_lora": "lora.exporting",
        "generate": "generation",
        "get_adapter": "adapter.attached",
        "import_lora": "lora.importing",
        "judge": "judging.judge",
        "load_adapter": "files.adapter_file",
        "open_pipeline": "pipelines",
        "read_adapter": "files.adapter_file",
        "remove_adapter": "adapter.attached",
        "save_adapter": "files.adapter_file",
        "set_adapters": "adapter.attached",
        "Shrunk": "shrinking.shrink",
        "shrink_adapter": "shrinking.shrink",
        "train": "teaching.teach",
    },
)

del TYPE_CHECKING  # no name of ours
