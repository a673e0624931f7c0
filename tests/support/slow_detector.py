"""A detector that makes runs take as long as a test wants, so that what disturbs them is never too late.

detector = SlowDetector.make(folder)
detector.takes(0.25)                       # seconds a tensor, from now on, in every process
main([*arguments, detector.option])
detector.takes(0)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SOURCE = '''
"""A detector that finds nothing, as slowly as a file says, and that fails once for each file that says so."""
import time
from pathlib import Path
import torch
from bounds import Detector
from bounds.core.row_check import RowCheck, judged

PLACE = Path(__file__).parent

class Slow(Detector):
    name, needs, statement, cost = "slow", frozenset({"out"}), "nothing", "1"

    def judge(self, state, baseline):
        try:
            time.sleep(float((PLACE / "slow").read_text()))
        except FileNotFoundError:
            pass
        try:
            (PLACE / "fail").unlink()
        except FileNotFoundError:
            pass
        else:
            raise ArithmeticError("as the test wants it")
        largest = state.out.abs().amax(-1).double()
        return judged(self.name, RowCheck(largest, torch.full_like(largest, 1e30)), allowance=self.tolerance)
'''


@dataclass(frozen=True)
class SlowDetector:
    """The detector in ``slow.py`` of a folder, and the files there that tell it what to do."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> SlowDetector:
        (root / "slow.py").write_text(SOURCE)
        return cls(root)

    @property
    def option(self) -> str:
        return f"--detect.detectors=[lite, '{self.root / 'slow.py'}:Slow']"

    def takes(self, seconds: float) -> None:
        """Let it take so long for a tensor; 0: no time."""
        path = self.root / "slow"
        if not seconds:
            path.unlink(missing_ok=True)
            return
        written = path.with_suffix(".tmp")
        written.write_text(str(seconds))
        written.replace(path)

    def fails_once(self) -> None:
        """Let it raise at the next tensor, in whatever process that is."""
        (self.root / "fail").touch()

    @property
    def has_failed(self) -> bool:
        """Whether it has raised since ``fails_once``."""
        return not (self.root / "fail").exists()
