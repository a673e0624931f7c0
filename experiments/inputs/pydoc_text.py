"""English text that ships with every Python: the topics of CPython's ``pydoc_data``, split for training and testing.

The language reference that ``help("topics")`` shows is some 450 kB of prose and code. It needs no download and no
licence except Python's. The reference models are trained on nine tenths of it, and campaigns measure on the rest. A
hash of a topic's name decides its side, so the split is the same on every Python, even though the texts differ a
little.

>>> is_held_out("formatstrings"), is_held_out("lambda")
(True, False)
>>> set(training_topics()) & set(held_out_topics())
set()
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

# Of the classes of names with about a tenth of the text, this one shares the least text with the other nine.
_HELD_OUT_CLASS = 8
_CLASSES = 10


def is_held_out(topic: str) -> bool:
    """Return whether the topic of this name belongs to the held-out tenth; only the name decides."""
    digest = hashlib.sha256(topic.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % _CLASSES == _HELD_OUT_CLASS


def held_out_topics() -> dict[str, str]:
    """Return the held-out topics, name to text, in the order of their names.

    Raises:
        MissingResourceError: This Python was installed without ``pydoc_data``.
    """
    return {name: text for name, text in _all_topics().items() if is_held_out(name)}


def training_topics() -> dict[str, str]:
    """Return the training topics, name to text, in the order of their names, without held-out text.

    Topics quote each other (``specialnames`` contains all of ``customization``), so a split by name alone would train
    the model on its test text. Therefore paragraphs that also occur in a held-out topic are left out.

    Raises:
        MissingResourceError: This Python was installed without ``pydoc_data``.
    """
    training = {name: text for name, text in _all_topics().items() if not is_held_out(name)}
    return without_shared_paragraphs(training, held_out_topics().values())


def without_shared_paragraphs(documents: Mapping[str, str], others: Iterable[str]) -> dict[str, str]:
    r"""Return ``documents`` without the paragraphs that also occur in ``others``, apart from white space.

    Paragraphs end at a blank line. A document without any paragraph left is dropped.

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
        # Imported late, because that module imports torch, which reading a text does not need.
        from experiments.errors import MissingResourceError

        raise MissingResourceError(
            "pydoc_data.topics: not installed with this Python; needed for the text of its language reference"
            " (Debian and Ubuntu have it in libpython3-stdlib)"
        ) from error
    return dict(sorted(topics.items()))
