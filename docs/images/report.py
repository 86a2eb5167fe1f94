"""Draw the pictures of a report: `python docs/images/report.py builds/sweeps/weights/report.html`; needs Chromium."""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PICTURES = {  # the page's width and height, and what is asked of the browser
    "report.png": (1100, 1500, ()),
    "report-dark.png": (1100, 1500, ("--blink-settings=preferredColorScheme=0",)),
    "report-narrow.png": (400, 1500, ()),
}


def main() -> None:
    """Draw each picture of the page that the command line names."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "no Chromium is installed"
    for name, (width, height, flags) in PICTURES.items():
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--window-size={width},{height}", f"--screenshot={HERE / name}", *flags,
            Path(sys.argv[1]).absolute().as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
