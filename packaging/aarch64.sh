#!/usr/bin/env bash
# `make aarch64`: installs the aarch64 wheel beside torch's under qemu-user, compares the bits of packaging/bits.py with
# those of this machine's library, and runs a core of the tests. On an AArch64 machine nothing of it is needed.
#
# Debian's Python for arm64 and the libraries that it needs are unpacked into build/wheels/arm64, not installed: no root,
# no foreign architecture in dpkg. torch 2.10.0 is the last release whose wheel for aarch64 needs no CUDA libraries, and the
# oldest that we promise. Downloads 190 MB once. qemu has no vectors wider than these, and no clock worth reading.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "packaging/aarch64.sh: $*" >&2 && exit 1; }
type qemu-aarch64-static apt-get >/dev/null 2>&1 || fail "needs Debian or Ubuntu, and apt-get install qemu-user-static"
wheel=$(realpath "${1:-$(ls dist/rmsnorm-*-py3-none-manylinux_2_28_aarch64.whl)}")
here=${PYTHON:-.venv/bin/python}
where=$PWD/build/wheels/arm64
site=$where/site

if [[ ! -e $where/root/done ]]; then
  mkdir -p "$where"/{lists/partial,cache/archives/partial,root}
  touch "$where/status" # nothing is installed: so all that Python needs is downloaded
  apt=(-qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o "Dir::State::lists=$where/lists"
    -o "Dir::State::status=$where/status" -o "Dir::Cache=$where/cache" -o APT::Sandbox::User="$(id -un)"
    -o Debug::NoLocking=1)
  apt-get "${apt[@]}" update
  apt-get "${apt[@]}" --no-install-recommends --download-only -y install python3-minimal libpython3-stdlib libstdc++6
  for package in "$where"/cache/archives/*.deb; do dpkg -x "$package" "$where/root"; done
  touch "$where/root/done"
fi
python=$(realpath "$where"/root/usr/bin/python3)
version=$(sed 's/.*python//' <<<"$python")

pip() { # for the other machine: only wheels, and no scripts that would run here
  "$here" -m pip install --quiet --disable-pip-version-check --no-compile --upgrade --only-binary :all: --target "$site" \
    --python-version "$version" --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux2014_aarch64 "$@"
}
if [[ ! -e $site/done ]]; then
  rm -rf "$site"
  pip --no-deps torch==2.10.0 # alone: pip reads the markers of its dependencies for this machine, and wants CUDA
  pip filelock typing-extensions sympy networkx jinja2 fsspec numpy setuptools pytest==9.1.1 pytest-xdist==3.8.0 hypothesis==6.170.15
  touch "$site/done"
fi
rm -rf "$site"/rmsnorm*
pip --no-deps "$wheel"

away() {
  (cd "$where" && OMP_NUM_THREADS=1 PYTHONPATH=$site qemu-aarch64-static -L "$where/root" "$python" \
    -W error::RuntimeWarning "$@")
}
away "$PWD/packaging/bits.py" >"$where/there.txt"
"$here" packaging/bits.py >"$where/here.txt"
diff "$where/here.txt" "$where/there.txt" >"$where/diff.txt" ||
  fail "aarch64 (>) has other bits than this machine (<):"$'\n'"$(head -n 20 "$where/diff.txt")"
echo "$(wc -l <"$where/there.txt") results on aarch64, forward and backward, with the bits of $(uname -m)"
rm -rf "$where/tests" && mkdir "$where/tests" && cp tests/*.py "$where/tests"
# Those of other CPU targets skip themselves, the compiler and other programs would not be under qemu, and torch takes
# most of the time of the reference.
away -m pytest -q -p no:cacheprovider -m "not heavy" -k "${CORE:-not compile and not programs and not reference}" \
  "$where/tests/test_module.py" "$where"/tests/test_install*.py "$where/tests/test_add.py"
