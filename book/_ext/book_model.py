"""What a build knows of itself and of its notebooks, and the names that its parts agree on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

CHECK_MIME = "application/vnd.ewc.check+json"
PLAY_MIME = "application/vnd.ewc.play+json"


@dataclass
class Chapter:
    """What a build knows of one executed notebook; `glued` holds its glued plain values."""

    docname: str
    title: str
    numbered: bool
    checks: list[dict[str, Any]] = field(default_factory=list)
    glued: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    peak_megabytes: float | None = None
    executed: bool = False

    @property
    def name(self) -> str:
        """Short name: the last part of the document's name."""
        return self.docname.rsplit("/", 1)[-1]


@dataclass
class Build:
    """Settings of this build, and its notebooks in the order of the table of contents."""

    scale: str
    data_source: str
    device: str
    hardware: str
    versions: dict[str, str]
    threads: int
    chapters: dict[str, Chapter] = field(default_factory=dict)


def anchor(name: str) -> str:
    """The HTML id of a check."""
    return "check-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
