"""The fields of the tab "Customize" for photos and their captions."""

from __future__ import annotations

from typing import Any

from .customize_tab import CustomizeTab
from .given_photos import GivenPhoto, with_captions


def build_photos(tab: CustomizeTab) -> Any:
    """Make them; the state that holds the photos, a list of :class:`GivenPhoto`."""
    import gradio as gr

    photos = gr.State([])
    gr.Markdown("### 1. Photos of the concept")
    files = gr.File(label="Add photos", file_count="multiple", height=130, elem_id="photos")
    with gr.Row(equal_height=True):
        folder = gr.Textbox(
            "",
            label="or take a folder on this machine",
            placeholder="photos/dog, with captions beside them if there are any",
            scale=4,
        )
        take = gr.Button("Take folder", scale=1, min_width=110)
    problem = gr.HTML(elem_id="photo-problem", elem_classes="hidden-if-empty")
    gallery = gr.Gallery(show_label=False, columns=5, height=170, interactive=False, visible=False, buttons=[])
    captions = gr.Dataframe(
        headers=["photo", "caption (empty: the prompt below)"],
        column_count=2,
        datatype="str",
        type="array",
        interactive=True,
        static_columns=[0],
        visible=False,
        label="Captions: click into a cell to write one",
        max_height=330,
        wrap=True,
        buttons=[],
        elem_id="captions",
    )
    clear = gr.Button("Remove all photos", visible=False, size="sm")

    def show(found: list[GivenPhoto]) -> list[Any]:
        there = bool(found)
        return [
            gr.Gallery([(photo.path, photo.name) for photo in found], visible=there),
            gr.Dataframe([[photo.name, photo.caption] for photo in found], visible=there),
            gr.Button(visible=there),
        ]

    seen_photos = [gallery, captions, clear]

    def add(paths: list[str] | None, rows: Any, found: list[GivenPhoto]) -> list[Any]:
        found, text = tab.added(paths, with_captions(found, rows or []))
        return [None, found, text, *show(found)]

    def add_folder(path: str, rows: Any, found: list[GivenPhoto]) -> list[Any]:
        found, text = tab.added_folder(path, with_captions(found, rows or []))
        return [found, text, *show(found)]

    def edit(rows: Any, found: list[GivenPhoto]) -> list[Any]:
        kept = with_captions(found, rows or [])
        return [kept, *(show(kept) if len(kept) != len(found) else [gr.skip()] * 3)]

    files.upload(add, [files, captions, photos], [files, photos, problem, *seen_photos])
    take.click(add_folder, [folder, captions, photos], [photos, problem, *seen_photos])
    captions.input(edit, [captions, photos], [photos, *seen_photos], show_progress="hidden")
    clear.click(lambda: [[], "", *show([])], None, [photos, problem, *seen_photos])
    return photos
