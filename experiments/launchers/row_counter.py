"""Count the rows of a campaign's shards while workers write them, without reading any row twice.

counter = RowCounter(folder)
counter.count()          # finished runs, plus runs that failed since the counter was made
"""

from __future__ import annotations

from pathlib import Path

from experiments.campaign.folder import CampaignFolder


class RowCounter:
    """Counts complete rows without headers: all finished runs, and the failures since the counter was made."""

    def __init__(self, folder: CampaignFolder) -> None:
        self._folder = folder
        self._seen: dict[Path, tuple[int, int, int, int]] = {}
        self._failures_before = self._all_rows(".failures")

    def count(self) -> int:
        """Return the number of rows now."""
        return self._all_rows("") + max(0, self._all_rows(".failures") - self._failures_before)

    def _all_rows(self, suffix: str) -> int:
        return sum(self._rows(path) for path in self._folder.shard_files(suffix))

    def _rows(self, path: Path) -> int:
        try:
            with path.open("rb") as stream:
                found = path.stat()
                inode, offset, quotes, rows = self._seen.get(path, (found.st_ino, 0, 0, 0))
                if inode != found.st_ino or found.st_size < offset:
                    offset = quotes = rows = 0
                stream.seek(offset)
                # A newline inside a quoted cell ends no row.
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    offset += len(line)
                    quotes += line.count(b'"')
                    rows += quotes % 2 == 0
        except FileNotFoundError:
            return 0
        self._seen[path] = (found.st_ino, offset, quotes, rows)
        return max(0, rows - 1)
