"""`python -m gqa_scaling` is the same as `gqa-scaling`."""

import sys

from gqa_scaling.cli import main

if __name__ == "__main__":
    sys.exit(main())
