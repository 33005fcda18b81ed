"""``python -m autobatch`` is ``autobatch``."""

import sys

from autobatch.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
