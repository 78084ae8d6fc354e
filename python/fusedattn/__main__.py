"""`python -m fusedattn` is the `fusedattn` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
