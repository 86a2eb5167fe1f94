"""A build whose tensors have SHA-256 in place of BLAKE3, as before manifests of version 2: what that costs.

python benchmarks/sha256.py recipe=NAME
"""

import functools
import sys

from lora_build.cli.main import main
from lora_build.engine import execute

if __name__ == "__main__":
    execute.execute = functools.partial(execute.execute, algorithm="sha256")
    sys.exit(main())
