"""`python -m training COMMAND`; see `cli.py`."""

import sys

from mindomni_rt.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
