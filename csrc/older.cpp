// The only file that knows the age of libstdc++ and glibc: it has what a library built with a newer gcc would ask of
// them, so that gcc 12 makes wheels for manylinux_2_28 (GLIBCXX_3.4.24 or older, GLIBC_2.28). Linking libstdc++
// statically would do that, too, but torch has to catch what we throw, and two copies count exceptions apart.
// packaging/check.py reads the versions that a wheel asks for.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__)

// In headers only: instantiated here, as they are in libstdc++ from gcc 9 and 11 on.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;

namespace rmsnorm {
[[noreturn, gnu::visibility("hidden")]] void throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}  // namespace rmsnorm

// What glibc 2.32 tells shared_ptr: whether it may count without atomic instructions. Never, then.
#if defined(__GLIBC__)
extern "C" {
[[gnu::visibility("hidden")]] extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}
#endif

#endif
