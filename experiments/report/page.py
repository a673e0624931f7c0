"""Render the page: put tables, drawings and words into the template.

The template engine escapes everything except the drawings, whose texts matplotlib has escaped, and our own style sheet
and script. A content security policy allows no other script and no address outside the page.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from experiments.report.embedded import json_block, table_json
from experiments.report.facts.environment import context_rows, environment_rows
from experiments.report.facts.inputs import ReportInputs
from experiments.report.facts.settings import Setting, setting_list
from experiments.report.facts.summary import Summary
from experiments.report.facts.verdict import limit_sentences
from experiments.report.facts.worst_runs import replay_command
from experiments.report.gallery import draw_gallery
from experiments.report.page_tables import page_tables

MOST_CONTEXTS = 10

_CONTENTS = {
    "outcomes": "Outcomes",
    "detectors": "Detectors",
    "ranking": "Sensitive heads",
    "figures": "Figures",
    "worst": "Worst runs and replay",
    "performance": "Performance",
    "stops": "Stops",
    "failures": "Failures",
    "configuration": "Configuration",
    "environment": "Environment",
    "limits": "Limits",
    "data": "Data",
}


def render_page(inputs: ReportInputs, summary: Summary) -> str:
    """Return the HTML of the report."""
    environment = Environment(
        loader=PackageLoader("experiments.report", "template"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    script = _own_file("sort.js")
    tables = page_tables(inputs, summary)
    settings = setting_list(inputs.settings, inputs.axes, inputs.provenance.get("arguments"))
    drawn, left_out = draw_gallery(inputs, summary)
    contexts = context_rows(inputs.provenance)
    return environment.get_template("page.html").render(
        name=inputs.name,
        verdict=" ".join(summary.verdict),
        contents=[item for item in _CONTENTS.items() if item[0] != "stops" or inputs.stops is not None],
        tables=tables,
        by_location=summary.by_location,
        ranking_verdict=summary.ranking_verdict,
        focus=summary.focus,
        figures=drawn,
        left_out=left_out,
        commands=_commands(inputs, summary),
        memory=_memory(inputs),
        failed=len(inputs.failures),
        chosen=[setting for setting in settings if setting.origin != "default"],
        defaults=[setting for setting in settings if setting.origin == "default"],
        environment=environment_rows(inputs.provenance),
        contexts=contexts[:MOST_CONTEXTS],
        contexts_left_out=max(0, len(contexts) - MOST_CONTEXTS),
        limits=list(limit_sentences(inputs, summary.points, summary.ends)),
        style=Markup(_own_file("page.css")),
        script=Markup(script),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        json=Markup(json_block(_numbers(inputs, summary, settings))),
    )


def _own_file(name: str) -> str:
    return files("experiments.report").joinpath("template", name).read_text(encoding="utf-8")


def _commands(inputs: ReportInputs, summary: Summary) -> list[str]:
    return [replay_command(inputs.folder.path, run_id) for run_id in summary.worst["run_id"]]


def _memory(inputs: ReportInputs) -> list[tuple[str, str]]:
    runs = inputs.runs
    peak, attention, bounds = (runs[name].max() for name in ("peak_memory_mb", "attention_flops", "bounds_flops"))
    found = [
        ("peak memory", peak, "{:,.0f} MB"),
        ("attention products of one pass", attention, "{:.4g} floating-point operations"),
        ("bounds of one pass", bounds, "{:.4g} floating-point operations"),
    ]
    return [(name, text.format(float(value))) for name, value, text in found if value == value]


def _numbers(inputs: ReportInputs, summary: Summary, settings: list[Setting]) -> dict[str, Any]:
    """Return the contents of the JSON block."""
    tables = {
        name: table_json(getattr(summary, name))
        for name in ("points", "outcomes", "cells", "detectors", "ranking", "seconds", "execution", "worst")
    }
    return {
        "schema": 1,
        "name": inputs.name,
        "planned": inputs.planned,
        "runs": len(inputs.runs),
        "failed": len(inputs.failures),
        "verdict": list(summary.verdict),
        "ranking_verdict": summary.ranking_verdict,
        "focus": summary.focus,
        **tables,
        "replay": _commands(inputs, summary),
        "stops": None if inputs.stops is None else table_json(inputs.stops),
        "configuration": [vars(setting) for setting in settings],
        "provenance": inputs.provenance,
    }
