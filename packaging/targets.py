"""The only file that knows for which platforms there are wheels, and with what each is made.

Linux has gcc, for aarch64 Debian's cross compiler: torch and we must share libstdc++, or it couldn't catch what we
throw, and zig links a libc++ of its own. macOS has zig's clang, the cross compiler that the package index has. Its
linker gets the names in Apple's libc++ from what torch's own libraries take from there (a text stub), not a second one.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "wheels"
LIBCXX = "/usr/lib/libc++.1.dylib"


@dataclass(frozen=True)
class Target:
    tag: str
    """The wheel's platform tag."""
    host: str
    """What Python calls that platform: _PYTHON_HOST_PLATFORM."""
    compiler: tuple[str, ...]
    torch: str | None = None
    """The release whose wheel for that platform is linked with; None: the torch of .venv."""
    compile_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()

    @property
    def mac(self) -> bool:
        return self.host.startswith("macosx")


ZIG = (sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos.14.0")
TARGETS = (
    Target("manylinux_2_28_x86_64", "linux-x86_64", ("g++",)),
    # The oldest that we promise. Its wheel is the last for aarch64 that runs without CUDA's libraries: aarch64.sh.
    Target("manylinux_2_28_aarch64", "linux-aarch64", ("aarch64-linux-gnu-g++",), "2.10.0"),
    Target(
        "macosx_14_0_arm64",
        "macosx-14.0-arm64",
        ZIG,
        "2.13.0",  # tagged for macOS 14, as ours is
        ("-fno-sized-deallocation",),  # as Apple's clang has it: torch's libraries use none either
        ("-nostdlib++", str(BUILD / "libc++.tbd"), "-Wl,-install_name,@rpath/librmsnorm.so"),
    ),
)


def torch_for(target: Target) -> Path:
    """A folder with include/ and lib/ of torch for that platform; taken from the package index once."""
    if target.torch is None:
        (packages,) = (ROOT / ".venv" / "lib").glob("python3*/site-packages")
        return packages / "torch"
    where = BUILD / f"torch-{target.torch}-{target.tag}"
    if not where.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--only-binary", ":all:", "--python-version", "3.11", "--dest", str(BUILD), "--platform", target.tag]
        subprocess.run([*pip, f"torch=={target.torch}"], check=True)
        (wheel,) = BUILD.glob(f"torch-{target.torch}-*{target.tag}.whl")
        unfinished = where.with_name(f"{where.name}.unfinished")
        with zipfile.ZipFile(wheel) as archive:
            parts = ("torch/include/", "torch/lib/")
            archive.extractall(unfinished, [name for name in archive.namelist() if name.startswith(parts)])
        unfinished.rename(where)
    return where / "torch"


def mac_symbols(torch: Path) -> dict[str, set[str]]:
    """The symbols that torch's libraries for macOS have, and under LIBCXX those that they take from Apple's libc++."""
    import lief

    found: dict[str, set[str]] = {LIBCXX: set()}
    for name in ("c10", "torch_cpu", "torch_python"):
        library = lief.MachO.parse(str(torch / "lib" / f"lib{name}.dylib")).at(0)
        order = [part.name for part in library.libraries if part.command != lief.MachO.LoadCommand.TYPE.ID_DYLIB]
        # Bits 8 to 15 of a symbol's description: which library it comes from, counted from 1.
        place = order.index(LIBCXX) + 1
        found[LIBCXX] |= {part.name for part in library.imported_symbols if part.description >> 8 & 255 == place}
        found[f"@rpath/lib{name}.dylib"] = {part.name for part in library.exported_symbols}
    return found


def write_libcxx_stub(torch: Path) -> None:
    names = ", ".join(f"'{name}'" for name in sorted(mac_symbols(torch)[LIBCXX]))
    head = f"--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\ninstall-name: '{LIBCXX}'\n"
    text = f"{head}exports:\n  - targets: [ arm64-macos ]\n    symbols: [ {names} ]\n...\n"
    (BUILD / "libc++.tbd").write_text(text)
