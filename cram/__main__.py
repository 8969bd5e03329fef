"""`python -m cram` is the command `cram`."""

import sys

from cram.cli import main

sys.exit(main())
