"""``python -m dcache`` is ``dcache``."""

import sys

from dcache.cli import main

if __name__ == "__main__":
    sys.exit(main())
