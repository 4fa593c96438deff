"""How programs are compiled, and kept on disk, so that a restart need not wait for the compiler."""

import warnings
from pathlib import Path
from typing import Any

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


def run_once_options(platform: str) -> dict[str, Any] | None:
    """What a program that runs once is compiled with on this platform; None for XLA's own choice.

    On a CPU LLVM's first level and XLA's older code generator take a third of the time. The initial
    states of 36 models had the same bits. Train steps compile faster at that level, too, and are as
    fast, but of models 48 wide the last bits differed: they keep XLA's own. Where jax was told to
    optimise less, that holds.
    """
    if platform != "cpu" or jax.config.read("jax_disable_most_optimizations"):
        return None
    return {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
