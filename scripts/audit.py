"""Look up known vulnerabilities of the locked versions; a finding is an error.

`make audit` runs this script. If the advisory service cannot be reached, it says so and succeeds.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "ci.txt"
SECONDS = 300


def findings(report: dict[str, Any]) -> list[str]:
    """Return a line for each vulnerability of a report.

    Example:
      >>> known = [{"id": "X-1", "fix_versions": ["2.1"]}]
      >>> findings({"dependencies": [{"name": "a", "version": "2.0", "vulns": known}]})
      ['a 2.0: X-1, fixed in 2.1']
    """
    return [
        f"{package['name']} {package['version']}: {each['id']}, "
        f"fixed in {', '.join(each['fix_versions']) or 'no version'}"
        for package in report["dependencies"]
        for each in package.get("vulns", [])
    ]


def read_report() -> dict[str, Any] | str:
    """Return the report of pip-audit, or why there is none."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(LOCK), "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS} seconds"
    except ValueError:
        return done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"


def main() -> int:
    """Print the findings, and return the exit code."""
    report = read_report()
    if isinstance(report, str):
        print(f"audit: not done, as the advisory service cannot be reached ({report})")
        return 0
    found = findings(report)
    print(
        "\n".join(found)
        or f"audit: no known vulnerability in {len(report['dependencies'])} packages"
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
