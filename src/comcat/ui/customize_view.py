"""The components of the tab "Customize"."""

from __future__ import annotations

from typing import Any

from ..customize.teaching.customize_config import CustomizeConfig
from .customize_form import ASKED, FIELDS, START, STORAGES
from .customize_tab import FIRST, IDLE, CustomizeTab
from .photo_fields import build_photos
from .status_card import job_card


def build_customize(tab: CustomizeTab) -> tuple[Any, Any, list[Any]]:
    """Make them; (function, its state, its outputs) of the look that is taken again and again."""
    import gradio as gr

    with gr.Row(equal_height=False):
        with gr.Column(scale=5):
            photos = build_photos(tab)
            name, values = _build_settings(tab.shared.place.base)
        with gr.Column(scale=4):
            with gr.Row():
                start = gr.Button("Start", variant="primary", elem_id="train-start")
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="train-stop")
            refused = gr.HTML(elem_id="train-problem", elem_classes="hidden-if-empty")
            card = gr.HTML(job_card(None, tab.shared.line, IDLE), elem_id="train-card")
            with gr.Row(equal_height=True, visible=False) as going_on:
                runs = gr.Dropdown([], label="Stopped before its end", scale=3)
                resume = gr.Button("Resume", scale=1, min_width=110, elem_id="train-resume")
            plot = gr.LinePlot(x="step", y="loss", title="Loss", height=230, visible=False, buttons=[], elem_id="loss")
            sheets = gr.Gallery(
                show_label=False,
                columns=1,
                height=340,
                interactive=False,
                visible=False,
                object_fit="contain",
                buttons=["download", "fullscreen"],
                elem_id="samples",
            )
            result = gr.File(label="The adapter", visible=False, interactive=False, elem_id="adapter-file")
            command = gr.Textbox(
                "", label="The same on the command line", visible=False, interactive=False, lines=2, buttons=["copy"]
            )

    looked = [card, start, stop, going_on, runs, plot, sheets, result, command]
    seen = gr.State({})

    def look(before: dict[str, Any]) -> list[Any]:
        now = tab.look()
        new = {key: value for key, value in now.items() if before.get(key) != value}
        if not new:
            return [gr.skip()] * (len(looked) + 1)
        return [now, *_updates(tab, now, new)]

    photos.change(lambda: "", None, refused)  # it may have been that there were none
    start.click(tab.start, [name, photos, *values], refused).then(look, seen, [seen, *looked])
    resume.click(tab.resume, [runs, photos, *values], refused).then(look, seen, [seen, *looked])
    stop.click(tab.stop).then(look, seen, [seen, *looked])
    return look, seen, [seen, *looked]


def _updates(tab: CustomizeTab, now: dict[str, Any], new: dict[str, Any]) -> list[Any]:
    """Of the components that have to change, the others stay untouched."""
    import gradio as gr
    import pandas as pd

    skip = gr.skip()
    plot: Any = skip
    if "losses" in new:
        frame = pd.DataFrame(now["losses"], columns=["step", "loss"])
        plot = gr.LinePlot(frame, visible=len(frame) > 1)
    sheets: Any = skip
    if "samples" in new:
        shown = [(tab.shared.shown(path), text) for path, text in now["samples"]]
        sheets = gr.Gallery(shown, visible=bool(shown))
    file: Any = skip
    if "file" in new:
        file = gr.File(tab.shared.shown(now["file"]) if now["file"] else None, visible=bool(now["file"]))
    runs = now["runs"]
    return [
        now["card"] if "card" in new else skip,
        gr.Button(interactive=not now["busy"]) if "busy" in new else skip,
        gr.Button(interactive=now["busy"]) if "busy" in new else skip,
        gr.Row(visible=bool(runs)) if "runs" in new else skip,
        gr.Dropdown(runs, value=runs[-1] if runs else None) if "runs" in new else skip,
        plot,
        sheets,
        file,
        gr.Textbox(now["command"], visible=bool(now["command"])) if "command" in new else skip,
    ]


def _build_settings(given_base: str) -> tuple[Any, list[Any]]:
    """(name, what a training is told: in the order of ASKED, then of FIELDS)."""
    import gradio as gr

    gr.Markdown("### 2. What it is")
    asked: dict[str, Any] = {}
    asked["prompt"] = gr.Textbox(
        "a photo of V*",
        label="Prompt",
        info="Caption of all photos that have none of their own. A word like V* or <dog> is learned.",
    )
    with gr.Row():
        name = gr.Textbox("concept", label="Name", info="Of the adapter's file.")
        asked["base"] = gr.Textbox(
            given_base,
            label="Base model",
            info="Directory of a pipeline of diffusers, or its name on the Hub.",
        )
    gr.Markdown("### 3. How it is learned")
    parts = {field.name: None for field in FIELDS}
    defaults = {**CustomizeConfig().to_dict(), **START}
    with gr.Row():
        for field in (f for f in FIELDS if f.name in FIRST):
            with gr.Column(min_width=220):
                parts[field.name] = field.component(defaults[field.name])
    with gr.Accordion("More settings", open=False):
        with gr.Row():
            asked["class_prompt"] = gr.Textbox(
                "",
                label="Class prompt",
                info="What the concept is one of, e.g. a photo of a dog: keeps the model from forgetting them.",
            )
            asked["class_images"] = gr.Textbox(
                "", label="Class images", info="A folder of them on this machine; empty: the model draws them."
            )
        with gr.Row():
            asked["storage"] = gr.Dropdown(list(STORAGES), value=STORAGES[1], label="Stored as", info="In the file.")
            asked["max_bytes"] = gr.Textbox("", label="Largest file", info="E.g. 1M: the parts worth least go.")
        with gr.Row():
            asked["allow_upscale"] = gr.Checkbox(label="Enlarge small photos", info="Those below the resolution.")
            asked["overwrite"] = gr.Checkbox(label="Replace", info="An adapter of the same name.")
        for panel in dict.fromkeys(field.panel for field in FIELDS):
            chosen = [f for f in FIELDS if f.panel == panel and f.name not in FIRST]
            with gr.Accordion(panel, open=False), gr.Row():
                for field in chosen:
                    with gr.Column(min_width=220):
                        parts[field.name] = field.component(defaults[field.name])
    return name, [*(asked[key] for key in ASKED), *(parts[field.name] for field in FIELDS)]
