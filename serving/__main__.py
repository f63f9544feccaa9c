"""`python -m mindomni_rt.serving`: the commands `serve` and `batch`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
