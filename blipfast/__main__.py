"""`python -m blipfast`."""

import sys

from blipfast.cli import main

sys.exit(main())
