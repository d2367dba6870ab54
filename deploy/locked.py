"""Print the part of requirements/common.txt that some requirements need, for `pip install --require-hashes`.

python deploy/locked.py '.[postgres,s3]'
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = Path(__file__).parent.parent / "requirements" / "common.txt"


def name_of(requirement: str) -> str:
    """The name at the start of a requirement or of a block of the lock, in its normal form."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def needed(*requirements: str) -> set[str]:
    """The names of all packages that pip would install for these, in the versions of the lock."""
    with tempfile.TemporaryDirectory() as folder:
        versions, plan = Path(folder) / "versions.txt", Path(folder) / "plan.json"
        versions.write_text(re.sub(r" \\$|^ +--hash.*\n?", "", COMMON.read_text(), flags=re.MULTILINE))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(plan)]
        subprocess.run([*command, "--no-build-isolation", "-c", str(versions), *requirements], check=True)
        return {name_of(each["metadata"]["name"]) for each in json.loads(plan.read_text())["install"]}


if __name__ == "__main__":
    names = needed(*sys.argv[1:])
    print("\n".join(block for block in re.split(r"\n(?=\S)", COMMON.read_text()) if name_of(block) in names))
