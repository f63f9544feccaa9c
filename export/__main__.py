"""`python -m export build | verify | inspect | plan | rehearse`; see `cli.py`."""

import sys

from mindomni_rt.export.cli import main

if __name__ == "__main__":
    sys.exit(main())
