"""The safetensors format: named arrays in one file, written and read one array at a time.

A file is the length of its header as a little-endian uint64, the header as JSON (for each name the
dtype, the shape, and where its bytes begin and end after the header), and the arrays, C-contiguous
and little-endian, one behind the other (https://github.com/huggingface/safetensors). Arrays are
mapped into memory when read, so that a model larger than memory can be looked through.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from gqa_scaling.config import UserError, require
from gqa_scaling.fields import Shape, misfit

DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
ALIGNMENT = 8  # of the first array, as the format's own library has it
MOST_HEADER_BYTES = 100_000_000  # as that library allows
_ARRAY: Shape = {"dtype": str, "shape": [int], "data_offsets": [int]}


@dataclass(frozen=True)
class Array:
    """An array to be written: its shape is known before it is made."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    def bytes(self, dtype: str) -> int:
        return math.prod(self.shape) * DTYPES[dtype].itemsize


def write(path: Path, arrays: Sequence[Array], dtype: str) -> None:
    """Write the arrays in this order, each made when its turn comes, cast to a dtype of `DTYPES`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for array in arrays:
        begin, end = end, end + array.bytes(dtype)
        header[array.name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            values = array.make()
            assert values.shape == array.shape, array.name
            values = np.ascontiguousarray(values.astype(DTYPES[dtype], copy=False))
            file.write(values.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, read-only and mapped into memory; bfloat16 is that of `ml_dtypes`.

    Raises UserError where the file is cut short or is not of this format, or holds other dtypes.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= MOST_HEADER_BYTES else b""
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is no safetensors file, or is cut short") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    require(isinstance(header, dict), f"{path} is no safetensors file")
    header.pop("__metadata__", None)
    out, first = {}, 8 + length
    for name, entry in header.items():
        wrong = misfit(entry, _ARRAY, name)
        require(not wrong, f"{path} is damaged ({wrong})")
        kind, shape, place = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        require(
            kind in DTYPES,
            f"{path}: {name} is of dtype {kind}; only {', '.join(DTYPES)} are read, no quantized "
            "weights",
        )
        dtype = DTYPES[kind]
        sound = min(shape, default=0) >= 0 and len(place) == 2 and place[0] >= 0
        sound = sound and place[1] - place[0] == math.prod(shape) * dtype.itemsize
        require(sound, f"{path} is damaged (the bytes of {name} are not those of its shape)")
        require(
            first + place[1] <= size,
            f"{path} is cut short: it has {size:,} bytes and {name} ends at {first + place[1]:,}",
        )
        if math.prod(shape) == 0:
            out[name] = np.zeros(shape, dtype)
            continue
        mapped = np.memmap(path, np.uint8, "r", first + place[0], (place[1] - place[0],))
        out[name] = mapped.view(np.ndarray).view(dtype).reshape(shape)
    return out
