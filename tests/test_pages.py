"""Pages of large fresh outputs are made by one call of the system a thread, before anything is stored there."""

import shutil
import subprocess
import sys

import pytest

from rmsnorm import _native

pytestmark = pytest.mark.skipif(
    not (_native.cpu_targets() and sys.platform == "linux" and shutil.which("c++")),
    reason="needs Linux, a compiler and the library",
)

# Stands before the system's: remembers which pages are to be made (23: MADV_POPULATE_WRITE).
SHIM = """
#include <sys/syscall.h>
#include <unistd.h>
extern "C" unsigned long asked[2][64];
extern "C" int count;
unsigned long asked[2][64];
int count;
extern "C" int madvise(void* begin, size_t length, int advice) noexcept {
  if (advice == 23 && count < 64) {
    const int k = __atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST);
    asked[0][k] = (unsigned long)begin, asked[1][k] = length;
  }
  return syscall(SYS_madvise, begin, length, advice);
}
"""

PROGRAM = """
import ctypes, os, torch, rmsnorm
from rmsnorm import _native
shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
count, asked = ctypes.c_int.in_dll(shim, "count"), (ctypes.c_ulong * 64 * 2).in_dll(shim, "asked")
torch.set_num_threads(int(os.environ["THREADS"]))
x, g = torch.randn(1024, 1024), torch.randn(1024, 1024)
w, kept = torch.ones(1024, requires_grad=True), torch.empty(1024, 1024)
given = x.clone().requires_grad_()
recorded = rmsnorm.rms_norm(given, 1024, w)
_native.set_cache_bytes(3, x.nbytes)

def made(outputs):
    ranges = sorted((asked[0][k], asked[0][k] + asked[1][k]) for k in range(count.value))
    count.value = 0
    def whole(y):  # each page of it that begins in it, once
        place, end = -(-y.data_ptr() // 4096) * 4096, y.data_ptr() + y.nbytes
        for first, last in ranges:
            place = last if first == place else place
        return end <= place < end + 4096
    return len(ranges), [whole(y) for y in outputs]

print(made([rmsnorm.rms_norm(x, 1024, w.detach())]))
print(made(rmsnorm.add_rms_norm(x, g, 1024, w.detach())))
print(made([torch.autograd.grad(recorded, (given, w), g)[0]]))
print(made([rmsnorm.rms_norm(x, 1024, w.detach(), out=kept)]))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["c++", "-O1", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=SHIM, text=True, check=True)
    return str(path)


@pytest.mark.parametrize("threads", [1, 2])
def test_pages_of_fresh_outputs_are_made_by_all_threads(python, shim, threads):
    done = python(PROGRAM, LD_PRELOAD=shim, MALLOC_MMAP_THRESHOLD_="1048576", THREADS=str(threads))
    assert done.stdout.splitlines() == [
        f"({threads}, [True])",
        f"({2 * threads}, [True, True])",
        f"({threads}, [True])",
        "(0, [False])",  # what is given has its pages
    ], done.stderr


def test_pages_that_are_there_are_not_made_again(python, shim):
    """Of a heap that keeps what is freed."""
    calls = "for _ in range(3): rmsnorm.rms_norm(x, 1024, w.detach())"
    again = f"\n{calls}\ncount.value = 0\n{calls}\nprint(count.value)"
    keeps = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
    done = python(PROGRAM + again, LD_PRELOAD=shim, THREADS="1", **keeps)
    assert done.stdout.splitlines()[-1:] == ["0"], done.stderr
