"""Sites that are alike, put together: one row of a table for the forty blocks of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fpscompile.records import SiteRecord


@dataclass(frozen=True)
class SiteGroup:
    """Sites that are alike in all but their name: one row of a table."""

    sites: tuple[SiteRecord, ...]
    share: tuple[float, ...]
    """Share of the denoising steps that runs each of ``density``; sums to 1."""

    @property
    def first(self) -> SiteRecord:
        return self.sites[0]

    @property
    def name(self) -> str:
        """Where the sites are: their modules, or their nodes when the graph names no module."""
        return name_pattern([site.module or site.node for site in self.sites])

    @property
    def at_run_time(self) -> bool:
        """Whether windows and densities depend on a grid that only a call will tell; densities then read 1."""
        return self.first.rewritten and not self.first.windows

    @property
    def mean_density(self) -> float:
        """Mean over all steps of the kept fraction of query-key pairs."""
        return sum(share * density for share, density in zip(self.share, self.first.density, strict=True))

    @property
    def dense_flops(self) -> float:
        """FLOPs of one dense forward, all sites of the group."""
        return sum(site.dense_flops for site in self.sites)

    @property
    def kept_flops(self) -> float:
        """FLOPs of one forward, the mean over all steps."""
        return sum(share * site.kept_flops(phase) for site in self.sites for phase, share in enumerate(self.share))


def name_pattern(names: Sequence[str]) -> str:
    """One text for many names: "blocks.{0..39}.attn1" when a single number varies, else the first and the last."""
    names = list(dict.fromkeys(names))
    if len(names) == 1:
        return names[0]
    split = [re.split(r"(\d+)", name) for name in names]
    if len({len(pieces) for pieces in split}) == 1:
        varying = [index for index, column in enumerate(zip(*split, strict=True)) if len(set(column)) > 1]
        if all(index % 2 for index in varying):
            pieces = list(split[0])
            for index in varying:
                pieces[index] = "*"
            if len(varying) == 1:
                pieces[varying[0]] = _numbers(sorted(int(row[varying[0]]) for row in split))
            return "".join(pieces)
    return f"{names[0]} ... {names[-1]}"


def _numbers(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}" if len(numbers) <= 4 else "*"
