"""Detectors of users: an entry of the configuration names a class, which is imported and registered.

    load_detector("my_package.my_module:MyDetector").name        # a module that Python can import
    load_detector("path/to/file.py:MyDetector").name             # a file, relative to the working directory

    class MyDetector(Detector):
        name, needs, statement, cost = "mine", frozenset({"out"}), "outputs are below 100", "d"
        def judge(self, state, baseline):
            return judged(self.name, RowCheck(state.out.abs().amax(-1).double(), torch.tensor(100.0)))

Code of the entry runs with the rights of the process: load only what you trust.

>>> is_detector_path("my_package.my_module:MyDetector"), is_detector_path("S_row")
(True, False)
>>> load_detector("bounds.finite_detector:FiniteDetector").name         # registered already: nothing happens
'finite'
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from bounds.registry import get_detector, list_detectors, register_detector
from bounds.suites import suite_names

if TYPE_CHECKING:
    from bounds.core.detector import Detector


def is_detector_path(entry: str) -> bool:
    """Return whether an entry names a class to load, not a registered detector or a suite."""
    return ":" in entry


def load_detector(path: str) -> type[Detector]:
    """Import a detector's class and register it under its name; do nothing more when it is registered already.

    Args:
        path: ``"module:Class"`` or ``"file.py:Class"``.

    Raises:
        ValueError: when the file, module or class does not exist or does not import, the class is no complete
            Detector, or its name is taken by another detector or a suite.
    """
    module_path, colon, class_name = path.rpartition(":")
    if not (colon and module_path and class_name):
        raise ValueError(f"detector: got {path!r}, allowed 'module:Class' or 'file.py:Class'")
    module = _module(path, module_path)
    detector = getattr(module, class_name, None)
    if detector is None:
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise ValueError(f"detector {path!r}: {module_path} has no class {class_name!r}{_nearest(class_name, classes)}")
    if not _is_registered(detector):
        _require_complete(path, detector)
        _register(path, detector)
    return detector


def _module(path: str, module_path: str) -> ModuleType:
    """Return the imported module, of a file or of a dotted name."""
    file = _existing_file(path, module_path) if module_path.endswith(".py") else None
    try:
        return importlib.import_module(module_path) if file is None else _file_module(file)
    except ModuleNotFoundError as error:
        if file is None and error.name is not None and f"{module_path}.".startswith(f"{error.name}."):
            raise ValueError(
                f"detector {path!r}: there is no module {error.name!r}; allowed one that Python finds, or a file .py"
            ) from error
        raise ValueError(f"detector {path!r}: {module_path} imports {error.name!r}, which is missing") from error
    except Exception as error:
        # Whatever the user's module raises on import: its own error stays visible as the cause.
        raise ValueError(f"detector {path!r}: {module_path} cannot be imported: {error!r}") from error


def _existing_file(path: str, module_path: str) -> Path:
    file = Path(module_path).expanduser().resolve()
    if not file.is_file():
        siblings = [entry.name for entry in file.parent.glob("*.py")]
        raise ValueError(f"detector {path!r}: there is no file {str(file)!r}{_nearest(file.name, siblings)}")
    return file


def _file_module(file: Path) -> ModuleType:
    """Return the module of a file, executed at most once a process so that its classes stay the same."""
    name = f"_user_detector_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, file)
    if specification is None or specification.loader is None:
        raise ImportError(f"{str(file)!r} is no Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _require_complete(path: str, detector: object) -> None:
    """Raise ValueError unless ``detector`` is a Detector class that can be used."""
    # Imported here: a configuration that names no class of a user's needs no torch.
    from bounds.core.attention_state import AttentionState
    from bounds.core.detector import Detector

    if not (inspect.isclass(detector) and issubclass(detector, Detector)):
        what = detector.__name__ if inspect.isclass(detector) else type(detector).__name__
        raise ValueError(f"detector {path!r}: got {what}, allowed a subclass of bounds.Detector")
    if detector.__abstractmethods__:
        raise ValueError(f"detector {path!r}: it does not implement {', '.join(sorted(detector.__abstractmethods__))}")
    for attribute in ("name", "statement", "cost"):
        got = getattr(detector, attribute, None)
        if not (isinstance(got, str) and got):
            raise ValueError(f"detector {path!r}: class attribute {attribute}: got {got!r}, allowed a text")
    needs = getattr(detector, "needs", None)
    if not (isinstance(needs, frozenset) and all(isinstance(name, str) for name in needs)):
        raise ValueError(f"detector {path!r}: class attribute needs: got {needs!r}, allowed a frozenset of texts")
    if "proved" not in {name for owner in detector.__mro__ if owner is not Detector for name in vars(owner)}:
        # Nobody has said that a theorem rules out false positives.
        detector.proved = False
    if detector.calibrated and detector.proved:
        raise ValueError(
            f"detector {path!r}: got calibrated and proved, allowed one: what is calibrated has no theorem"
        )
    readable = [field.name for field in fields(AttentionState) if field.init]
    for name in sorted(needs - set(readable)):
        raise ValueError(
            f"detector {path!r}: class attribute needs: got {name!r}, allowed {', '.join(readable)}"
            f"{_nearest(name, readable)}"
        )


def _is_registered(detector: object) -> bool:
    """Return whether it is in the table of built-in detectors, whose claim ``proved`` stays unchanged."""
    name = getattr(detector, "name", None)
    return name in list_detectors() and type(get_detector(name)) is detector


def _register(path: str, detector: type[Detector]) -> None:
    name = detector.name
    if is_detector_path(name) or name in suite_names():
        raise ValueError(f"detector {path!r}: its name {name!r} is that of a suite, or holds a colon; choose another")
    try:
        register_detector(detector)
    except ValueError as error:
        raise ValueError(f"detector {path!r}: {error}") from error


def _nearest(name: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
