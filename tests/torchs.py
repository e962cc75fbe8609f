"""Proves that torch's own tests of norms pass under ``RMSNORM_INSTALL=1`` wherever they pass without.

    python tests/torchs.py --checkout ../pytorch   # the files of FILES, their tests with "norm" in the name
    python tests/torchs.py --checkout ../pytorch -k rms_norm test_ops.py functorch/test_ops.py

The checkout is of https://github.com/pytorch/pytorch at the tag of the installed torch (v2.13.0); it is read, never
written, never built. Files of another version run, too, as far as they can: what fails without us is left out of the
comparison. Needed beside this package, installed so that torch finds its entry point: pytest expecttest hypothesis
scipy; with pytest-xdist, ``--processes 4``.

Exit status 1: a test passes without and not with, or a file ended before pytest could write what it found.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

FILES = (
    "test_nn.py",
    "nn/test_lazy_modules.py",
    "nn/test_parametrization.py",
    "test_modules.py",
    "test_module_init.py",  # up to 2.2
    "test_ops.py",
    "test_ops_gradients.py",
    "test_ops_fwd_gradients.py",
    "test_ops_jit.py",
    "test_decomp.py",
    "test_meta.py",
    "test_fake_tensor.py",
    "test_proxy_tensor.py",
    "test_schema_check.py",
    "test_expanded_weights.py",
    "test_nestedtensor.py",
    "test_transformers.py",
    "test_jit_autocast.py",
    "functorch/test_ops.py",
    "functorch/test_vmap.py",
    "functorch/test_aotdispatch.py",
    "inductor/test_torchinductor_opinfo.py",
)
ENVIRONMENT = {"PYTORCH_TESTING_DEVICE_ONLY_FOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
INSTALLED = (
    "import torch, rmsnorm; raise SystemExit(rmsnorm._install.refusal() if not rmsnorm._install.is_installed() else 0)"
)


def outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """Of each test in a JUnit file: passed, failed or skipped, and the last lines of why."""
    found: dict[str, tuple[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome, why = "passed", ""
        for child in case:
            if child.tag in {"failure", "error", "skipped"}:
                outcome = "skipped" if child.tag == "skipped" else "failed"
                why = (child.text or child.get("message") or "").strip()
        found[name] = outcome, why
    return found


def run(file: str, install: bool, options: argparse.Namespace) -> dict[str, tuple[str, str]] | None:
    """What pytest found in one of their files; None where it ended without saying."""
    report = options.folder / f"{file.replace('/', '-')}-{'with' if install else 'without'}.xml"
    report.unlink(missing_ok=True)
    # Their conftest.py and pytest.ini are for their machines: retries, shards, a cache of failures.
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-c", os.devnull, "--rootdir", options.checkout]
    command += ["-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}", "-k", options.k]
    command += ["-n", str(options.processes)] if options.processes > 1 else []
    environment = {**os.environ, **ENVIRONMENT, "RMSNORM_INSTALL": str(int(install)), "PYTHONDONTWRITEBYTECODE": "1"}
    with open(report.with_suffix(".log"), "w") as log:
        folder = options.checkout / "test"
        subprocess.run([*command, file], cwd=folder, env=environment, stdout=log, stderr=log, check=False)
    return outcomes(report) if report.exists() else None


def compare(file: str, options: argparse.Namespace) -> bool:
    """Runs a file twice, and prints a line of what came out, and each test that is lost; whether none is."""
    start = time.perf_counter()
    without, installed = run(file, False, options), run(file, True, options)
    seconds = time.perf_counter() - start
    if without is None or installed is None:
        print(f"{file:38} ended without a report; {options.folder}/{file.replace('/', '-')}-*.log")
        return False
    passed = [name for name, (outcome, _) in without.items() if outcome == "passed"]
    lost = [name for name in passed if installed.get(name, ("", ""))[0] != "passed"]
    also = sum(outcome == "passed" for outcome, _ in installed.values())
    failed = sum(outcome == "failed" for outcome, _ in without.values())
    print(f"{file:38} {len(without):6} {failed:7} {len(passed):7} {also:7} {len(lost):5} {seconds:8.0f}", flush=True)
    for name in lost:
        why = installed.get(name, ("", "it did not run"))[1] or "it was skipped"
        print(f"  passes without, not with: {name}\n    " + "\n    ".join(why.splitlines()[-8:]))
    return not lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES, help="below test/ of the checkout; default: those in FILES")
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of pytorch")
    parser.add_argument("-k", default="norm", help="as pytest's; default: norm")
    parser.add_argument("--folder", type=Path, help="where to keep what pytest wrote; default: nowhere")
    parser.add_argument("--processes", type=int, default=1, help="of pytest-xdist")
    options = parser.parse_args()
    options.checkout = options.checkout.resolve()
    if not (options.checkout / "test").is_dir():
        parser.error(f"--checkout: {options.checkout} has no folder test/; it must be a checkout of pytorch")
    environment = {**os.environ, "RMSNORM_INSTALL": "1"}
    if subprocess.run([sys.executable, "-c", INSTALLED], env=environment, check=False).returncode:
        parser.error("RMSNORM_INSTALL=1 does not install: is this package installed here, with its native library?")
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = (options.folder or Path(temporary)).resolve()
        options.folder.mkdir(parents=True, exist_ok=True)
        print(f"{'file':38} {'tests':>6} {'failed':>7} {'passed':>7} {'with us':>7} {'lost':>5} {'seconds':>8}")
        there = [file for file in options.files if (options.checkout / "test" / file).exists()]
        if missing := sorted(set(options.files) - set(there)):
            print(f"not in this checkout: {', '.join(missing)}")
        whole = [compare(file, options) for file in there]
        return int(not whole or not all(whole))


if __name__ == "__main__":
    sys.exit(main())
