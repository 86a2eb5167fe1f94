"""`python -m lora_build`."""

import sys

from lora_build.app import main

if __name__ == "__main__":
    sys.exit(main())
