"""Build a release in dist/ (or --out FOLDER): sdist, wheel, bill of materials, SHA256SUMS. Run by `make release`.

The wheel is built from the sdist, which shows that the sdist is complete. The bill of materials (CycloneDX 1.6, JSON)
lists Turret and all packages that it needs at run time, in the versions installed here.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def build(out: Path) -> list[Path]:
    """Build into `out`. Returns [sdist, wheel]."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True)
    return [next(out.glob("*.tar.gz")), next(out.glob("*.whl"))]


def needed(name: str, extra: str = "") -> Iterator[tuple[str, str]]:
    """(name, extra) of each direct requirement of a distribution on this machine."""
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for each in ("", *requirement.extras):
                yield canonicalize_name(requirement.name), each


def bill_of_materials(files: list[Path]) -> str:
    """The bill of materials as JSON.

    Args:
        files: the sdist and the wheel, to be listed with their digests.
    """
    components: dict[str, Component] = {}
    below: dict[str, set[str]] = {}
    waiting = [("turret", "")]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        if name not in components:
            version = distribution(name).version
            kind = ComponentType.APPLICATION if name == "turret" else ComponentType.LIBRARY
            url = PackageURL("pypi", name=name, version=version)
            components[name] = Component(type=kind, name=name, version=version, purl=url, bom_ref=str(url))
        for each in needed(name, extra):
            below.setdefault(name, set()).add(each[0])
            if each not in seen:
                seen.add(each)
                waiting.append(each)
    turret = components.pop("turret")
    for file in files:
        digest = HashType(alg=HashAlgorithm.SHA_256, content=sha256(file))
        turret.components.add(Component(type=ComponentType.FILE, name=file.name, bom_ref=file.name, hashes=[digest]))
    bom = Bom(components=components.values())
    bom.metadata.component = turret
    every = {"turret": turret, **components}
    for name, component in every.items():
        bom.register_dependency(component, [every[each] for each in sorted(below.get(name, ())) if each != name])
    return JsonV1Dot6(bom).output_as_string(indent=1)


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        sys.exit(f"{out} is not empty: a release is built into an empty folder")
    files = build(out)
    bom = out / f"{files[0].name.removesuffix('.tar.gz')}.cdx.json"
    bom.write_text(bill_of_materials(files) + "\n", encoding="utf-8")
    sums = "".join(f"{sha256(file)}  {file.name}\n" for file in (*files, bom))
    (out / "SHA256SUMS").write_text(sums, encoding="utf-8")


if __name__ == "__main__":
    main()
