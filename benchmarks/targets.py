"""Figures that we want to reach, and whether a measurement reached them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.measure import Row


@dataclass(frozen=True)
class Target:
    """A bound for a figure of ours.

    figure: "speed", the time of the fastest contender of `than` over ours, at least `bound`; "memory", our peak over
    the least of theirs, at most; "ceiling", the share of the ceiling that we reach, at least; "seconds" that all the
    work takes of which the case measures a part, at most.
    than: how the labels of those contenders begin, as "sdpa" or "transformers"; some may be absent.
    """

    figure: str
    bound: float
    than: tuple[str, ...] = ()

    def __str__(self) -> str:
        others = ", ".join(self.than)
        return {
            "speed": f"at least {self.bound:g}x the speed of {others}",
            "memory": f"at most {self.bound:g}x the memory of {others}",
            "ceiling": f"at least {self.bound:.0%} of the ceiling",
            "seconds": f"all of it in at most {self.bound:g} s",
        }[self.figure]

    def judge(self, own: Row | None, others: Iterable[Row], parts: float = 1.0) -> str:
        """The target, what was measured, and the verdict "met", "not met" or "not measured".

        own: None if there is none. parts: the work of how many calls is all of it.
        """
        value = self._value(own, list(others), parts) if own else None
        if value is None:
            return f"{self}: not measured"
        met = value <= self.bound if self.figure in ("memory", "seconds") else value >= self.bound
        shown = f"{value:.0%}" if self.figure == "ceiling" else f"{value:.3g}"
        return f"{self}: {shown}, {'met' if met else 'not met'}"

    def _value(self, own: Row, others: list[Row], parts: float) -> float | None:
        if self.figure == "ceiling":
            return own.ceiling
        if self.figure == "seconds":
            return own.ms_p50 / 1e3 * parts
        peers = [row for row in others if row.contender.startswith(self.than) and row.ms_p50]
        if not peers:
            return None
        if self.figure == "speed":
            return min(row.ratio_p50 for row in peers)
        least = min(row.peak_mib or 0.0 for row in peers)
        return own.peak_mib / least if least else None
