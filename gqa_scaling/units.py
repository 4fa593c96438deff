"""Quantities as people read them. Every table and message prints numbers through these."""

import math


def quantity(value: float) -> str:
    """Three significant digits with an SI prefix, such as 1.69G; the unit stands beside it."""
    if not math.isfinite(value):
        return "out of reach" if value > 0 else "-"
    if abs(value) >= 1e18:
        return f"{value:.3g}"
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{prefix}"
    return f"{value:.3g}"


def count(number: int, what: str) -> str:
    """How many of something: 1 run, 2 runs, 1,680 runs."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def byte_size(value: float) -> str:
    """Bytes with a binary prefix, such as 1.50 GiB."""
    for size, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.2f} {prefix}" if scaled < 99.5 else f"{scaled:.0f} {prefix}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 7 h 20 min, 12 d 3 h."""
    if not math.isfinite(seconds):
        return "never"
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    if seconds < 5400:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
