// The only file that raises: Python gets these words alone, where STD_TORCH_CHECK puts a function, a file and a line in
// front of them.
#pragma once

#include <sstream>
#include <stdexcept>

namespace rmsnorm {

template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Parts>
void require(bool good, const Parts&... parts) {
  if (!good) [[unlikely]]
    refuse(parts...);
}

}  // namespace rmsnorm
