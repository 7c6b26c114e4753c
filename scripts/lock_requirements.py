"""Write requirements/ci.txt: the exact versions that continuous integration installs.

`make lock` runs this script. pip resolves the newest versions for the Python that runs it, which
has to be the oldest supported one, without installing anything.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "ci.txt"
OLDEST = (3, 11)
# The project with its extras, and what audits it.
WANTED = [".[cli,test]", "pip-audit"]
HEADER = """\
# Exact versions for continuous integration on Python 3.11: .ci/run installs with `-c` this file.
# Written by `make lock`. Read the difference before you commit a new one.
"""


def resolve() -> dict[str, str]:
    """Return the version that pip chooses for every package."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    command += ["--dry-run", "--ignore-installed", "--report", "-", *WANTED]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    packages = [each["metadata"] for each in json.loads(output)["install"]]
    return {each["name"].lower(): each["version"] for each in packages}


def main() -> None:
    """Write the file."""
    if sys.version_info[:2] != OLDEST:
        sys.exit(f"run this with Python {OLDEST[0]}.{OLDEST[1]}: make lock PYTHON=python3.11")
    versions = resolve()
    del versions["jax-lora"]
    lines = [f"{name}=={versions[name]}\n" for name in sorted(versions)]
    LOCK.write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"{LOCK.relative_to(ROOT)}: {len(lines)} packages")


if __name__ == "__main__":
    main()
