"""The page: three tabs over one line of jobs."""

from __future__ import annotations

from typing import Any

from .compress_tab import CompressTab
from .compress_view import build_compress
from .customize_tab import CustomizeTab
from .customize_view import build_customize
from .library_tab import LibraryTab
from .library_view import build_library
from .shared import EVERY, Shared
from .status_card import now_line


def build_page(shared: Shared) -> Any:
    """The page as gradio's Blocks."""
    import gradio as gr

    with gr.Blocks(title="comcat", analytics_enabled=False) as page:
        with gr.Row(equal_height=True):
            gr.Markdown("# comcat", container=False)
            now = gr.HTML(now_line(shared.line), elem_id="now")
        looks = []
        with gr.Tabs():
            with gr.Tab("Customize", id="customize"):
                looks.append(build_customize(CustomizeTab(shared)))
            with gr.Tab("Library", id="library"):
                looks.append(build_library(LibraryTab(shared)))
            with gr.Tab("Compress", id="compress"):
                looks.append(build_compress(CompressTab(shared)))
        timer = gr.Timer(EVERY)
        quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "trigger_mode": "once"}
        timer.tick(lambda: now_line(shared.line), None, now, **quiet)
        for function, inputs, outputs in looks:
            timer.tick(function, inputs, outputs, **quiet)
    return page
