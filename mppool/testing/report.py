"""What came out: which promises a driver keeps, which it breaks, and what to do about those."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Broken", "BrokenDriver", "PromiseBroken", "Report"]


@dataclass(frozen=True)
class Broken:
    """One promise that is not kept: its name, what it says, what was seen, and what to look at."""

    name: str
    promise: str
    seen: str
    advice: str

    def __str__(self) -> str:
        seen = self.seen.replace("\n", "\n      ")
        return f"{self.name}: {self.promise}\n    seen: {seen}\n    what to do: {self.advice}"


@dataclass
class Report:
    """``kept`` names the promises that were tried and hold, ``skipped`` those that do not apply (with the reason), ``broken`` the others."""

    driver: str
    kept: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.driver}: {len(self.kept)} promises kept, {len(self.broken)} broken, {len(self.skipped)} do not apply"]
        lines += [f"  broken  {broken}" for broken in self.broken]
        lines += [f"  kept    {name}" for name in self.kept]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  note    {note}" for note in self.notes]
        return "\n".join(lines)


class BrokenDriver(AssertionError):
    """The driver breaks promises; ``report`` says which."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


class PromiseBroken(Exception):
    """Raised by a check: what was seen."""


class DoesNotApply(Exception):
    """Raised by a check: why there is nothing to check."""
