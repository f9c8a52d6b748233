"""`python -m clha_fast`."""

import sys

from clha_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
