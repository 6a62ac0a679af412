"""What tools/bench says about its samples: medians with intervals, as JSON, tables and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIDENCE = 0.95

Result = dict[str, Any]
"""One measured row, as it stands in the JSON."""


@dataclass(frozen=True)
class Row:
    """What is measured, and what is wanted of it."""

    name: str
    meaning: str
    unit: str
    provider: str | None = None
    """Who carries the connections of the SAN side; None where there are no connections."""
    bar: float | None = None
    judged: str = "ratio"
    """What the bar is for: "ratio" (SAN / TCP), "added" (SAN - TCP) or "san"."""
    better: str = "higher"


@dataclass
class Samples:
    """Figures of both sides in the order in which they were taken; `tcp` is None where there is nothing to compare."""

    san: list[float] = field(default_factory=list)
    tcp: list[float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """More keys for the JSON."""


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bounds of the median of whatever `values` were drawn from, without any assumption about its shape: the k-th
    smallest and the k-th largest, k as large as the binomial distribution allows. Too few values for that confidence
    (less than 6 for 95 %) give their whole range."""
    ordered = sorted(values)
    count = len(ordered)
    outside, rank = 0.0, 0
    while rank < count // 2:
        outside += math.comb(count, rank) / 2**count
        if 2 * outside > 1 - confidence:
            break
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[count - rank]


def result(row: Row, samples: Samples) -> Result:
    """`ratio` is the median of the ratios of the pairs, `low` and `high` bound it; without a TCP side they bound `san`.
    `tcp` and `san` are medians."""
    tcp, san = samples.tcp, samples.san
    judged: dict[str, float | None] = {"san": statistics.median(san), "ratio": None, "added": None}
    out: Result = {"name": row.name, "provider": row.provider, "ratio": None}
    if tcp is None:
        out["low"], out["high"] = median_interval(san)
    else:
        pairs = list(zip(san, tcp, strict=True))
        added = [one - other for one, other in pairs]
        judged["added"] = statistics.median(added)
        if all(tcp):
            ratios = [one / other for one, other in pairs]
            out["ratio"] = judged["ratio"] = statistics.median(ratios)
            out["low"], out["high"] = median_interval(ratios)
        else:
            out["low"] = out["high"] = None
        if row.judged == "added":
            out["added"] = judged["added"]
            out["added_low"], out["added_high"] = median_interval(added)
    out |= {
        "tcp": None if tcp is None else statistics.median(tcp),
        "san": judged["san"],
        "unit": row.unit,
        "pairs": len(san),
        "judged": row.judged,
        "better": row.better,
        "bar": row.bar,
        "met": None if row.bar is None else meets(judged[row.judged], row.bar, row.better),
        "meaning": row.meaning,
    }
    return out | samples.extra


def meets(value: float | None, bar: float, better: str) -> bool:
    return value is not None and (value >= bar if better == "higher" else value <= bar)


# ---- tables


def number(value: float | None) -> str:
    if value is None:
        return ""
    if value == int(value) and abs(value) < 100:
        return str(int(value))
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def judged(one: Result) -> str:
    """The figure that the bar is for, with its interval."""
    if one["judged"] == "added":
        low, high = one["added_low"], one["added_high"]
        text = f"{one['added']:+.3g}" if abs(one["added"]) < 100 else f"{one['added']:+,.0f}"
    elif one["ratio"] is not None:
        low, high = one["low"], one["high"]
        text = f"x{one['ratio']:.2f}"
    else:
        low, high = one["low"], one["high"]
        text = number(one["san"])
    if low == high or low is None:
        return text
    return f"{text} [{_bound(low, one)}, {_bound(high, one)}]"


def _bound(value: float, one: Result) -> str:
    return f"{value:.2f}" if one["judged"] == "ratio" and one["ratio"] is not None else number(value)


def bar(one: Result) -> str:
    if one["bar"] is None:
        return ""
    text = f"{one['bar']:.2f}" if one["judged"] == "ratio" else number(one["bar"])
    return f"{'>=' if one['better'] == 'higher' else '<='} {text}"


def verdict(one: Result) -> str:
    return {None: "", True: "met", False: "MISSED"}[one["met"]]


HEAD = ("row", "unit", "TCP", "SAN", "SAN / TCP [95 %]", "bar", "")


def text_table(results: Iterable[Result]) -> str:
    lines = [HEAD]
    for one in results:
        lines.append(
            (one["name"], one["unit"], number(one["tcp"]), number(one["san"]), judged(one), bar(one), verdict(one))
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 1 < column < 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(results: Sequence[Result]) -> str:
    """For the README. Rows of one unit that differ in their last word only, and are met, share a line."""
    lines = ["| | unit | TCP | SAN | ratio or difference, 95 % interval | bar |", "|---|---|---:|---:|---|---|"]
    for group in _groups(results):
        first = group[0]
        if len(group) == 1:
            cells = [first["meaning"], first["unit"], number(first["tcp"]), number(first["san"]), judged(first)]
        else:
            words = ", ".join(f"`{one['call']}`" for one in group)
            meaning = first["meaning"].replace(f"`{first['call']}`", words)
            values = sorted(one["added"] for one in group)
            spread = f"{values[0]:+g}" if values[0] == values[-1] else f"{values[0]:+g} to {values[-1]:+g}"
            cells = [meaning, first["unit"], "", "", spread]
        missed = "" if first["met"] is not False else ", missed"
        lines.append("| " + " | ".join([*cells, bar(first) + missed]) + " |")
    return "\n".join(lines)


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    groups: dict[str, list[Result]] = {}
    for one in results:
        shared = one.get("call") and one["met"]
        key = f"{one['name'].rpartition('-')[0]}-*" if shared else one["name"]
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def machine_text(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['cpus']} CPUs ({machine['cpu_model']}), Linux {machine['kernel']}, {machine['libc']}, "
        f"Python {machine['python']}; TCP with {machine['congestion_control'] or 'unknown'}; "
        f"net.core.wmem_max {machine['wmem_max']}; load before {machine['load_before']:.2f}; "
        f"cache line between CPUs {' and '.join(f'{ns:.0f}' for ns in machine['cache_line_ns']) or 'not measured'} ns"
    )


# ---- plot


def plot(results: Sequence[Result], file: Path, title: str) -> None:
    """Bars of the ratios with their intervals, and marks at the bars. Raises ImportError, OSError, ValueError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [one for one in results if one["judged"] == "ratio" and one["ratio"] is not None][::-1]
    colours = {None: "tab:gray", True: "tab:green", False: "tab:red"}
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.4 * len(shown)), layout="constrained")
    for place, one in enumerate(shown):
        spread = [[one["ratio"] - one["low"]], [one["high"] - one["ratio"]]]
        axes.barh(place, one["ratio"], xerr=spread, color=colours[one["met"]], alpha=0.7, capsize=3, height=0.6)
        if one["bar"] is not None:
            axes.plot([one["bar"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    names = [f"{one['name']} ({one['unit']}{', lower is better' if one['better'] == 'lower' else ''})" for one in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.set_xlim(left=0)
    axes.set_xlabel("SAN / TCP: median of the pairs with 95 % interval; black mark: the bar")
    axes.set_title(title, fontsize="small", wrap=True)
    figure.savefig(file)
    pyplot.close(figure)
