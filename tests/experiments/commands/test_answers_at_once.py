"""Commands load heavy libraries only where they need them: a fresh process says what it has imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    *("torch", "transformers", "datasets", "safetensors", "numpy", "scipy", "pandas", "pyarrow"),
    *("matplotlib", "jinja2", "jsonargparse"),
)

ASK = f"""
import sys
from experiments.command_line import main
status = main(sys.argv[1:])
print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules))
sys.exit(status)
"""


def loaded_by(*arguments: str, status: int = 0) -> tuple[str, set[str]]:
    """Return what a command printed and which heavy libraries its process has loaded."""
    done = subprocess.run([sys.executable, "-c", ASK, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    printed, _, names = done.stdout.rpartition("loaded:")
    return printed + done.stderr, set(names.split())


@pytest.mark.parametrize("what", ["locations", "sources", "fields", "kinds", "formats", "families", "launchers"])
def test_lists_of_tables_load_nothing_heavy(what: str) -> None:
    printed, heavy = loaded_by("--list", what)
    assert printed
    assert not heavy


def test_the_version_is_printed_at_once() -> None:
    printed, heavy = loaded_by("--version")
    assert printed.startswith("attention-fault-injection ")
    assert not heavy


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stats"], "did you mean 'status'"),
        (["--fault.locaton", "q"], "did you mean 'fault.location'"),
        (["--lst", "fields"], "no such field"),
        (["--detect.detectors", "[ful]"], "did you mean 'full'"),
    ],
)
def test_what_is_mistyped_is_refused_at_once(arguments: list[str], said: str) -> None:
    printed, heavy = loaded_by(*arguments, status=2)
    assert said in printed
    assert not heavy


def test_a_dry_run_of_the_default_campaign_loads_nothing_heavy() -> None:
    printed, heavy = loaded_by("--dry-run")
    assert "nothing was written" in printed
    assert not heavy


def test_a_size_for_a_given_population_needs_no_model() -> None:
    printed, heavy = loaded_by("plan-size", "--margin", "0.01", "--confidence", "0.95", "--population", "1000000")
    assert "9513 runs" in printed
    assert heavy <= {"numpy", "scipy"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small campaign that is done."""
    output = tmp_path_factory.mktemp("campaigns")
    options = ["--name", "small", "--output_dir", str(output), "--data.num_samples", "1", "--data.seq_len", "16"]
    options += ["--sweep.fault.location", "scores,weights", "--sweep.fault.bit", "0,30", "--detect.detectors", "[lite]"]
    loaded_by(*options, "--quiet")
    return output / "small"


def test_looking_at_a_campaign_loads_what_reads_its_tables(finished: Path) -> None:
    printed, heavy = loaded_by("status", str(finished))
    assert "16 of 16 runs done" in printed
    assert not heavy
    printed, heavy = loaded_by("export", str(finished))
    assert "16 rows" in printed
    assert heavy <= {"numpy", "pyarrow", "pandas"}


def test_a_merge_needs_no_model(finished: Path) -> None:
    printed, heavy = loaded_by("merge", str(finished))
    assert "16 of 16 runs" in printed
    assert heavy <= {"numpy", "scipy", "pandas", "pyarrow"}


def test_a_report_draws_without_a_model(finished: Path) -> None:
    _, heavy = loaded_by("report", str(finished))
    assert not heavy & {"torch", "transformers", "datasets"}
