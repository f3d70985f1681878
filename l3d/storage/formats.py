"""Format numbers for people: percentages, durations, sizes and figures."""

import math


def percent(fraction: float) -> str:
    """Return a fraction as a percentage with at most three significant figures."""
    if not math.isfinite(fraction):
        return "not finite"
    if 0 < abs(fraction) < 1e-5:
        return "<\u00a00.001\u00a0%"
    return f"{100 * fraction:{',.0f' if abs(fraction) >= 0.9995 else '.3g'}}\u00a0%"


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes and seconds, or hours and minutes."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(n_bytes: float) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{n_bytes / 2**30:.3g} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.3g} MiB"


def figure(value: float | None) -> str:
    """Return a number with three significant figures, for a table's cell; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:.2e}"
