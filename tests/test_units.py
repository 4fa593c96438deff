"""How numbers are printed."""

import math

from gqa_scaling.units import byte_size, count, duration, quantity


def test_quantities():
    values = (0, 999, 1234, 999_700, 1_234_567, 123_456_789, 1.2e9, 999.9e9, 2.5e18, math.inf)
    told = "0, 999, 1.23k, 1.00M, 1.23M, 123M, 1.20G, 1.00T, 2.5e+18, out of reach"
    assert ", ".join(map(quantity, values)) == told


def test_one_is_no_plural():
    told = [count(n, "run") for n in (0, 1, 2, 1680)]
    assert told == ["0 runs", "1 run", "2 runs", "1,680 runs"]


def test_sizes_in_bytes():
    values = (0, 1023, 1536, 1010 * 2**20, 1023.9 * 2**20, 141 * 2**30, 3 * 2**40)
    told = "0 B, 1023 B, 1.50 KiB, 1010 MiB, 1.00 GiB, 141 GiB, 3.00 TiB"
    assert ", ".join(map(byte_size, values)) == told


def test_durations():
    values = (0.2, 89.4, 89.6, 119.7, 3599.7, 5400, 26_400, 1_047_600)
    told = "0 s, 89 s, 1 min 30 s, 2 min 0 s, 60 min 0 s, 1 h 30 min, 7 h 20 min, 12 d 3 h"
    assert ", ".join(map(duration, values)) == told
