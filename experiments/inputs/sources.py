"""Read the documents of a campaign from its ``data.source``: one word, or one ``kind:where``.

    read_documents("pydoc")                                # held-out topics of Python's own documentation
    read_documents("text:notes.txt")                       # one document; a folder: one for each *.txt in it
    read_documents("json:reviews.jsonl", field="body")     # array or JSON lines, of strings or objects
    read_documents("csv:reviews.csv", field="body")
    read_documents("hf:Salesforce/wikitext:wikitext-2-raw-v1", split="test")    # hub dataset or a local folder

``experiments.config.source_names`` has the table of sources, which names the function that reads each. Only
``synthetic``
has no documents: ``experiments.inputs.windows`` draws its tokens from the vocabulary.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config.source_names import SOURCES, Source, parse_source
from experiments.errors import MissingResourceError, UsageError, nearest
from experiments.inputs.hub import HubUnreachableError, first_line, hub_files
from experiments.inputs.pydoc_text import held_out_topics
from experiments.registry import loaded


class _Record(NamedTuple):
    """One entry of a file and its place, which an error message names."""

    where: str
    value: Any


def read_documents(source: str, field: str | None = None, split: str = "test") -> list[str]:
    """Return the documents of a source, in their order, without documents of only white space.

    Args:
        source: One of the forms of ``SOURCES``.
        field: Key or column with the text (json, csv, hf); by default ``text``, or else the only one with text.
        split: Split of a dataset (hf).

    Raises:
        UsageError: The source is malformed or empty, lacks the field, or holds something other than text.
        MissingResourceError: The file, the dataset, or the network is missing.
    """
    parsed = parse_source(source)
    reader = SOURCES[parsed.kind].documents
    if not reader:
        raise UsageError(f"data.source: got {source!r}, which has no documents; allowed where tokens are drawn")
    documents = [document for document in loaded(reader)(parsed, field, split) if document.strip()]
    if not documents:
        raise UsageError(f"data.source: got {source!r}, which holds no text")
    return documents


def read_pydoc(source: Source, field: str | None, split: str) -> list[str]:
    """Return the held-out topics."""
    return list(held_out_topics().values())


def existing_path(source: Source) -> Path:
    """Return the path that a source names; raise ``MissingResourceError`` if it does not exist."""
    path = Path(source.target or "").expanduser()
    if not path.exists():
        got = f"{source.kind}:{source.target}"
        raise MissingResourceError(f"data.source: got {got!r}, but there is no {path.absolute()}{_beside(path)}")
    return path


def _beside(path: Path) -> str:
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""


def read_text(source: Source, field: str | None, split: str) -> list[str]:
    """Return the text of a file, or of every ``*.txt`` of a folder."""
    path = existing_path(source)
    if not path.is_dir():
        return [_decode(path)]
    files = sorted(path.glob("*.txt"))
    if not files:
        raise MissingResourceError(f"data.source: the folder {path} has no *.txt")
    return [_decode(file) for file in files]


def _decode(path: Path) -> str:
    if path.is_dir():
        raise UsageError(f"data.source: got the folder {path}, allowed a file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise MissingResourceError(f"data.source: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"data.source: {path} is not UTF-8: {error.reason} at byte {error.start}") from error


def read_json(source: Source, field: str | None, split: str) -> list[str]:
    """Return the strings of an array or of JSON lines, or the values of their objects at ``field``."""
    path = existing_path(source)
    records = _json_records(path, _decode(path))
    name = field
    if any(isinstance(record.value, dict) for record in records):
        columns: dict[str, bool] = {}
        for record in records:
            for key, value in record.value.items() if isinstance(record.value, dict) else ():
                columns[key] = columns.get(key, True) and isinstance(value, str)
        name = _choose_field(f"json:{path}", field, columns)
    return [_json_text(record, name) for record in records]


def _json_records(path: Path, content: str) -> list[_Record]:
    if not content.strip():
        raise UsageError(f"data.source: {path} is empty")
    try:
        whole = json.loads(content)
    except json.JSONDecodeError as error:
        if content.lstrip().startswith("["):
            raise UsageError(f"data.source: {path}, line {error.lineno}: {error.msg}, column {error.colno}") from error
        return [
            _Record(f"{path}, line {number}", _json_line(path, number, line))
            for number, line in enumerate(content.split("\n"), start=1)
            if line.strip()
        ]
    entries = whole if isinstance(whole, list) else [whole]
    return [_Record(f"{path}, entry {number}", entry) for number, entry in enumerate(entries, start=1)]


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"data.source: {path}, line {number}: {error.msg}, column {error.colno}") from error


def _json_text(record: _Record, field: str | None) -> str:
    value = record.value
    if isinstance(value, dict):
        if field not in value:
            raise UsageError(
                f"data.source: {record.where} has no {field!r}; it has {', '.join(map(repr, value)) or 'nothing'}"
            )
        value = value[field]
    return _text(record.where, value)


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"data.source: {where}: got {type(value).__name__} {str(value)[:40]!r}, allowed a string")
    return value


def _choose_field(source: str, field: str | None, columns: Mapping[str, bool]) -> str:
    """Return the field with the text; ``columns`` says for each name whether all its values are text."""
    available = ", ".join(map(repr, columns)) or "none"
    if field is not None:
        if field not in columns:
            raise UsageError(f"data.field: got {field!r}, {source} has {available}{nearest(field, columns)}")
        return field
    if "text" in columns:
        return "text"
    texts = [name for name, is_text in columns.items() if is_text]
    if len(texts) != 1:
        raise UsageError(
            f"data.field: not given, and {source} has no 'text' nor one single column of text; it has {available}"
        )
    return texts[0]


def read_csv(source: Source, field: str | None, split: str) -> list[str]:
    """Return a column of a table."""
    path = existing_path(source)
    table = _csv_rows(path)
    if not table:
        raise UsageError(f"data.source: {path} is empty")
    (_, header), *rows = table
    for number, row in rows:
        if len(row) != len(header):
            raise UsageError(
                f"data.source: {path}, line {number}: got {len(row)} cells, allowed {len(header)} as in the header"
            )
    columns = {
        name: not all(_is_number(row[column]) for _, row in rows if row[column]) for column, name in enumerate(header)
    }
    name = _choose_field(f"csv:{path}", field, columns)
    if header.count(name) > 1:
        raise UsageError(f"data.field: got {name!r}, which {header.count(name)} columns of {path} are called")
    column = header.index(name)
    return [row[column] for _, row in rows]


def _csv_rows(path: Path) -> list[tuple[int, Sequence[str]]]:
    """Return (line at which the row ends, cells) of every row that is not blank."""
    reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses a text beyond 128 KiB
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UsageError(f"data.source: {path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_dataset(source: Source, field: str | None, split: str) -> list[str]:
    """Return the texts of a split of a dataset of the hub, or of a local folder."""
    name = source.target or ""
    table = _load_dataset(name, source.config, split)
    columns = {key: getattr(kind, "dtype", None) in ("string", "large_string") for key, kind in table.features.items()}
    column = _choose_field(f"hf:{name}", field, columns)
    return [_text(f"hf:{name}, row {number}", value) for number, value in enumerate(table[column])]


def _load_dataset(name: str, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingResourceError("data.source: hf: needs the package `datasets`, which is not installed") from error
    folder = Path(name).expanduser()
    if not folder.is_dir():
        _require_on_hub(name, datasets.config.HF_HUB_OFFLINE)
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        if saved:
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split)
    except (datasets.exceptions.DatasetNotFoundError, OSError) as error:
        raise MissingResourceError(f"data.source: cannot read hf:{name}: {first_line(error)}") from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = first_line(error.__cause__ or error)
        raise UsageError(f"data.source: cannot read split {split!r} of hf:{name}: {reason}") from error
    return _saved_split(loaded, name, split) if saved else loaded


def _require_on_hub(name: str, offline: bool) -> None:
    if name.startswith((".", "/", "~")):
        raise MissingResourceError(
            f"data.source: got 'hf:{name}', but there is no folder {Path(name).expanduser().absolute()}"
        )
    if offline:
        return  # then load_dataset reads its cache at once
    try:
        hub_files(name, "dataset")
    except UsageError as error:
        raise UsageError(f"data.source: {error}") from error
    except MissingResourceError as error:
        hint = "; with HF_HUB_OFFLINE=1 a cached copy is used" if isinstance(error, HubUnreachableError) else ""
        raise MissingResourceError(f"data.source: got 'hf:{name}', but {error}{hint}") from error


def _saved_split(saved: Any, name: str, split: str) -> Any:
    """Return a split of a dataset that ``save_to_disk`` wrote: it has several splits, or one that may know its name."""
    splits = saved if isinstance(saved, Mapping) else {str(saved.split or split): saved}
    if split not in splits:
        raise UsageError(
            f"data.split: got {split!r}, hf:{name} has {', '.join(map(repr, splits))}{nearest(split, splits)}"
        )
    return splits[split]
