"""A micro campaign with a report, and a reader of its page."""

from __future__ import annotations

import contextlib
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from micro_campaign import MicroPlace

from experiments.command_line import main
from experiments.figures import FIGURES

HOSTILE = "<script>alert(1)</script>"
"""What a model is called; as a path it is two folders."""

VOID = {"meta", "link", "img", "br"}


def make_campaign(root: Path) -> Path:
    """Run a campaign of 48 runs in a model with a hostile name; return its folder.

    Paths are relative to ``root``: a model's path is part of what faults are drawn from, so each campaign has the same.
    """
    more = [
        "--sweep.fault.location", "q,scores,weights", "--sweep.fault.bit", "3,30", "--num_runs", "8",
        "--detect.detectors", "full,epsilon,oracles,competitors", "--stop.margin", "null",
        "--run.propagation", "true",
    ]  # fmt: skip
    with contextlib.chdir(root):
        assert main(MicroPlace.make(Path(HOSTILE)).arguments(Path("output"), *more)) == 0
    return root / "output" / "micro"


def copied(folder: Path, target: Path) -> Path:
    """Return a copy of a campaign that a test may damage."""
    shutil.copytree(folder, target)
    return target


def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the first figure of the catalogue alone: drawing all of them takes longer than the rest of a report."""
    name, entry = next(iter(FIGURES.items()))
    monkeypatch.setattr("experiments.report.gallery.FIGURES", {name: entry})


class Page(HTMLParser):
    """What a browser would make of a page: elements, attributes, visible text, the content of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.visible: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closed out of turn"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self.open and self.open[-1] == "style":
            self.styles.append(data)
        else:
            self.visible.append(data)

    @property
    def text(self) -> str:
        return "".join(self.visible)

    @property
    def numbers(self) -> dict[str, Any]:
        """The JSON block."""
        (content,) = [content for attributes, content in self.scripts if attributes.get("id") == "summary"]
        return json.loads(content)

    def attributes(self, name: str) -> list[str]:
        return [str(attributes[name]) for _, attributes in self.elements if name in attributes]
