"""`python -m mindomni_rt` is the command `mindomni`."""

from .cli import main

raise SystemExit(main())
