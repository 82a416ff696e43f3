"""How the page looks: colours that can be read in light and dark, fonts of the machine."""

from __future__ import annotations

from pathlib import Path

from gradio.themes import Base, Color

STYLE = Path(__file__).with_name("style.css")

INK = Color("#f0f5fb", "#dbe7f5", "#b9d0ea", "#8ab0da", "#5a8cc6", "#386cab", "#28548c",
            "#1f4372", "#19365c", "#142a48", "#0c1a2e", name="ink")  # fmt: skip


def build_theme() -> Base:
    """The theme; text has a contrast of 4.5 or more, the edges of controls of 3 (WCAG AA)."""
    theme = Base(
        primary_hue=INK,
        secondary_hue=INK,
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        body_background_fill="#fbfcfe",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_padding="*spacing_sm 0",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_title_text_weight="600",
        block_title_text_size="*text_sm",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_width="1px",
        input_border_color="*neutral_500",
        input_border_color_dark="*neutral_400",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_300",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_200",
        button_primary_text_color="white",
        button_primary_text_color_dark="*primary_950",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_text_color="*neutral_900",
        button_secondary_text_color_dark="*neutral_100",
        button_large_radius="*radius_md",
        button_large_padding="10px 12px",
        slider_color="*primary_600",
        slider_color_dark="*primary_300",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_200",
    )
