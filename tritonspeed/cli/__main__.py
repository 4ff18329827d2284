"""`python -m tritonspeed.cli`: the command line where the `tritonspeed` script is not on the path."""

import sys

from tritonspeed.cli import main

if __name__ == "__main__":
    sys.exit(main())
