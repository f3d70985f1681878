"""`python -m l3d` is the command line `l3d`."""

import sys

from l3d.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
