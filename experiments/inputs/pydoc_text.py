"""English text that every Python carries: the topics of CPython's own ``pydoc_data``, split for training and testing.

The language reference that ``help("topics")`` shows is some 450 kB of prose and code, needs no download and no
licence but Python's. The reference models are trained on nine tenths of it and campaigns measure on the rest. A
topic's side is a hash of its name, so the split means the same on every Python, whose texts differ a little.

Public names: ``training_topics``, ``held_out_topics``, ``is_held_out``, ``text_bytes``.

>>> is_held_out("formatstrings"), is_held_out("lambda")
(True, False)
>>> set(training_topics()) & set(held_out_topics())
set()
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

# Of the ten classes of names this one shares the least text with the other nine among those of about a tenth.
_HELD_OUT_CLASS = 8
_CLASSES = 10


def is_held_out(topic: str) -> bool:
    """Say whether the topic of this name belongs to the held-out tenth; decided by the name alone."""
    digest = hashlib.sha256(topic.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % _CLASSES == _HELD_OUT_CLASS


def held_out_topics() -> dict[str, str]:
    """Return the held-out topics, name to text, in the order of their names.

    Raises:
        MissingResourceError: This Python was installed without ``pydoc_data``.
    """
    return {name: text for name, text in _all_topics().items() if is_held_out(name)}


def training_topics() -> dict[str, str]:
    """Return the training topics, name to text, in the order of their names, cleaned of held-out text.

    Topics quote each other (``specialnames`` holds all of ``customization``), so a split by name alone would show
    the model what it is tested on: paragraphs that also stand in a held-out topic are left out.

    Raises:
        MissingResourceError: This Python was installed without ``pydoc_data``.
    """
    training = {name: text for name, text in _all_topics().items() if not is_held_out(name)}
    return without_shared_paragraphs(training, held_out_topics().values())


def without_shared_paragraphs(documents: Mapping[str, str], others: Iterable[str]) -> dict[str, str]:
    r"""Return ``documents`` without the paragraphs that, white space aside, also stand in ``others``.

    Paragraphs end at a blank line. A document of which nothing is left is dropped.

    >>> without_shared_paragraphs({"a": "one\n\n  two\nthree\n\nfour", "b": "four"}, ["two three\n\nfour"])
    {'a': 'one'}
    """
    seen = {_words(paragraph) for text in others for paragraph in text.split("\n\n")}
    kept = {
        name: "\n\n".join(paragraph for paragraph in text.split("\n\n") if _words(paragraph) not in seen)
        for name, text in documents.items()
    }
    return {name: text for name, text in kept.items() if text.strip()}


def text_bytes(documents: Mapping[str, str]) -> int:
    """Return the length of all texts together, in bytes of UTF-8."""
    return sum(len(text.encode("utf-8")) for text in documents.values())


def _words(paragraph: str) -> tuple[str, ...]:
    return tuple(paragraph.split())


def _all_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        # Late, because that module brings in all of torch, which nobody needs to read a text.
        from experiments.errors import MissingResourceError

        raise MissingResourceError(
            "pydoc_data.topics: not installed with this Python; needed for the text of its language reference"
            " (Debian and Ubuntu have it in libpython3-stdlib)"
        ) from error
    return dict(sorted(topics.items()))
