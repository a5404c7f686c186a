"""`python -m unisd`, also for launchers: `accelerate launch -m unisd train ...`."""

import sys

from unisd.cli import main

if __name__ == "__main__":
    sys.exit(main())
