"""The table of data sources: ``data.source`` is one word, or one ``kind:where``.

A source is a row of ``SOURCES`` and a function that reads it, named as ``module:function`` and imported when it is
needed. A function of ``documents`` gets the parsed ``Source``, ``data.field`` and ``data.split``, and returns texts. A
function of ``windows`` gets what ``experiments.inputs.windows.synthetic_windows`` gets, and returns token ids.

>>> parse_source("hf:Salesforce/wikitext:wikitext-2-raw-v1")
Source(kind='hf', target='Salesforce/wikitext', config='wikitext-2-raw-v1')
>>> parse_source("pydocs")
Traceback (most recent call last):
experiments.errors.UsageError: data.source: got 'pydocs', allowed pydoc, synthetic, text:PATH, json:PATH, csv:PATH, \
hf:NAME[:CONFIG]; did you mean 'pydoc'?
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.errors import UsageError, nearest
from experiments.registry import Registry

_READERS = "experiments.inputs.sources"


@dataclass(frozen=True)
class SourceForm:
    """One kind of source.

    Attributes:
        form: its notation; ``PATH`` and similar words are placeholders.
        meaning: what it reads, for lists.
        documents: the function that reads its texts.
        windows: the function that makes its token ids, if it has no texts.
    """

    form: str
    meaning: str
    documents: str = ""
    windows: str = ""


SOURCES: Registry[SourceForm] = Registry(
    "data.source",
    {
        "pydoc": SourceForm(
            "pydoc",
            "held-out topics of the documentation that comes with Python; no file, no network",
            documents=f"{_READERS}:read_pydoc",
        ),
        "synthetic": SourceForm(
            "synthetic",
            "token ids drawn evenly from the vocabulary, special tokens left out",
            windows="experiments.inputs.windows:synthetic_windows",
        ),
        "text": SourceForm(
            "text:PATH",
            "a UTF-8 text file as one document, or every *.txt of a folder",
            documents=f"{_READERS}:read_text",
        ),
        "json": SourceForm(
            "json:PATH",
            "an array or JSON lines, of strings or of objects with the text under data.field",
            documents=f"{_READERS}:read_json",
        ),
        "csv": SourceForm(
            "csv:PATH",
            "a table with a header line and the text in the column data.field",
            documents=f"{_READERS}:read_csv",
        ),
        "hf": SourceForm(
            "hf:NAME[:CONFIG]",
            "a dataset of the hub, or a local dataset folder; the text in data.field of data.split",
            documents=f"{_READERS}:read_dataset",
        ),
    },
)


@dataclass(frozen=True)
class Source:
    """A parsed ``data.source``: its kind, the path or name after the colon, and the configuration of a hub dataset."""

    kind: str
    target: str | None = None
    config: str | None = None


def parse_source(source: str) -> Source:
    """Parse ``data.source``, without reading any file.

    Raises:
        UsageError: The kind is unknown, or a path is missing or not allowed.
    """
    kind, colon, target = source.partition(":")
    if kind not in SOURCES:
        forms = ", ".join(entry.form for entry in SOURCES.values())
        raise UsageError(f"data.source: got {source!r}, allowed {forms}{nearest(kind, SOURCES)}")
    form = SOURCES[kind].form
    if (":" in form) != bool(target) or (colon and not target):
        raise UsageError(f"data.source: got {source!r}, allowed {form}")
    if not form.endswith("[:CONFIG]"):
        return Source(kind, target or None)
    name, _, config = target.partition(":")
    if not name:
        raise UsageError(f"data.source: got {source!r}, allowed {form}")
    return Source(kind, name, config or None)
