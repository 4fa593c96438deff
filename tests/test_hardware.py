"""What accelerators are called, and what they are asked for and cost."""

import dataclasses

import pytest

from gqa_scaling import cli
from gqa_scaling.config import UserError as Refused
from gqa_scaling.hardware import (
    _PRODUCTS,
    _THREADS,
    HARDWARE,
    SLICES,
    Hardware,
    changed,
    detected,
    hardware,
    hardware_of,
    measured_peak,
    slice_of,
)

CHIP = Hardware("chip", 1e12, 1e11, 2**30, 3.6, mfu=0.5, step_seconds=0.01, start_seconds=60)


def test_hardware_by_name():
    assert hardware("v5e") is HARDWARE["v5e"]
    with pytest.raises(
        Refused, match=r"unknown hardware 'h10' \(did you mean h100\?\); known: cpu"
    ):
        hardware("h10")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200 NVL", "h200-nvl"),
    ],
)
def test_hardware_by_device_kind(kind, name):
    assert detected(kind) is HARDWARE[name]


def test_an_unknown_device_is_none_and_a_cpu_is_measured(monkeypatch):
    assert detected("Some New Thing") is None
    monkeypatch.setattr("gqa_scaling.hardware.measured_peak", lambda: 5e10)
    assert detected("cpu") == dataclasses.replace(HARDWARE["cpu"], peak_flops=5e10)


def test_the_peak_of_a_cpu_is_that_of_one_thread_by_its_own_time_for_each_core(monkeypatch):
    """So that what else runs on the machine, and how many threads a library takes, do not count."""
    monkeypatch.setattr("gqa_scaling.hardware.cores", lambda: [0, 1, 2])
    monkeypatch.setattr("gqa_scaling.hardware._PRODUCTS", "print(2e10)")
    assert measured_peak.__wrapped__() == 3 * 2e10
    told = f'import os\nprint(float(all(os.environ[n] == "1" for n in {_THREADS})))'
    monkeypatch.setattr("gqa_scaling.hardware._PRODUCTS", told)
    assert measured_peak.__wrapped__() == 3
    assert "process_time" in _PRODUCTS
    assert "perf_counter" not in _PRODUCTS


def test_ones_own_mfu_and_price():
    assert changed(CHIP) == CHIP
    assert changed(CHIP, mfu=0.1, price=0.0) == dataclasses.replace(CHIP, mfu=0.1, price=0.0)
    for mfu in (0.0, 1.1, 1e-300, float("nan")):
        with pytest.raises(Refused, match=r"mfu=.* must be a number from 1e-06 to 1"):
            changed(CHIP, mfu=mfu)
    for price in (-1.0, 1e300, float("inf"), float("nan")):
        with pytest.raises(Refused, match=r"price=.* from 0 to 1e\+06 dollars an hour"):
            changed(CHIP, price=price)


# ------------------------------------------------------------------------------------ slices


@pytest.mark.parametrize(
    ("shape", "size", "chips", "hosts", "cloud_type"),
    [
        ("v5e:16x16", "v5e-256", 256, 64, "v5litepod-256"),
        ("v5e:1x1", "v5e-1", 1, 1, "v5litepod-1"),
        ("v6e:2x4", "v6e-8", 8, 1, "v6e-8"),
        ("v6e:4x4", "v6e-16", 16, 4, "v6e-16"),
        ("v5p:2x2x1", "v5p-8", 4, 1, "v5p-8"),  # counted in cores, two on each chip
        ("v5p:4x4x8", "v5p-256", 128, 32, "v5p-256"),
        ("2xv5e:16x16", "2xv5e-256", 512, 128, "v5litepod-512"),
        ("16xH100", "16xH100", 16, 2, None),
        ("2xA100", "2xA100", 2, 1, None),
    ],
)
def test_a_slice_has_two_spellings(shape, size, chips, hosts, cloud_type):
    found = slice_of(shape)
    assert slice_of(size) == found
    assert (found.name, found.vendor_name) == (shape, size)
    assert (found.chips, found.hosts, found.chips_per_host) == (chips, hosts, chips // hosts)
    assert found.is_tpu == (cloud_type is not None)
    if found.is_tpu:
        assert found.cloud_type == cloud_type


def test_every_slice_is_read_by_both_its_names():
    for name, place in SLICES.items():
        assert slice_of(place.name) == slice_of(name) == place
        assert place.kind in HARDWARE


def test_a_v5p_slice_of_an_unusual_shape_is_named_by_it():
    assert slice_of("v5p:4x4x16").chips == slice_of("v5p-512").chips == 256
    assert slice_of("v5p-512").name == "v5p:4x8x8"
    assert slice_of("v5p:16x16x24").chips == 6144


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e", r"unknown slice 'v5e' .*v5e-16, .* by their shape v5e:4x4"),
        ("v5e-17", r"unknown slice 'v5e-17' \(did you mean v5e-1"),
        ("3xH100", r"unknown slice '3xH100' \(did you mean"),
        ("2x8xH100", r"unknown slice '2x8xH100' \(did you mean 8xH100"),
        ("v5q:4x4", r"unknown TPU 'v5q'.*did you mean v5"),
        ("v5e:3x5", "no v5e slice is 3x5: it may be 1x1, 2x2"),
        ("v5e:4x4x4", "no v5e slice is 4x4x4"),
        ("v5p:16x16", "no v5p slice is 16x16: it may be 2x2x1.*multiples of 4"),
        ("v5p:8x4x4", "rising order"),
        ("0xv5e:4x4", "at least one slice"),
    ],
)
def test_slices_that_are_not(name, said):
    with pytest.raises(Refused, match=said):
        slice_of(name)


def test_hardware_may_be_named_by_a_slice():
    assert hardware_of("cpu") == (HARDWARE["cpu"], None)
    assert hardware_of("v5e-16") == hardware_of("v5e:4x4") == (HARDWARE["v5e"], 16)
    assert hardware_of("8xH100") == (HARDWARE["h100"], 8)
    for name, said in (("v5", "unknown hardware 'v5'"), ("v5e-17", "unknown slice 'v5e-17'")):
        with pytest.raises(Refused, match=said):
            hardware_of(name)


def test_a_plan_takes_both_spellings(workplace, capsys):
    wide = ("--batch-tokens", "512", "--tokens", "51200")
    said = []
    for named in (("v5e", "--devices", "16"), ("v5e-16",), ("v5e:4x4", "--devices", "16")):
        assert cli.main(["plan", "experiments.tiny", "--hardware", *named, *wide]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    assert "tiny on 16 x v5e" in said[0]
    assert cli.main(["plan", "experiments.tiny", "--hardware", "v5e-16", "--devices", "8"]) == 2
    assert "v5e-16 has 16 devices: leave out --devices 8" in capsys.readouterr().err
