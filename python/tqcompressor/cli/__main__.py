"""`python -m tqcompressor.cli`, as `torchrun -m` starts it."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
