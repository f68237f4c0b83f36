"""`python -m mlx_cerebrum.plan`: show a plan."""

import sys

from mlx_cerebrum.plan.show import main

if __name__ == "__main__":
    sys.exit(main())
