"""Says whether a tag may become a release: `python packaging/version.py v0.1.0`; without a tag, the version.

The tag is v and the version of pyproject.toml, and CHANGELOG.md has a section of that version with a date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    found = re.search(r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    version = found[1]
    if len(sys.argv) > 1 and sys.argv[1] != f"v{version}":
        raise SystemExit(f"the tag {sys.argv[1]} is not v{version}, which pyproject.toml says")
    heads = re.findall(r"^## (\S+)(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if version not in dict(heads):
        raise SystemExit(f"CHANGELOG.md has no section '## {version}'")
    if len(sys.argv) > 1 and not re.fullmatch(r" \(\d{4}-\d{2}-\d{2}\)", dict(heads)[version]):
        raise SystemExit(f"CHANGELOG.md: '## {version}{dict(heads)[version]}' should be '## {version} (YYYY-MM-DD)'")
    print(version)


if __name__ == "__main__":
    main()
