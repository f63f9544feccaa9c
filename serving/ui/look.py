"""The look of the page: fonts of the system, nothing from another server."""

from __future__ import annotations

import gradio as gr

CSS = """
#head h1 { margin: 0 0 2px; font-size: 1.5rem; }
#head p { margin: 0; color: var(--body-text-color-subdued); }
.status { display: flex; align-items: center; gap: 12px; min-height: 28px; font-variant-numeric: tabular-nums; }
.status progress { flex: 1; min-width: 60px; height: 10px; appearance: none; border: 0; }
.status progress, .status ::-webkit-progress-bar { background: var(--border-color-primary); border-radius: 5px; }
.status ::-webkit-progress-value { background: var(--color-accent); border-radius: 5px; }
.status ::-moz-progress-bar { background: var(--color-accent); border-radius: 5px; }
button.sm { min-height: 36px; }
.examples { gap: 6px; }
.examples p { margin: 0; color: var(--body-text-color-subdued); }
.examples button {
  justify-content: flex-start; text-align: left; white-space: normal; font-weight: normal; font-size: 0.875rem;
  padding: 6px 12px; background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  color: var(--body-text-color);
}
.examples button:hover { background: var(--background-fill-secondary); }
.bottoms { align-items: end; }
.result { background: var(--background-fill-secondary) !important; }
.result .image-container img, .result .image-frame img { width: 100%; height: 100%; object-fit: contain; }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)) !important; }
:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
#history .grid-wrap { padding-top: 30px; }
/* On a phone what comes of a request follows its button; examples and settings come after it. */
@media (max-width: 640px) {
  .gradio-container main { padding: 8px !important; }
  .work > .column { display: contents; }
  .work > .column > * { flex-basis: 100%; }
  .later, .examples { order: 1; }
}
"""
# Escape presses the cancel button of the tab that is open.
HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented) return;
  for (const button of document.querySelectorAll("button.cancel, .cancel button")) {
    if (button.offsetParent !== null) { button.click(); return; }
  }
});
</script>
"""


def theme() -> gr.themes.Base:
    """Gradio's plain theme without its web fonts."""
    plain = gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    # Text that can be read: Gradio's own greys and its white on teal are below a contrast of 4.5.
    return plain.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        color_accent="*primary_600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
    )
