"""`gqa-scaling`, and `python -m gqa_scaling`, which is the same."""

import sys

from gqa_scaling.devices.host_memory import ready_host_memory


def program() -> int:
    """The command line as a program of its own, which may set up the process that it runs in."""
    ready_host_memory()  # before anything is loaded, as it may start the program again
    from gqa_scaling.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(program())
