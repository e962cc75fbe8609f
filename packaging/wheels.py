"""Builds a sdist and, from it, the wheels of all platforms on this one Linux machine; packaging/check.py reads them.

`make wheels` runs it in build/wheels/env. Needs g++ 12 and g++-aarch64-linux-gnu; downloads 230 MB once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import check
from targets import BUILD, ROOT, TARGETS, Target, torch_for, write_libcxx_stub

DIST = ROOT / "dist"


def run(*command: str | Path, **variables: str) -> None:
    print("+", shlex.join(map(str, command)), flush=True)
    subprocess.run([str(word) for word in command], env=os.environ | variables, check=True, cwd=BUILD)


def build(sdist: Path, target: Target) -> Path:
    """One wheel in dist/."""
    if shutil.which(target.compiler[0]) is None:
        raise SystemExit(f"no {target.compiler[0]}: apt-get install g++-12 g++-aarch64-linux-gnu")
    torch = torch_for(target)
    if target.mac:
        write_libcxx_stub(torch)
    made = BUILD / "made" / target.tag
    shutil.rmtree(made, ignore_errors=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
    ]
    run(
        *(*pip, "--no-build-isolation", "--wheel-dir", made, sdist),
        RMSNORM_BUILD_NATIVE="1",
        RMSNORM_TORCH=str(torch),
        CXX=shlex.join((*target.compiler, *target.compile_flags)),
        LDFLAGS=shlex.join(target.link_flags),
        _PYTHON_HOST_PLATFORM=target.host,
    )
    (wheel,) = made.glob("*.whl")
    DIST.mkdir(exist_ok=True)
    if target.mac:
        return Path(shutil.copy(wheel, DIST))
    check.repair(wheel, target, DIST)
    (repaired,) = DIST.glob(f"*-{target.tag}.whl")
    return repaired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[target.tag for target in TARGETS], help="this one, instead of all")
    only = parser.parse_args().only
    BUILD.mkdir(parents=True, exist_ok=True)
    DIST.mkdir(exist_ok=True)
    for old in (*DIST.glob("*.whl"), *DIST.glob("*.tar.gz")):
        old.unlink()
    run(
        sys.executable,
        "-m",
        "build",
        "--sdist",
        "--no-isolation",
        "--skip-dependency-check",
        "--outdir",
        DIST,
        ROOT,
        RMSNORM_BUILD_NATIVE="",
    )
    (sdist,) = DIST.glob("*.tar.gz")
    wheels = [build(sdist, target) for target in TARGETS if only in (None, target.tag)]
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, *wheels)
    for path in (sdist, *wheels):
        check.check(path)


if __name__ == "__main__":
    main()
