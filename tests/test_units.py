"""How numbers are printed."""

import pytest

from gqa_scaling.units import byte_size, duration, quantity


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1234, "1.23k"),
        (999_700, "1.00M"),
        (1_234_567, "1.23M"),
        (123_456_789, "123M"),
        (1.2e9, "1.20G"),
        (999.9e9, "1.00T"),
        (2.5e18, "2.5e+18"),
        (float("inf"), "out of reach"),
    ],
)
def test_quantity(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1023.9 * 2**20, "1.00 GiB"),
        (1536, "1.50 KiB"),
        (1010 * 2**20, "1010 MiB"),
        (141 * 2**30, "141 GiB"),
        (3 * 2**40, "3.00 TiB"),
    ],
)
def test_byte_size(value, text):
    assert byte_size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (89.4, "89 s"),
        (89.6, "1 min 30 s"),
        (119.7, "2 min 0 s"),
        (3599.7, "60 min 0 s"),
        (5400, "1 h 30 min"),
        (26_400, "7 h 20 min"),
        (1_047_600, "12 d 3 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
