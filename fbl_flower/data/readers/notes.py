"""What a reader passed over or decided, counted, for one line in the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath

SEVERAL_FRAMES = "with several frames or pages, of which the first is used"
TRAILING_DATA = "with data behind their end, which is ignored"
ALL_TRANSPARENT = "transparent everywhere, of which only data.background is left"


class Notes:
    """Counts files that were not read, and images with something a user should know."""

    def __init__(self) -> None:
        self._passed_over: Counter[str] = Counter()
        self._images: dict[str, list[str]] = {}
        self._other: list[str] = []

    def pass_over(self, entries: Iterable[PurePath], *, remark: str = "") -> None:
        """Count files that are not read, by kind."""
        for entry in entries:
            kind = "hidden" if is_hidden(entry) else entry.suffix.lower() or "without an ending"
            self._passed_over[kind + remark] += 1

    def image(self, remark: str, where: str) -> None:
        """Note something about one image."""
        self._images.setdefault(remark, []).append(where)

    def say(self, text: str) -> None:
        """Note a decision about the data set."""
        self._other.append(text)

    def lines(self) -> tuple[str, ...]:
        """Return all notes, one for each kind."""
        found = list(self._other)
        if self._passed_over:
            kinds = [f"{number} {kind}" for kind, number in sorted(self._passed_over.items(), key=lambda kv: (-kv[1], kv[0]))]
            found.append(f"files passed over: {', '.join(kinds)}")
        for remark, where in self._images.items():
            found.append(f"images {remark}: {len(where)}, such as {where[0]}")
        return tuple(found)


def is_hidden(entry: PurePath) -> bool:
    """Tell whether a name is hidden, or is left by unpacking on macOS or by network storage."""
    return entry.name.startswith(".") or entry.name in ("__MACOSX", "@eaDir")
