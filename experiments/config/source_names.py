"""The kinds of ``data.source``: one word, or one ``kind:where``.

Public names: ``SOURCES``, ``Source``, ``parse_source``.

>>> parse_source("hf:Salesforce/wikitext:wikitext-2-raw-v1")
Source(kind='hf', target='Salesforce/wikitext', config='wikitext-2-raw-v1')
>>> parse_source("pydocs")
Traceback (most recent call last):
experiments.errors.UsageError: data.source: got 'pydocs', allowed pydoc, synthetic, text:PATH, json:PATH, csv:PATH, \
hf:NAME[:CONFIG]; did you mean 'pydoc'?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.errors import UsageError, nearest

SOURCES: Mapping[str, str] = {
    "pydoc": "held-out topics of the documentation that comes with Python; no file, no network",
    "synthetic": "token ids drawn evenly from the vocabulary, special tokens left out",
    "text:PATH": "a UTF-8 text file as one document, or every *.txt of a folder",
    "json:PATH": "an array or JSON lines, of strings or of objects with the text under data.field",
    "csv:PATH": "a table with a header line and the text in the column data.field",
    "hf:NAME[:CONFIG]": "a dataset of the hub, or a local dataset folder; the text in data.field of data.split",
}


@dataclass(frozen=True)
class Source:
    """A parsed ``data.source``: its kind, the path or name after the colon, and the configuration of a hub dataset."""

    kind: str
    target: str | None = None
    config: str | None = None


def parse_source(source: str) -> Source:
    """Take ``data.source`` apart; touches no file.

    Raises:
        UsageError: Unknown kind, or a path where none belongs, or none where one belongs.
    """
    kind, colon, target = source.partition(":")
    forms = {form.partition(":")[0]: form for form in SOURCES}
    if kind not in forms:
        raise UsageError(f"data.source: got {source!r}, allowed {', '.join(SOURCES)}{nearest(kind, forms)}")
    if (":" in forms[kind]) != bool(target) or (colon and not target):
        raise UsageError(f"data.source: got {source!r}, allowed {forms[kind]}")
    if kind != "hf":
        return Source(kind, target or None)
    name, _, config = target.partition(":")
    if not name:
        raise UsageError(f"data.source: got {source!r}, allowed {forms[kind]}")
    return Source(kind, name, config or None)
