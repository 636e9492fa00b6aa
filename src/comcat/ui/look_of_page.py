"""How the page looks: fonts of the reader's own system, and colours with enough contrast, light and dark."""

from __future__ import annotations

from typing import Any

from .status_card import CSS as CARDS

STYLE = f"""
{CARDS}
.gradio-container {{ width: 100% !important; max-width: 1360px !important; margin: 0 auto !important; }}
.hidden-if-empty:not(:has(.card)) {{ display: none !important; }}
#samples .grid-container {{ grid-template-columns: 1fr !important; }}
#samples .grid-container, #samples .grid-container button {{ height: auto !important; }}
#samples .grid-container button {{ aspect-ratio: auto !important; }}
#pictures .grid-wrap {{ max-height: none !important; height: auto !important; }}
#now {{ text-align: right; }}
iframe.report {{ width: 100%; height: 75vh; border: 1px solid var(--border-color-primary); border-radius: 10px;
  background: white; }}
"""


def theme() -> Any:
    """gradio's, without what it would fetch."""
    import gradio as gr

    return gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="slate",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill="*neutral_100",
        block_border_width="1px",
        block_title_text_color="*primary_800",
        block_title_text_color_dark="*primary_100",
        block_label_text_color="*primary_800",
        block_label_text_color_dark="*primary_100",
        block_title_background_fill_dark="transparent",
        block_label_background_fill_dark="*primary_900",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        checkbox_border_width="1px",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        slider_color="*primary_700",
    )
