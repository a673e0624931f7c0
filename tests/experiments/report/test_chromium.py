"""The report in a browser: silent, self-contained, with tables that sort, and a hostile name that is a text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from report_campaign import HOSTILE, Page, few_figures, make_campaign

from experiments.command_line import main
from experiments.tables.csv_file import write_text

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on this machine"
)

SORTING = """
<script>
const table = document.querySelector("#table-outcomes");
const button = [...table.querySelectorAll("th button")].find((one) => one.textContent === "detected");
const heading = button.closest("th");
const column = heading.cellIndex;
const shown = () => [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.value).join(" ");
const seen = [heading.getAttribute("aria-sort"), shown()];
button.focus();
for (const _ of [1, 2]) {
  document.activeElement.click();
  seen.push(heading.getAttribute("aria-sort"), shown());
}
const result = document.createElement("pre");
result.id = "seen";
result.textContent = JSON.stringify(seen);
document.body.append(result);
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_campaign(tmp_path_factory.mktemp("browser"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_figures(monkeypatch)
        assert main(["report", str(folder)]) == 0
    return folder / "report.html"


def browse(path: Path, profile: Path, *options: str) -> tuple[str, str]:
    """Return the page's elements after its scripts have run, and what the browser said."""
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", *options, "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def test_the_console_is_silent_and_nothing_pops_up(report: Path, tmp_path: Path) -> None:
    dom, log = browse(report, tmp_path)
    assert "CONSOLE" not in log
    page = Page(dom)
    assert HOSTILE in page.text
    assert len(page.scripts) == 2
    assert "<button" in dom


def test_a_script_that_is_not_ours_is_refused(report: Path, tmp_path: Path) -> None:
    # What makes the silence above say something: the policy does speak up.
    evil = "<script>document.title = 'taken over'</script></body>"
    path = tmp_path / "evil.html"
    write_text(path, report.read_text(encoding="utf-8").replace("</body>", evil))
    dom, log = browse(path, tmp_path / "profile")
    assert "CONSOLE" in log
    assert "Content Security Policy" in log
    assert "<title>taken over" not in dom


def test_tables_sort_by_number_and_say_how(report: Path, tmp_path: Path) -> None:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    path = tmp_path / "sorting.html"
    write_text(path, text.replace("</body>", SORTING + "</body>"))
    dom, log = browse(path, tmp_path / "profile")
    assert "CONSOLE" not in log
    (shown,) = re.findall(r'<pre id="seen">([^<]*)</pre>', dom)
    before, original, first, down, second, up = json.loads(unescape(shown))
    values = [float(value) for value in original.split()]
    assert (before, first, second) == ("none", "descending", "ascending")
    assert [float(value) for value in down.split()] == sorted(values, reverse=True)
    assert [float(value) for value in up.split()] == sorted(values)
    assert sorted(values) != values


def test_it_prints(report: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.pdf"
    browse(report, tmp_path / "profile", f"--print-to-pdf={target}")
    assert target.read_bytes().startswith(b"%PDF-")
