"""Compiled programs that are kept on disk, so that a restart need not wait for the compiler."""

import warnings
from pathlib import Path

import jax
import zstandard


def keep_compiled(folder: Path) -> None:
    """Keep compiled programs in a folder of this machine that processes share.

    An entry that a kill cut short would be refused and never replaced: it is removed. One that the
    disk refuses costs time only, and a run that needs the disk as well says so itself.
    """
    refused = r"Error (reading|writing) persistent compilation cache entry .*: \w+: \[Errno"
    warnings.filterwarnings("ignore", refused)
    for entry in folder.glob("*-cache"):
        try:
            zstandard.ZstdDecompressor().decompress(entry.read_bytes())
        except (zstandard.ZstdError, FileNotFoundError):
            entry.unlink(missing_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
