// The only file that knows where the elements of tensors lie: which of two share memory, with each other or within.
#pragma once

#include "tensors.h"

namespace rmsnorm {

// Where a tensor's elements begin, and where they end. All sizes by one call: each crosses the stable ABI.
struct Extent {
  explicit Extent(const Tensor& tensor) : begin(static_cast<const char*>(held(tensor.get(), tensor.const_data_ptr()))) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    end = begin + (last + 1) * static_cast<int64_t>(tensor.element_size());
  }
  const char *begin, *end;
};

inline bool are_beside(const Extent& a, const Extent& b) { return a.end <= b.begin || b.end <= a.begin; }

// Whether each element has a place of its own, as it has where each stride passes over all that shorter ones reach.
inline bool has_own_places(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    int64_t reach = 1;
    for (size_t e = 0; e < sizes.size(); ++e)
      if (e != d && sizes[e] > 1 && (strides[e] < strides[d] || (strides[e] == strides[d] && e > d)))
        reach += (sizes[e] - 1) * strides[e];
    if (sizes[d] > 1 && strides[d] < reach) return t.numel() == 0;
  }
  return true;
}

// Whether all elements have places of their own, and both tensors'. Where they lie between each other, rows must be
// alike: the parts of one projection.
inline bool are_apart(const Tensor& a, const Extent& one, const Tensor& b, const Extent& two) {
  const auto sizes = a.sizes(), strides = a.strides(), others = b.strides();
  int64_t least = INT64_MAX, inner = 1, stride = 0;
  bool same = a.element_size() == b.element_size();
  if (!has_own_places(a) || !has_own_places(b)) return false;
  if (a.numel() == 0 || are_beside(one, two)) return true;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] == 1) continue;
    same = same && strides[d] == others[d];
    if (stride == 0 && strides[d] == inner) inner *= sizes[d];
    else least = stride == 0 ? strides[d] : std::min(least, strides[d]), stride = strides[d];
  }
  const int64_t size = static_cast<int64_t>(a.element_size());
  const int64_t apart = std::abs(one.begin - two.begin) / size;
  return same && apart >= inner && apart + inner <= least;
}

}  // namespace rmsnorm
