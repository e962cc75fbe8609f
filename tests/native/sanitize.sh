#!/usr/bin/env bash
# `make sanitize`: the C++ kernels alone, without torch, where bugs show that equal results on one CPU hide.
#
#   AddressSanitizer, UBSan   compare_targets.cpp: three targets, every row at the end of its own allocation
#                             scratch.cpp: what the modulated forms ask for, and what they then use of it
#   ThreadSanitizer           threads.cpp: rows, chunks and columns split over threads as ops.cpp splits them
#   AArch64, under qemu       compare_targets.cpp --digest: the baseline's bits are those that it has on x86-64
#
# Needs x86-64 with AVX2, g++, and for AArch64 a cross compiler and qemu. 400 s of CPU time on a Zen 3, 320 of them
# compiling, two processes at a time: three and a half minutes on two idle cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { echo "make sanitize: $*" >&2 && exit 1; }
cxx=${CXX:-c++}
grep -qw avx2 /proc/cpuinfo || fail "needs an x86-64 CPU with AVX2"
type "$cxx" aarch64-linux-gnu-g++ qemu-aarch64-static >/dev/null 2>&1 ||
  fail "install what it needs: apt-get install g++ g++-aarch64-linux-gnu qemu-user-static"
where=$(mktemp -d)
trap 'rm -rf "$where"' EXIT

# The numerics contract is in setup.py's flags; whatever follows them here wins.
kernel=$(sed -n 's/^KERNEL_FLAGS +*= \[\(.*\)\]$/\1/p' setup.py | tr -d '",' | tr '\n' ' ')
[[ $kernel == *-ffp-contract=off* ]] || fail "found no KERNEL_FLAGS in setup.py"
kernel+=" $(sed -n 's/^GARBAGE = "\(.*\)"$/\1/p' setup.py)"
avx2="-mavx2 -mfma -mf16c"
# Calls instead of inline checks, no markers where locals go out of scope, and no UBSan checks for what ASan sees
# itself: all together, the AVX2 target takes 70 s to compile instead of 270.
asan="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all --param asan-instrumentation-with-call-threshold=0"
asan+=" -fno-sanitize-address-use-after-scope -fno-sanitize=null,object-size,pointer-overflow,vptr"
tsan="-O1 -g1 -fsanitize=thread"

# Reads command lines and runs them two at a time; the first that fails is the last that is started.
two_at_a_time() { sed 's/$/ || exit 255/' | xargs -d '\n' -n 1 -P 2 sh -c; }
# kernels NAME OBJECT COMPILER FLAGS... and driver SOURCE OBJECT COMPILER FLAGS... print a command line.
kernels() {
  echo "${*:3} -std=c++20 '-DRMSNORM_TARGET=target_$1' '-DRMSNORM_TARGET_NAME=\"$1\"' -c csrc/target.cpp -o $where/$2.o"
}
driver() { echo "${*:3} -std=c++20 -Wall -Wextra -Werror -c $1 -o $where/$2.o"; }

echo "compiling the kernels six times: three minutes on two cores"
arm="aarch64-linux-gnu-g++ $kernel -fno-tree-pta" # as setup.py builds this baseline
two_at_a_time <<EOF
$(kernels baseline arm_baseline "$arm")
$(kernels baseline asan_baseline "$cxx $kernel $asan")
$(kernels avx2 asan_avx2 "$cxx $kernel $asan $avx2")
$(kernels avx512bf16 asan_avx512bf16 "$cxx $kernel $asan $avx2" -DRMSNORM_EMULATE_AVX512)
$(kernels baseline tsan_baseline "$cxx $kernel $tsan")
$(kernels avx2 tsan_avx2 "$cxx $kernel $tsan $avx2")
$(driver tests/native/compare_targets.cpp asan_driver "$cxx $asan")
$(driver tests/native/scratch.cpp scratch "$cxx $asan")
$(driver tests/native/compare_targets.cpp arm_driver "aarch64-linux-gnu-g++ -O2")
$(driver tests/native/threads.cpp tsan_driver "$cxx $tsan")
$(driver csrc/dispatch.cpp tsan_dispatch "$cxx $tsan")
EOF
$cxx -fsanitize=address,undefined "$where"/asan_*.o -o "$where/asan"
$cxx -fsanitize=address,undefined "$where/scratch.o" -o "$where/scratch"
$cxx -fsanitize=thread "$where"/tsan_*.o -o "$where/tsan"
aarch64-linux-gnu-g++ -static "$where"/arm_*.o -o "$where/arm"

# The sanitizers of gcc 12 know no mappings with more than 28 random bits; kernels since 6.6 may use 32.
fixed=$([[ $(cat /proc/sys/vm/mmap_rnd_bits 2>/dev/null || echo 28) -le 28 ]] || echo setarch -R)
# LeakSanitizer stops the process with ptrace, which some containers forbid: then leaks go unseen, and nothing else.
echo 'int main() {}' | $cxx -fsanitize=address -x c++ - -o "$where/probe"
leaks=1
$fixed "$where/probe" >/dev/null 2>&1 || leaks=0
[[ $leaks == 1 ]] || echo "LeakSanitizer can't run here: leaks are not looked for"
export ASAN_OPTIONS=detect_leaks=$leaks UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
two_at_a_time <<EOF
$fixed $where/scratch
$fixed $where/asan $where/x86.txt
$fixed $where/tsan
qemu-aarch64-static $where/arm --digest $where/arm.txt
EOF
[[ -s $where/x86.txt ]] || fail "no digests to compare"
diff "$where/x86.txt" "$where/arm.txt" >"$where/diff.txt" ||
  fail "AArch64 (>) has other bits than x86-64 (<):"$'\n'"$(head -n 20 "$where/diff.txt")"
echo "$(wc -l <"$where/arm.txt") tensors of the baseline target on AArch64, all equal to those on x86-64"
