"""`lora-build`, and `python -m lora_build`: as little as can be before all that follows is looked after."""

import os
import sys


def main() -> int:
    """Run the command line and return its exit code; Ctrl-C while it is imported ends it as it does later."""
    try:
        from lora_build.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return 130


def _leave_working_directory() -> None:
    """Import nothing from the working directory, where `python -m` looks first, but what it has imported by now."""
    try:
        if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:  # noqa: PTH109  # pathlib is not imported yet
            del sys.path[0]
    except FileNotFoundError:  # it is gone, and nothing is in it
        pass


if __name__ == "__main__":
    _leave_working_directory()
    sys.exit(main())
