"""`python -m fxdbsr`."""

import sys

from fxdbsr.cli import main

if __name__ == "__main__":
    sys.exit(main())
