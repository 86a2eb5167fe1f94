"""`python -m lora_build`."""

import sys

from lora_build.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
