"""`python -m ibkit` is the same as `ibkit`."""

import sys

from ibkit.cli import main

sys.exit(main())
