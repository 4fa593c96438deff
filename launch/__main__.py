"""python -m launch TARGET ..."""

import sys

from launch.cli import main

sys.exit(main())
