"""Proves that transformers' own model tests pass with every model patched at construction, if they pass unpatched.

    python tests/theirs.py --folder build/theirs                        # eight families, two processes; 40 minutes
    python tests/theirs.py --folder build/theirs --fuse --family llama  # with what stands beside norms fused, too
    python tests/theirs.py --folder build/theirs --write                # nothing more but the rows in docs/models.md
    python tests/theirs.py --family gemma3 -k "not generate"            # a part of one family's tests
    python tests/theirs.py --checkout transformers/                     # where there is a git checkout already

Nothing of theirs is kept here. The sdist of the installed transformers, from PyPI, has the package and the common tests
(tests/test_modeling_common.py and its like), which are most of what runs; it leaves out the folders below tests/. These
come from the archive of the same tag on GitHub, or from ``--checkout``, which may be a few versions older: of its files
only those are taken that the sdist lacks, and tests which fail unpatched are left out of the comparison anyway.

Beside torch 2.13.0 and this package it needs: transformers==5.22.2 accelerate pytest==9.0.2 pytest-xdist parameterized
sentencepiece pillow psutil requests-mock timeout-decorator scipy datasets.

theirs_hook.py runs in their processes: it patches each model, and records outcomes.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import theirs_hook

ROOT = Path(__file__).resolve().parent.parent
DOCS, LABEL = ROOT / "docs/models.md", "made by `python tests/theirs.py --write`"
FAMILIES = ("llama", "qwen3", "gemma3", "gpt_oss", "mamba2", "qwen3_next", "t5", "deepseek_v3")
ARCHIVE = "https://github.com/huggingface/transformers/archive/refs/tags/v{}.tar.gz"
LINE = "import theirs_hook; theirs_hook.hook()\n"

DIFFERENCES: dict[str, str] = {}
"""Tests of theirs that pass unpatched and must not pass patched: a part of their names, and why."""


def unpack(folder: Path, checkout: Path | None) -> Path:
    """Their package and tests in a folder, with our line in tests/__init__.py."""
    version = importlib.metadata.version("transformers")
    tree = folder / f"transformers-{version}"
    if (tree / "ready").exists():
        return tree
    source = folder / f"transformers-{version}.tar.gz"
    if not source.exists():
        options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", str(folder)]
        command = [sys.executable, "-m", "pip", "download", "-q", *options, f"transformers=={version}"]
        subprocess.run(command, check=True)
    shutil.rmtree(tree, ignore_errors=True)
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    if checkout is None:
        archive_file, _ = urllib.request.urlretrieve(ARCHIVE.format(version), folder / "github.tar.gz")
        with tarfile.open(archive_file) as archive:
            archive.extractall(folder / "github", filter="data")
        checkout = folder / "github" / tree.name
    shutil.copy(checkout / "conftest.py", tree)
    shutil.copytree(checkout / "utils", tree / "utils", dirs_exist_ok=True)
    for path in sorted((checkout / "tests").rglob("*")):
        mine = tree / "tests" / path.relative_to(checkout / "tests")
        if path.is_file() and not mine.exists():
            mine.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, mine)
    head = tree / "tests/__init__.py"
    head.write_text(LINE + head.read_text())
    origin = re.search(r'__version__ = "(.*)"', (checkout / "src/transformers/__init__.py").read_text())
    (tree / "ready").write_text(origin[1] if origin else "unknown")
    return tree


def record_of(family: str, how: str, options: argparse.Namespace) -> Path:
    part = "-" + re.sub(r"\W+", "_", options.k) if options.k else ""
    return options.folder / "outcomes" / f"{family}-{how}{part}"


def run(family: str, how: str, options: argparse.Namespace) -> dict[str, Any]:
    """The outcomes of one family's tests, from before if they are there."""
    record = record_of(family, how, options)
    outcomes, models = record.with_suffix(".json"), record.with_suffix(".models")
    if options.again or not outcomes.exists():
        tree = unpack(options.folder, options.checkout)
        record.parent.mkdir(exist_ok=True)
        outcomes.unlink(missing_ok=True)
        models.unlink(missing_ok=True)
        # Without the other files of our folder: some of theirs have the same names.
        (options.folder / "hook").mkdir(exist_ok=True)
        shutil.copy(theirs_hook.__file__, options.folder / "hook")
        environment = {
            **os.environ,
            theirs_hook.HOW: how,
            theirs_hook.RECORD: str(record),
            "PYTHONPATH": os.pathsep.join(map(str, (tree / "src", ROOT / "src", options.folder / "hook"))),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        where = [importlib.metadata.version(name) for name in ("torch", "transformers")]
        where += [(tree / "ready").read_text(), time.strftime("%Y-%m-%d")]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "theirs_hook", "-p", "no:cacheprovider"]
        command += ["-n", str(options.processes)] if options.processes > 1 else []
        command += ["-k", options.k] if options.k else []
        start = time.perf_counter()
        with open(record.with_suffix(".log"), "w") as log:
            file = f"tests/models/{family}/test_modeling_{family}.py"
            subprocess.run([*command, file], cwd=tree, env=environment, stdout=log, stderr=log, check=False)
        found = json.loads(outcomes.read_text()) if outcomes.exists() else {}
        if not found.get("outcomes"):
            outcomes.unlink(missing_ok=True)
            raise SystemExit(f"{family}: pytest ran nothing; its last words are in {log.name}")
        found |= {"seconds": time.perf_counter() - start, "where": where}
        outcomes.write_text(json.dumps(found, indent=1))
    found = json.loads(outcomes.read_text())
    found["models"] = [json.loads(line) for line in models.read_text().splitlines()] if models.exists() else []
    return found


TITLES = (
    "tests of",
    "in all",
    "pass unpatched",
    "of these, patched",
    "models patched",
    "norms",
    "left",
    "layers fused",
)
# Of an inner model; before the values are loaded, after which it is patched; those that nobody asked for.
EXPECTED = ("it is patched already", "on the device meta", "it is a LayerNorm")


def compare(family: str, how: str, before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], int]:
    """A row of the table, and how many tests are lost for no known reason. Prints what is lost or left alone."""
    passed = [test for test, outcome in before["outcomes"].items() if outcome == "passed"]
    missing = [test for test in passed if after["outcomes"].get(test) != "passed"]
    wrong = 0
    for test in missing:
        known = next((reason for part, reason in DIFFERENCES.items() if part in test), "")
        why = after["why"].get(test, "it did not run").strip()
        print(f"passes unpatched, not {how}: {test}\n    " + (known or "\n    ".join(why.splitlines()[-6:])))
        wrong += not known
    reasons = collections.Counter(
        reason for model in after["models"] for reason in model["left"] if not any(part in reason for part in EXPECTED)
    )
    for reason, count in reasons.most_common():
        print(f"    left alone {count} times: {reason}")
    left = sum(count for reason, count in reasons.items() if "not fused" not in reason)
    norms, adds = (sum(model[key] for model in after["models"]) for key in ("patched", "fused"))
    models = sum(model["patched"] > 0 for model in after["models"])
    numbers = len(before["outcomes"]), len(passed), len(passed) - len(missing), models, norms, left
    return [family, *map(str, numbers), str(adds) if how == "fused" else ""], wrong


def write(options: argparse.Namespace) -> None:
    """The table of docs/models.md: what the folder has, patched and fused, in place of rows of the same; others of the
    same versions stay, with their dates. Where this package is installed with its ``bench``."""
    from rmsnorm.bench.pages import replace_block, table

    versions, lines = "", {}
    pairs = [(family, how) for how in ("patched", "fused") for family in FAMILIES]
    for family, how in pairs:
        if not record_of(family, how, options).with_suffix(".json").exists():
            continue
        after = run(family, how, options)
        *where, date = after["where"]
        versions = "torch {}, transformers {}; the files below tests/models from {}.\n\n".format(*where)
        lines[family, how] = [*compare(family, how, run(family, "plain", options), after)[0], date]
    if not lines:
        raise SystemExit(f"{options.folder} has no outcomes: run some first")
    before = DOCS.read_text().partition(f"<!-- {LABEL} -->\n")[2].partition("<!-- end -->")[0]
    for line in before.splitlines()[4:] if before.startswith(versions) else []:
        family, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        lines.setdefault((family, "fused" if cells[-2] else "patched"), [family, *cells])
    replace_block(DOCS, LABEL, versions + table((*TITLES, "date"), [lines[pair] for pair in pairs if pair in lines]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="default: all")
    parser.add_argument("--fuse", action="store_true", help="patch(model, fuse=True)")
    parser.add_argument("--folder", type=Path, help="where to unpack, and to keep outcomes; default: a temporary one")
    parser.add_argument("--checkout", type=Path, help="a checkout of transformers to take the tests from")
    parser.add_argument("-k", help="as pytest's")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="run what the folder has outcomes of already")
    parser.add_argument("--write", action="store_true", help="run nothing, write what the folder has into the table")
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = (options.folder or Path(temporary)).resolve()
        options.folder.mkdir(parents=True, exist_ok=True)
        if options.write:
            write(options)
            return 0
        how = "fused" if options.fuse else "patched"
        print(*TITLES, "seconds", sep=", ")
        for family in options.family or FAMILIES:
            before, after = run(family, "plain", options), run(family, how, options)
            row, lost = compare(family, how, before, after)
            print(*row, f"{before['seconds']:.0f} + {after['seconds']:.0f}", flush=True)
            wrong += lost
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
