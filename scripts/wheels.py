"""Make the files of a release in dist/release, and check them: `make wheels`, or `python scripts/wheels.py`.

A source distribution, and from what is in it a wheel for every Linux with glibc 2.28 on x86_64 and on aarch64
(csrc/manylinux.py). auditwheel must find no newer symbol in a wheel and no library that is missing but torch's own,
which the package's requirement brings; twine must find nothing wrong with the metadata.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from csrc.manylinux import ARCHITECTURES, GLIBC, platform_tag  # noqa: E402

# What every installation has from torch, beside the system's libraries that manylinux allows.
FROM_TORCH = {"libtorch_cpu.so"}


def run(*command: str | Path, build: str = "none") -> str:
    """Output of a module's command, under this interpreter."""
    environment = {**os.environ, "UNISD_BUILD": build}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def objections(report: dict[str, Any], architecture: str) -> list[str]:
    """What auditwheel's report (`show --json`) says against the tag of a wheel for this architecture."""
    found = []
    tag = re.fullmatch(rf"manylinux_(\d+)_(\d+)_{architecture}", report["sym_tag"])
    if tag is None or (int(tag[1]), int(tag[2])) > tuple(map(int, GLIBC.split("."))):
        found.append(f"its symbols need {report['sym_tag']}, newer than {platform_tag(architecture)}")
    if missing := sorted(set(report["external_libs"]) - FROM_TORCH):
        found.append(f"it needs {', '.join(missing)}")
    if report["unsupported_isa"]:
        found.append("it needs a processor beyond the architecture's baseline")
    return found


def make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run("build", "--sdist", "--no-isolation", "--outdir", folder, ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    print(f"{sdist.name}  {sdist.stat().st_size / 1e6:.2f} MB")
    for architecture in ARCHITECTURES:
        # Each in a fresh copy of what others would build from: nothing of this checkout or of another build gets in.
        with tempfile.TemporaryDirectory() as temporary:
            with tarfile.open(sdist) as archive:
                archive.extractall(temporary)
            (source,) = Path(temporary).iterdir()
            options = ("--no-deps", "--no-build-isolation", "-w", folder)
            run("pip", "wheel", *options, source, build=f"manylinux_{architecture}")
        (wheel,) = folder.glob(f"*-{platform_tag(architecture)}.whl")
        report = json.loads(run("auditwheel", "show", "--json", wheel))
        if against := objections(report, architecture):
            raise SystemExit(f"{wheel.name}: {'; '.join(against)}")
        needs = f"symbols of {report['sym_tag']} and {', '.join(report['external_libs'])}"
        print(f"{wheel.name}  {wheel.stat().st_size / 1e6:.2f} MB, {needs}")
    run("twine", "check", "--strict", *sorted(folder.iterdir()))
    print("twine check: passed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "release", help="emptied first")
    make(parser.parse_args().output)


if __name__ == "__main__":
    main()
