"""Programs that answer like Slurm's, for tests of what is asked and of what is made of the answers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class FakeSlurm:
    """A folder of programs to be put first in ``PATH``; each notes how it was called."""

    folder: Path

    @classmethod
    def alone(cls, folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
        """Make the folder and let ``PATH`` name it and nothing else: a Slurm of this machine is not found."""
        folder.mkdir()
        (folder / "cat").symlink_to(str(shutil.which("cat")))
        monkeypatch.setenv("PATH", str(folder))
        return cls(folder)

    def program(self, name: str, says: str = "", *, complains: str = "", status: int = 0) -> None:
        path = self.folder / name
        (self.folder / f"{name}.says").write_text(says)
        (self.folder / f"{name}.complains").write_text(complains)
        path.write_text(
            f'#!/bin/sh\necho "$@" >>"{path}.calls"\ncat "{path}.says"\ncat "{path}.complains" >&2\nexit {status}\n'
        )
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []
