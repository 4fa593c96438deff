"""How numbers are printed."""

import pytest

from gqa_scaling.units import byte_size, duration, quantity


@pytest.mark.parametrize(
    ("printed", "value", "text"),
    [
        (quantity, 0, "0"),
        (quantity, 999, "999"),
        (quantity, 1234, "1.23k"),
        (quantity, 999_700, "1.00M"),
        (quantity, 1_234_567, "1.23M"),
        (quantity, 123_456_789, "123M"),
        (quantity, 1.2e9, "1.20G"),
        (quantity, 999.9e9, "1.00T"),
        (quantity, 2.5e18, "2.5e+18"),
        (quantity, float("inf"), "out of reach"),
        (byte_size, 0, "0 B"),
        (byte_size, 1023, "1023 B"),
        (byte_size, 1023.9 * 2**20, "1.00 GiB"),
        (byte_size, 1536, "1.50 KiB"),
        (byte_size, 1010 * 2**20, "1010 MiB"),
        (byte_size, 141 * 2**30, "141 GiB"),
        (byte_size, 3 * 2**40, "3.00 TiB"),
        (duration, 0.2, "0 s"),
        (duration, 89.4, "89 s"),
        (duration, 89.6, "1 min 30 s"),
        (duration, 119.7, "2 min 0 s"),
        (duration, 3599.7, "60 min 0 s"),
        (duration, 5400, "1 h 30 min"),
        (duration, 26_400, "7 h 20 min"),
        (duration, 1_047_600, "12 d 3 h"),
    ],
)
def test_what_people_read(printed, value, text):
    assert printed(value) == text
