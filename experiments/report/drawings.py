"""Figures as markup inside the page.

A figure is inline SVG. A figure of very many marks is a PNG as a data address if that is shorter. Identifiers inside an
SVG are prefixed with the figure's name, so that two figures in one page cannot use each other's clipping paths.
Identifiers without references are removed, and so is everything that points outside the page (document type,
namespaces, metadata), which HTML does not need.
"""

from __future__ import annotations

import base64
import io
import re

from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.figures import svg_text
from experiments.figures.drawing.style import style_context

CSS_DPI = 96  # pixels per inch in a browser
PNG_DPI = 144

LONG_SVG = 250_000
"""Longer markup is compared with a PNG. Shorter is not, because drawing a figure twice takes twice as long."""


def figure_markup(figure: Figure, name: str, title: str) -> Markup:
    """Return a figure as HTML.

    Args:
        figure: the figure, which stays unchanged.
        name: an identifier that no other figure of the page has.
        title: the text for screen readers.
    """
    svg = _svg(figure, name)
    png = _png(figure) if len(svg) > LONG_SVG else None
    if png is None or len(svg) <= len(png):
        return Markup('<div class="drawing" role="img" aria-label="{}">{}</div>').format(title, Markup(svg))
    width, height = (round(CSS_DPI * inches) for inches in figure.get_size_inches())
    image = Markup('<img class="drawing" alt="{}" width="{}" height="{}" src="data:image/png;base64,{}">')
    return image.format(title, width, height, png)


def _svg(figure: Figure, name: str) -> str:
    text = svg_text(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*|<style[^>]*>.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text, count=3)
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    text = re.sub(r'\sid="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = text.replace('xlink:href="#', f'xlink:href="#{name}-').replace("url(#", f"url(#{name}-")
    return text.replace(" xlink:href=", " href=").strip()


def _png(figure: Figure) -> str:
    stream = io.BytesIO()
    with style_context():
        figure.savefig(stream, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return base64.b64encode(stream.getvalue()).decode("ascii")
