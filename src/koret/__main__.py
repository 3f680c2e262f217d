"""`python -m koret`: the command line, so that a launcher can start it."""

import sys

from koret.cli import main

if __name__ == "__main__":
    sys.exit(main())
