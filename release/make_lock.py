"""Write requirements/*.txt, the pinned packages that `make setup` installs, with SHA-256 digests. Run by `make lock`.

- build.txt: packages that build the packages without wheels
- common.txt: all others except torch
- interpreter.txt: Triton, for the tests; torch for CUDA needs the same
- cpu.txt, cuda.txt: torch, and the packages that only this build of torch needs

The versions are the newest that pyproject.toml allows, for every Python version and system that Turret supports. Needs
`uv`.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCKS = ROOT / "requirements"
TORCH = "2.13.0"
BUILD = ("setuptools", "wheel")
CUDA = re.compile(r"(torch|triton|nvidia-(?!ml-py).*|cuda-.*)==")
NOTE = "# Made by `make lock`. Install with: pip install --no-deps --require-hashes -r FILE\n"


def compiled(*arguments: str) -> dict[str, str]:
    """Run `uv pip compile`. Returns requirement ("torch==2.13.0") -> its lines with hashes."""
    command = ["uv", "pip", "compile", "--universal", "--python-version", "3.11", "--generate-hashes", "--upgrade"]
    output = subprocess.run(
        [*command, "--quiet", "--no-header", "--no-annotate", *arguments], cwd=ROOT, stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    return {block.partition(" \\\n")[0]: block for block in re.split(r"\n(?=\S)", output.strip())}


def cpu_build(folder: str) -> list[str]:
    """The hashes of torch's CPU wheels for Linux: those in cpu.txt, and that of the wheel that pip finds here."""
    path = LOCKS / "cpu.txt"
    text = path.read_text() if path.exists() else ""
    known = re.search(rf"^torch=={TORCH}\+cpu .*\n((?: +--hash.*\n?)*)", text, re.MULTILINE)
    hashes = set(re.findall("sha256:[0-9a-f]{64}", known[1])) if known else set()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, f"torch=={TORCH}+cpu"]
    if subprocess.run(command, check=False).returncode == 0:
        (wheel,) = Path(folder).iterdir()
        hashes.add(f"sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}")
    if not hashes:
        sys.exit(f"pip finds no CPU build of torch {TORCH}, and requirements/cpu.txt has no hash of one")
    return sorted(hashes)


def write(name: str, blocks: list[str]) -> None:
    (LOCKS / name).write_text(NOTE + "".join(f"{block.rstrip()}\n" for block in blocks))


def main() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    with tempfile.TemporaryDirectory() as folder:
        pinned, bundled = Path(folder) / "torch.txt", Path(folder) / "bundled.txt"
        pinned.write_text(f"torch=={TORCH}\n")
        bundled.write_text("\n".join(groups["bundled"]))
        named = [word for group in ("dev", "interpreter", "docs") for word in ("--group", group)]
        every = compiled("-c", str(pinned), *named, "pyproject.toml")
        every |= compiled("--no-deps", str(bundled))
        (Path(folder) / "wheels").mkdir()
        hashes = cpu_build(str(Path(folder) / "wheels"))
    cuda = [block for name, block in every.items() if CUDA.match(name)]
    build = [block for name, block in every.items() if name.partition("==")[0] in BUILD]
    write("build.txt", build)
    write("common.txt", sorted(block for block in every.values() if block not in cuda and block not in build))
    write("cuda.txt", cuda)
    write("interpreter.txt", [block for block in cuda if block.startswith("triton==")])
    lines = " \\\n    --hash=".join([f"torch=={TORCH}+cpu ; sys_platform == 'linux'", *hashes])
    plain = next(block for name, block in every.items() if name.startswith("torch=="))
    write("cpu.txt", [lines, plain.replace(f"torch=={TORCH}", f"torch=={TORCH} ; sys_platform != 'linux'", 1)])


if __name__ == "__main__":
    main()
