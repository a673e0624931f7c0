from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.config.source_names import SOURCES, Source, parse_source
from experiments.errors import MissingResourceError, UsageError
from experiments.inputs.pydoc_text import held_out_topics
from experiments.inputs.sources import read_documents


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


@pytest.fixture(autouse=True)
def datasets_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


# The name of a source


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("pydoc", Source("pydoc")),
        ("synthetic", Source("synthetic")),
        ("text:a/b.txt", Source("text", "a/b.txt")),
        ("json:x:y.json", Source("json", "x:y.json")),
        ("hf:wikitext", Source("hf", "wikitext")),
        ("hf:owner/name:config", Source("hf", "owner/name", "config")),
    ],
)
def test_parse_source(source: str, parsed: Source) -> None:
    assert parse_source(source) == parsed


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pydocs", r"got 'pydocs', allowed pydoc, synthetic, .*did you mean 'pydoc'"),
        ("txt:a", r"got 'txt:a', allowed .*did you mean 'text'"),
        ("text", r"got 'text', allowed text:PATH"),
        ("json:", r"got 'json:', allowed json:PATH"),
        ("pydoc:a", r"got 'pydoc:a', allowed pydoc"),
        ("synthetic:", r"got 'synthetic:', allowed synthetic"),
        ("hf::config", r"got 'hf::config', allowed hf:NAME\[:CONFIG\]"),
        ("", r"got '', allowed pydoc"),
    ],
)
def test_bad_source_names(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"data.source: {message}"):
        parse_source(source)


def test_every_listed_source_parses() -> None:
    for kind, source in SOURCES.items():
        assert parse_source(source.form.replace("[:CONFIG]", ":CONFIG")).kind == kind


def test_pydoc_is_the_held_out_text() -> None:
    assert read_documents("pydoc") == list(held_out_topics().values())


def test_synthetic_has_no_documents() -> None:
    with pytest.raises(UsageError, match="no documents"):
        read_documents("synthetic")


@pytest.mark.parametrize("kind", ["text", "json", "csv"])
def test_missing_file_names_its_neighbour(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "reviews.dat", "x")
    with pytest.raises(MissingResourceError, match=r"there is no /.*/reviews.dta; did you mean 'reviews.dat'"):
        read_documents(f"{kind}:{tmp_path}/reviews.dta")


@pytest.mark.parametrize("kind", ["text", "json", "csv"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_file(kind: str, content: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(is empty|holds no text|no 'text')"):
        read_documents(f"{kind}:{write(tmp_path / 'void', content)}")


@pytest.mark.parametrize("kind", ["text", "json", "csv"])
def test_file_that_is_not_utf8(kind: str, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"text\ncaf\xe9")
    with pytest.raises(UsageError, match=r"latin is not UTF-8: .* at byte 8"):
        read_documents(f"{kind}:{tmp_path}/latin")


# text


def test_text_file_is_one_document(tmp_path: Path) -> None:
    content = "one\r\n\ntwo\x0c é\n"
    assert read_documents(f"text:{write(tmp_path / 'a.txt', content)}") == [content]


def test_text_folder_is_a_document_a_file(tmp_path: Path) -> None:
    for name, content in (("b.txt", "second"), ("a.txt", "\ufefffirst"), ("c.md", "not read"), ("d.txt", " ")):
        write(tmp_path / name, content)
    assert read_documents(f"text:{tmp_path}") == ["first", "second"]


def test_text_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(MissingResourceError, match=r"has no \*\.txt"):
        read_documents(f"text:{tmp_path}")


# json


@pytest.mark.parametrize(
    ("content", "field", "documents"),
    [
        ('["a", "b"]', None, ["a", "b"]),
        ('[\n {"text": "a", "id": 1},\n {"text": "b"}\n]', None, ["a", "b"]),
        ('{"text": "a", "title": "t"}\n\n{"text": "b", "title": "u"}\n', None, ["a", "b"]),
        ('{"body": "a", "id": 1}\n{"body": "b", "id": 2}', None, ["a", "b"]),
        ('{"body": "a", "title": "t"}\n{"body": "b", "title": "u"}', "title", ["t", "u"]),
        ('"a"\r\n"b\u2028c"\r\n', None, ["a", "b\u2028c"]),
        ('{"text": "only"}', None, ["only"]),
        ('["", "  ", "a"]', None, ["a"]),
    ],
)
def test_json(content: str, field: str | None, documents: list[str], tmp_path: Path) -> None:
    assert read_documents(f"json:{write(tmp_path / 'a.json', content)}", field) == documents


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        ('["a",\n "b"\n "c"]', None, r"a.json, line 3: Expecting ',' delimiter"),
        ('{"text": "a"}\n\n{"text": \n', None, r"a.json, line 3: Expecting value"),
        ('{"text": "a"}\n{"txt": "b"}', None, r"a.json, line 2 has no 'text'; it has 'txt'"),
        ('{"body": "a"}', "bodi", r"data.field: got 'bodi', .* has 'body'; did you mean 'body'"),
        ('{"body": "a", "title": "t"}', None, r"data.field: not given, .*; it has 'body', 'title'"),
        ('{"n": 1}', None, r"data.field: not given, .*; it has 'n'"),
        ('[{"text": "a"}, {"text": null}]', None, r"a.json, entry 2: got NoneType 'None', allowed a string"),
        ('["a", 7]', None, r"a.json, entry 2: got int '7', allowed a string"),
        ("12", None, r"a.json, entry 1: got int '12', allowed a string"),
        ("[]", None, "holds no text"),
    ],
)
def test_wrong_json(content: str, field: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_documents(f"json:{write(tmp_path / 'a.json', content)}", field)


TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, max_size=5
)


@given(TEXTS)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "round.json"
    assert read_documents(f"json:{write(path, json.dumps(texts))}") == texts
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    assert read_documents(f"json:{write(path, lines)}") == texts


# csv


@given(TEXTS)
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "round.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "text"])
        table.writerows([number, text] for number, text in enumerate(texts))
    assert read_documents(f"csv:{path}") == texts


@pytest.mark.parametrize(
    ("content", "field", "documents"),
    [
        ('text,n\n"a, ""b""\nc",1\n\nd,2\n', None, ['a, "b"\nc', "d"]),
        ("n,review\n1,a\n2.5e3,b\n", None, ["a", "b"]),
        ("title,review\nt,a\n", "review", ["a"]),
        ("text\nnan\nNA\n", None, ["nan", "NA"]),
        ("n,review\n1,a\n,b\n", None, ["a", "b"]),
    ],
)
def test_csv(content: str, field: str | None, documents: list[str], tmp_path: Path) -> None:
    assert read_documents(f"csv:{write(tmp_path / 'a.csv', content)}", field) == documents


def test_csv_with_a_long_text_leaves_the_limit_alone(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert read_documents(f"csv:{write(tmp_path / 'a.csv', 'text' + chr(10) + 'x' * (2 * limit))}") == [
        "x" * (2 * limit)
    ]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        ("n,text\n1,a\n2\n", None, r"a.csv, line 3: got 1 cells, allowed 2 as in the header"),
        ("n,text\n1,a,b\n", None, r"a.csv, line 2: got 3 cells, allowed 2"),
        ('text\n"a" b\n', None, r"a.csv, line 2: .*expected after"),
        ("n,text\n1,a\n", "txt", r"data.field: got 'txt', .* has 'n', 'text'; did you mean 'text'"),
        ("title,review\nt,a\n", None, r"data.field: not given, .*'title', 'review'"),
        ("text,text\na,b\n", None, r"data.field: got 'text', which 2 columns"),
        ("text\n", None, "holds no text"),
    ],
)
def test_wrong_csv(content: str, field: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_documents(f"csv:{write(tmp_path / 'a.csv', content)}", field)


# hf


@pytest.fixture
def dataset_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"stars": number, "text": f"{split} {number}"} for number in range(3)]
        write(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_local_dataset(dataset_folder: Path) -> None:
    assert read_documents(f"hf:{dataset_folder}") == ["test 0", "test 1", "test 2"]
    assert read_documents(f"hf:{dataset_folder}", split="train[:2]") == ["train 0", "train 1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, r"split 'tset' of hf:.*Unknown split \"tset\". Should be one of \['train', 'test'\]"),
        ({"field": "txet"}, r"data.field: got 'txet', .* has 'stars', 'text'; did you mean 'text'"),
        ({"field": "stars"}, r"row 0: got int '0', allowed a string"),
    ],
)
def test_wrong_dataset_options(dataset_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_documents(f"hf:{dataset_folder}", **options)


def test_saved_datasets(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"review": ["a", " ", "b"], "stars": [1, 2, 3]})
    table.save_to_disk(tmp_path / "one")
    assert read_documents(f"hf:{tmp_path}/one") == ["a", "b"]
    datasets.DatasetDict(test=table).save_to_disk(tmp_path / "several")
    assert read_documents(f"hf:{tmp_path}/several") == ["a", "b"]
    with pytest.raises(UsageError, match=r"data.split: got 'tset', hf:.* has 'test'; did you mean 'test'"):
        read_documents(f"hf:{tmp_path}/several", split="tset")


def test_broken_dataset_file(dataset_folder: Path) -> None:
    write(dataset_folder / "test.jsonl", '{"text": "a"}\n{"text": \n')
    with pytest.raises(UsageError, match=r"cannot read split 'test' of hf:.*: \w+: \S"):
        read_documents(f"hf:{dataset_folder}")


def test_missing_datasets(tmp_path: Path) -> None:
    with pytest.raises(MissingResourceError, match="but there is no folder /no/such/dataset"):
        read_documents("hf:/no/such/dataset")
    (tmp_path / "void").mkdir()
    with pytest.raises(MissingResourceError, match=r"cannot read hf:.*void"):
        read_documents(f"hf:{tmp_path}/void")


def test_hub_dataset_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        MissingResourceError, match=r"the hub cannot be reached \(ConnectError.*HF_HUB_OFFLINE=1"
    ) as caught:
        read_documents("hf:owner/name")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"data.source: got 'two words', which cannot be the name of a dataset"):
        read_documents("hf:two words")


def test_hub_dataset_in_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingResourceError, match="cannot read hf:owner/name: "):
        read_documents("hf:owner/name")
