"""Figures as markup that stands in the page itself.

A figure is inline SVG, or a PNG as a data address where that is shorter. Identifiers inside an SVG get the figure's name in
front, so that two figures in one page cannot take each other's clipping paths; what points outside the page (document
type, namespaces, metadata) is left out: an HTML page needs none of it.

Public names: ``figure_markup``.
"""

from __future__ import annotations

import base64
import io
import re

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

PNG_DPI = 144
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def figure_markup(figure: Figure, name: str, title: str) -> Markup:
    """Return a figure as HTML.

    Args:
        figure: drawn and left as it is.
        name: an identifier that no other figure of the page has.
        title: what screen readers say instead.
    """
    svg, png = _svg(figure, name), _png(figure)
    if len(svg) <= len(png):
        return Markup('<div class="drawing" role="img" aria-label="{}">{}</div>').format(title, Markup(svg))
    return Markup('<img class="drawing" alt="{}" src="data:image/png;base64,{}">').format(title, png)


def _svg(figure: Figure, name: str) -> str:
    stream = io.StringIO()
    # A fixed salt: the same figure gives the same text.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata=_NO_METADATA)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*|<style[^>]*>.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text, count=3)
    text = re.sub(r'\bid="', f'id="{name}-', text).replace('xlink:href="#', f'xlink:href="#{name}-')
    return text.replace("url(#", f"url(#{name}-").replace(" xlink:href=", " href=").strip()


def _png(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=PNG_DPI)
    return base64.b64encode(stream.getvalue()).decode("ascii")
