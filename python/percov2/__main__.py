"""``python -m percov2``: the command line."""

import sys

from percov2.cli.main import main

sys.exit(main())
