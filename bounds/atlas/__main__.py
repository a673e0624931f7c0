"""``python -m bounds.atlas MODEL``."""

import sys

from bounds.atlas.command import main

if __name__ == "__main__":
    sys.exit(main())
