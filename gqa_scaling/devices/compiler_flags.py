"""Flags by which known faults of the compilers are left alone or refused; without jax.

The compilers read XLA_FLAGS and LIBTPU_INIT_ARGS once, when jax starts a device: what is set here
must be set before.
"""

import os
import re
from importlib import metadata

from gqa_scaling.devices.host_memory import DEVICES

NATIVE_ATOMICS = "-nvptx-allow-ftz-atomics"
_EXTRA_OPTIONS = "--xla_backend_extra_options="
# Each group alone is harmless; see `overlap_fault`.
OVERLAP_GROUPS = (
    ("xla_tpu_enable_async_collective_fusion",),
    ("xla_tpu_overlap_compute_collective_tc", "xla_enable_async_all_reduce"),
)

Version = tuple[int, ...]


def version_of(package: str) -> Version | None:
    """The installed version, such as (0, 10, 2); None where the package is not installed."""
    try:
        return numbers(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> Version:
    """The release that a version begins with: (0, 0, 42, 1) of 0.0.42.1, (0, 11) of 0.11.dev3."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()


def between(version: Version | None, since: Version | None, until: Version | None) -> bool:
    """Whether a version is at least `since` and before `until`, where they are given."""
    if version is None:
        return False
    return (since is None or version >= since) and (until is None or version < until)


def keep_native_atomics() -> None:
    """Have XLA add in float32 by the GPU's own instruction, where jaxlib would use a loop.

    jaxlib 0.10.2 to 0.11.0 takes care of numbers below 1e-38, which that instruction rounds to 0,
    by trying again until nobody else has changed the sum: hundreds of times slower where many add
    to one place, as in the gradient of an embedding (jax issue 38806, xla issue 46225). Does nothing
    with other versions, without an NVIDIA device, or where the flag is set.
    """
    affected = between(version_of("jaxlib"), (0, 10, 2), (0, 11, 1))
    flags = os.environ.get("XLA_FLAGS", "").split()
    if not affected or not any(DEVICES.glob("nvidia[0-9]*")):
        return
    if any(NATIVE_ATOMICS in flag for flag in flags):
        return
    there = next((flag for flag in flags if flag.startswith(_EXTRA_OPTIONS)), None)
    if there is None:
        flags.append(_EXTRA_OPTIONS + NATIVE_ATOMICS)
    else:
        flags[flags.index(there)] = f"{there},{NATIVE_ATOMICS}"
    os.environ["XLA_FLAGS"] = " ".join(flags)


def overlap_fault(device_kind: str, attention: str, context: int) -> str:
    """What is wrong with the flags of a run with positions over `context` devices; "" for nothing.

    On a v6e with jax 0.10.2, sequence-parallel splash attention was NaN under two groups of flags
    together, each harmless alone (jax issue 38741).
    """
    if "v6" not in device_kind.lower() or attention != "splash" or context == 1:
        return ""
    given = os.environ.get("LIBTPU_INIT_ARGS", "") + " " + os.environ.get("XLA_FLAGS", "")
    on = set(re.findall(r"--(\w+)(?:=(?:true|1|True))?(?=\s|$)", given))
    found = [sorted(on.intersection(group)) for group in OVERLAP_GROUPS]
    if not all(found):
        return ""
    return (
        f"{found[0][0]} and {found[1][0]} are both set, under which splash attention over "
        f"context={context} devices of a v6e gives NaN (jax issue 38741): leave out one of them"
    )
