"""What the tests of recipes share: run the command on a micro campaign, and read what it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from micro_campaign import MicroPlace

from experiments.command_line import main

FEW = {"data.num_samples": "2", "num_runs": "2", "detect.detectors": "[lite]", "fault.location": "scores"}


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MicroPlace]:
    with MicroPlace.entered(tmp_path_factory.mktemp("micro")) as entered:
        yield entered


@pytest.fixture
def listed(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Return ``listed(word)``: what ``--list word`` prints."""

    def run(word: str) -> str:
        capsys.readouterr()
        assert main(["--list", word]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def campaign(micro: MicroPlace, tmp_path: Path) -> Callable[..., Path]:
    """Return ``campaign(*options)``: the folder of a campaign of a few runs with these options."""

    def run(*options: str, name: str = "micro") -> Path:
        more = list(options)
        given = {option.lstrip("-").removeprefix("sweep.") for option in options if option.startswith("--")}
        for key, value in FEW.items():
            more += [] if key in given else [f"--{key}", value]
        assert main([*micro.arguments(tmp_path / "out", *more, name=name), "--quiet"]) == 0
        return tmp_path / "out" / name

    return run


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Return ``page(folder)``: the report of a campaign as text of HTML, without the figures that are built in."""

    def report(folder: Path) -> str:
        from experiments.report import gallery

        own = {name: entry for name, entry in gallery.FIGURES.items() if not entry.where.startswith("experiments.")}
        monkeypatch.setattr(gallery, "FIGURES", own)
        assert main(["report", str(folder)]) == 0
        return (folder / "report.html").read_text(encoding="utf-8")

    return report


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return ``toy(name, text)``: write a module that can be imported in this test."""

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")

    monkeypatch.syspath_prepend(tmp_path)
    return write
