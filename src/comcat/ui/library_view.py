"""The components of the tab "Library"."""

from __future__ import annotations

from typing import Any

from .areas import AREAS, EVERYWHERE, OWN
from .library_tab import HEADERS, LibraryTab
from .workplace import LibraryEntry


def build_library(tab: LibraryTab) -> tuple[Any, Any, list[Any]]:
    """Make them; (function, its state, its outputs) of the look that is taken again and again."""
    import gradio as gr

    shared = tab.shared
    first = tab.look()
    gr.Markdown(f"Adapters in `{shared.place.folder}`, as their files say it.")
    table = gr.Dataframe(
        first["table"],
        headers=HEADERS,
        datatype="str",
        type="array",
        interactive=False,
        show_label=False,
        wrap=True,
        max_height=230,
        buttons=[],
        elem_id="library",
    )
    told = gr.State({})
    with gr.Row(equal_height=False):
        with gr.Column(scale=4):
            chosen = gr.Dropdown(
                first["names"], value=[], multiselect=True, label="Adapters that are on", elem_id="chosen"
            )

            @gr.render(inputs=[chosen, told], triggers=[chosen.change])
            def each(names: list[str], known: dict[str, dict[str, Any]]) -> None:
                own = {entry.name: entry for entry in tab.entries() if entry.header}
                for name in (name for name in names if name in own):
                    build_chosen(own[name], known.get(name, {}), told)

            prompt = gr.Textbox("a photo of V*", label="Prompt", lines=2)
            with gr.Row():
                seed = gr.Number(0, precision=0, minimum=0, label="First seed", min_width=90)
                count = gr.Slider(1, 8, 2, step=1, label="Seeds")
            with gr.Row():
                steps = gr.Textbox("", label="Steps", placeholder="the pipeline's own")
                guidance = gr.Textbox("", label="Guidance", placeholder="the pipeline's own")
            with gr.Accordion("More", open=False):
                base = gr.Textbox(shared.place.base, label="Base model")
                negative = gr.Textbox("", label="What not to draw")
                size = gr.Textbox("", label="Pixels a side", placeholder="the model's own")
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", variant="stop", interactive=False)
        with gr.Column(scale=5):
            refused = gr.HTML(elem_id="draw-problem", elem_classes="hidden-if-empty")
            card = gr.HTML(first["card"], elem_id="draw-card")
            gr.Markdown("The base on the left; on the right, at the same seed, with the adapters that are on.")
            gallery = gr.Gallery(
                show_label=False,
                columns=2,
                height="auto",
                format="png",
                object_fit="contain",
                interactive=False,
                visible=False,
                buttons=["download", "fullscreen"],
                elem_id="pictures",
            )
            save = gr.Button("Save pictures with their settings", visible=False, elem_id="save")
            saved = gr.Markdown()
    with gr.Accordion("Export as a LoRA, or remove", open=False):
        with gr.Row(equal_height=True):
            one = gr.Dropdown(first["names"], value=None, label="Adapter", scale=3, elem_id="one")
            layout = gr.Radio(["diffusers", "kohya"], value="diffusers", label="Layout of the LoRA", scale=3)
            export = gr.Button("Export as LoRA", scale=1, min_width=150)
            remove = gr.Button("Remove …", variant="stop", scale=1, min_width=110)
        with gr.Row(visible=False) as sure:
            yes = gr.Button("Yes, delete the file", variant="stop")
            no = gr.Button("No, keep it")
        export_card, exported = gr.HTML(elem_classes="hidden-if-empty"), gr.Markdown()

    looked = [table, chosen, one, card, draw, stop, gallery, save, export_card, exported]
    seen = gr.State({})

    def look(before: dict[str, Any], on: list[str], picked: str | None) -> list[Any]:
        now = tab.look()
        new = {key for key, value in now.items() if before.get(key) != value}
        if now["pictures"] is None:  # what is shown stays until there are new ones
            now["pictures"] = before.get("pictures")
            new.discard("pictures")
        if not new:
            return [gr.skip()] * (len(looked) + 1)
        skip, names = gr.skip(), now["names"]
        pictures = [(picture.image, picture.caption) for picture in tab.pictures()] if "pictures" in new else []
        columns = 2 if any(picture.settings["adapters"] for picture in tab.pictures()) else 1
        return [
            now,
            gr.Dataframe(now["table"]) if "table" in new else skip,
            gr.Dropdown(names, value=[name for name in on if name in names]) if "names" in new else skip,
            gr.Dropdown(names, value=picked if picked in names else None) if "names" in new else skip,
            now["card"] if "card" in new else skip,
            gr.Button(interactive=not now["busy"]) if "busy" in new else skip,
            gr.Button(interactive=now["busy"]) if "busy" in new else skip,
            gr.Gallery(pictures, visible=bool(pictures), columns=columns) if "pictures" in new else skip,
            gr.Button(visible=bool(pictures)) if "pictures" in new else skip,
            now["export"] if "export" in new else skip,
            now["exported"] if "exported" in new else skip,
        ]

    again = (look, [seen, chosen, one], [seen, *looked])
    asked = [base, prompt, chosen, told, seed, count, steps, guidance, negative, size]
    draw.click(tab.draw, asked, refused).then(*again)
    stop.click(tab.stop).then(*again)
    save.click(tab.save, None, saved)
    export.click(tab.export, [one, base, layout], export_card).then(*again)
    remove.click(lambda: gr.Row(visible=True), None, sure)
    no.click(lambda: gr.Row(visible=False), None, sure)
    yes.click(tab.remove, one, exported).then(lambda: gr.Row(visible=False), None, sure).then(*again)
    return again


def build_chosen(entry: LibraryEntry, known: dict[str, Any], told: Any) -> None:
    """How strong an adapter is, and where it acts; kept in ``told``, by its name."""
    import gradio as gr

    name = entry.name
    area = known.get("area", EVERYWHERE)
    with gr.Group():
        strength = gr.Slider(
            -1,
            2,
            known.get("strength", entry.header.scale),
            step=0.05,
            interactive=True,
            label=f"Strength of {name}",
            info="1 as it was taught, 0 is the base",
        )
        with gr.Row():
            where = gr.Dropdown(list(AREAS), value=area, interactive=True, label=f"Where {name} acts")
            word = gr.Textbox(
                known.get("word", entry.word),
                label="Its word in the prompt",
                interactive=True,
                visible=bool(entry.word),
                min_width=120,
            )
        image = gr.Image(
            known.get("image"),
            label="White where it acts, black where not",
            type="filepath",
            sources=["upload"],
            height=150,
            interactive=True,
            visible=area == OWN,
        )

    def keep(key: str) -> Any:
        def kept(value: Any, all_told: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
            return {**all_told, name: {**all_told.get(name, {}), key: value}}

        return kept

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    strength.change(keep("strength"), [strength, told], told, **quiet)
    word.change(keep("word"), [word, told], told, **quiet)
    where.change(keep("area"), [where, told], told, **quiet)
    where.change(lambda area: gr.Image(visible=area == OWN), where, image, **quiet)
    image.change(keep("image"), [image, told], told, **quiet)
