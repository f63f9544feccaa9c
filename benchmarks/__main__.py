"""`python -m benchmarks COMMAND`; see `cli.py`."""

import sys

from mindomni_rt.benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
