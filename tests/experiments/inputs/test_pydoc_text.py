"""The split of Python's own documentation: by name, disjoint in text, cheap to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments.errors import MissingResourceError
from experiments.inputs.pydoc_text import (
    held_out_topics,
    is_held_out,
    text_bytes,
    training_topics,
    without_shared_paragraphs,
)


def paragraphs(text: str) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")} - {""}


def test_names_decide_the_side_for_ever() -> None:
    held_out = {"assignment", "atom-literals", "break", "conversions", "formatstrings", "raise", "yield"}
    training = {"specialnames", "compound", "types", "string-methods", "typesseq", "lambda", "if", "class"}
    assert {name for name in held_out | training if is_held_out(name)} == held_out


def test_sides_are_disjoint_ordered_and_cover_every_topic() -> None:
    from pydoc_data.topics import topics

    training, held_out = training_topics(), held_out_topics()
    assert set(training) | set(held_out) == set(topics)
    assert not set(training) & set(held_out)
    assert list(training) == sorted(training)
    assert list(held_out) == sorted(held_out)
    assert all(text == topics[name] for name, text in held_out.items())


def test_no_paragraph_stands_on_both_sides() -> None:
    training = set().union(*map(paragraphs, training_topics().values()))
    held_out = set().union(*map(paragraphs, held_out_topics().values()))
    assert len(held_out) > 100
    assert not training & held_out


def test_held_out_text_is_about_a_tenth() -> None:
    held_out, training = text_bytes(held_out_topics()), text_bytes(training_topics())
    assert 0.06 < held_out / (held_out + training) < 0.15
    assert training > 300_000


def test_text_bytes_counts_utf8() -> None:
    assert text_bytes({"a": "é", "b": "xy"}) == 4


def test_shared_paragraphs_go_and_white_space_does_not_hide_them() -> None:
    documents = {"quotes": "kept\n\n   a b\n   c\n\nalso kept", "only": "a  b c"}
    assert without_shared_paragraphs(documents, ["x\n\na b c"]) == {"quotes": "kept\n\nalso kept"}


def test_absent_documentation_is_a_missing_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(MissingResourceError, match=r"pydoc_data\.topics: not installed with this Python"):
        held_out_topics()


def test_imports_without_torch() -> None:
    code = "import sys, experiments.inputs.pydoc_text as text; text.held_out_topics(); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
