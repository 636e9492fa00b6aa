"""The components of the tab "Compress"."""

from __future__ import annotations

from typing import Any

from .compress_form import METHODS, SHARES
from .compress_tab import AUTOMATIC, IDLE, CompressTab
from .status_card import job_card


def build_compress(tab: CompressTab) -> tuple[Any, Any, list[Any]]:
    """Make them; (function, its state, its outputs) of the look that is taken again and again."""
    import gradio as gr

    with gr.Row(equal_height=False):
        with gr.Column(scale=4):
            model = gr.Textbox(
                "",
                label="Model",
                elem_id="compress-model",
                placeholder="deit_small_patch16_224",
                info="A timm name, torchvision/NAME, open_clip/NAME/TAG, ORG/NAME on the Hub, or a model's directory.",
            )
            images = gr.Textbox(
                "",
                label="Images",
                elem_id="compress-images",
                placeholder="imagenet/",
                info="Folder to calibrate and to measure on; one folder per class, if accuracy is to be measured. "
                "Empty: the weights alone.",
            )
            out = gr.Textbox("small-model", label="Output folder", elem_id="compress-out")
            percent = gr.Slider(5, 100, 50, step=1, label="Keep, in percent", elem_id="percent")
            of = gr.Radio(list(SHARES), value="parameters", label="of the model's")
            method = gr.Dropdown(
                [AUTOMATIC, *METHODS],
                value=AUTOMATIC,
                label="Method",
                info="How ranks are chosen: probe measures, spectrum computes, auto compares, uniform is one ratio.",
            )
            measure = gr.Checkbox(True, label="Measure accuracy and speed before and after", info="Needs labels.")
            with gr.Accordion("More settings", open=False):
                with gr.Row():
                    calibration = gr.Textbox("", label="Calibration images", placeholder="1024, or all")
                    measured = gr.Textbox("", label="Images to measure on", placeholder="all")
                with gr.Row():
                    skip_bad = gr.Checkbox(label="Leave out images that cannot be read")
                    overwrite = gr.Checkbox(label="Replace", info="A model in the output folder.")
            with gr.Row():
                start = gr.Button("Start", variant="primary", elem_id="compress-start")
                stop = gr.Button("Stop", variant="stop", interactive=False)
                resume = gr.Button("Resume", visible=False)
        with gr.Column(scale=5):
            refused = gr.HTML(elem_id="compress-problem", elem_classes="hidden-if-empty")
            card = gr.HTML(job_card(None, tab.shared.line, IDLE), elem_id="compress-card")
            place = gr.Textbox("", label="The small model", interactive=False, visible=False, buttons=["copy"])
            command = gr.Textbox(
                "", label="The same on the command line", interactive=False, visible=False, lines=2, buttons=["copy"]
            )
    report = gr.HTML(elem_id="report")

    looked = [card, start, stop, resume, report, place, command]
    seen = gr.State({})

    def look(before: dict[str, Any]) -> list[Any]:
        now = tab.look()
        new = {key for key, value in now.items() if before.get(key) != value}
        if not new:
            return [gr.skip()] * (len(looked) + 1)
        skip = gr.skip()
        return [
            now,
            now["card"] if "card" in new else skip,
            gr.Button(interactive=not now["busy"]) if "busy" in new else skip,
            gr.Button(interactive=now["busy"]) if "busy" in new else skip,
            gr.Button(visible=now["resumable"]) if "resumable" in new else skip,
            tab.report() if "page" in new else skip,
            gr.Textbox(now["out"], visible=bool(now["out"])) if "out" in new else skip,
            gr.Textbox(now["command"], visible=bool(now["command"])) if "command" in new else skip,
        ]

    again = (look, seen, [seen, *looked])
    told = [model, images, out, percent, of, method, measure, calibration, measured, skip_bad, overwrite]
    start.click(tab.start, told, refused).then(*again)
    resume.click(tab.resume, None, refused).then(*again)
    stop.click(tab.stop).then(*again)
    return again
