"""Let the tests import the repository's modules, and each other's helpers, from wherever pytest is started."""

import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here)]
