"""A summary as a table in the terminal, a page with plots that needs nothing else, and JSON."""

import base64
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fusion.release.page import is_best, page_html, shown_change
from fusion.release.plots import PLOTS, THEMES, png
from fusion.release.summary import Summary, verdict

__all__ = ["console_table", "verdict", "write_report"]


def console_table(summary: Summary) -> Table:
    """Bits per byte by model; the best of the target's architecture in bold, the fused model's row marked."""
    title = Text(f"{summary.name}: held-out bits per byte (lower is better)")
    table = Table(title=title, title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("role")
    for head in (*summary.domains, "mean", "vs pivot"):
        table.add_column(Text(head), justify="right", no_wrap=True)
    models, columns = summary.ordered(), (*summary.domains, None)
    for model, after in zip(models, [*models[1:], None], strict=True):
        styles = ["bold" if is_best(summary, model, d) else "" for d in columns]
        cells = [Text(f"{model.on(d):.4f}", style) for d, style in zip(columns, styles, strict=True)]
        table.add_row(
            Text(model.subject),
            model.role,
            *cells,
            shown_change(summary, model),
            style="reverse" if model.role == "fused" else "",
            end_section=after is not None and after.role != model.role,
        )
    return table


def write_report(summary: Summary, folder: Path) -> Path:
    """Write `report.html`, `plots/*.png` and `results.json` into `folder`; return the page's path.

    The page holds its style and plots within itself, in a light and a dark version, and fetches nothing.
    """
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, (draw, alt) in PLOTS.items():
        themed = {theme: png(draw, summary, **colours) for theme, colours in THEMES.items()}
        light, dark = themed["light"], themed["dark"]
        if light is not None and dark is not None:
            (folder / "plots" / f"{name}.png").write_bytes(light)
            # CSS pixels below which its text would be too small: half of the width that the PNG states
            least = str(int.from_bytes(light[16:20], "big") // 2)
            figures[name] = {"alt": alt, "least": least, "light": _data_url(light), "dark": _data_url(dark)}
    (folder / "results.json").write_text(summary.to_json(), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(page_html(summary, figures), encoding="utf-8")
    return page


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
