// The only file that makes a gain of a weight: what a kernel multiplies with, in the type and the order that it reads.
#pragma once

#include "tensors.h"

namespace rmsnorm {

// The gain as a kernel reads it: the weight in place, or offset + weight formed once in the wide type; without a weight
// none, or ones.
class Gain {
 public:
  enum For { kForward, kForwardWide, kBackward };
  Gain() = default;

  // A weight of several rows goes with as many of the input's, again and again.
  Gain(const OptionalTensor& weight, double offset, const Tensor& x, const Shape& shape, For use)
      : Gain(weight, offset, x, type_of(x), shape, use) {}

  // The same of rows that become another type, before they meet it.
  Gain(const OptionalTensor& weight, double offset, const Tensor& x, Type row, const Shape& shape, For use) {
    if (!weight) return;
    check_weight(*weight, x, shape);
    check_types(type_of(*weight), type_of(x));
    const Tensor& plain = plain_rows(*weight, 0, copy_);
    const auto sizes = weight->sizes();
    const int64_t spanned = static_cast<int64_t>(sizes.size()) - shape.dims;
    for (int64_t d = 0; d < spanned; ++d) rows.count *= std::max<int64_t>(sizes[d], 1);
    form(type_of(plain), data_of(plain), plain.numel() != 0, offset, row, shape.columns, use);
  }

  // The same of plain memory: one row, or none if its type is.
  Gain(Type weight, const char* data, double offset, Type input, int64_t columns, For use) {
    if (weight == Type::none) return;
    check_types(weight, input);
    form(weight, data, columns != 0, offset, input, columns, use);
  }

  // `count` times `value`.
  Gain(double value, Type input, int64_t count) : type(wide(input)), formed_(count * size_of(type)) {
    rows.data = formed_.get();
    if (type == Type::f64) std::fill_n(reinterpret_cast<double*>(formed_.get()), count, value);
    else std::fill_n(reinterpret_cast<float*>(formed_.get()), count, static_cast<float>(value));
  }

  Type type = Type::none;
  WeightRows rows;
  const Target* target = &current_target();  // the gain is in its order: no other may read it

 private:
  static void check_types(Type weight, Type input) {
    require(weight != Type::f64 || input == Type::f64,
            "rmsnorm: no native kernel for a float64 weight and a narrower input");
  }

  void form(Type weight, const char* data, bool any, double offset, Type input, int64_t columns, For use) {
    type = weight;
    rows.data = const_cast<char*>(data);
    rows.stride = columns * size_of(type);
    const bool own_order = use == kBackward && size_of(input) == 2;
    if (offset == 0.0 && !own_order && (type == wide(input) || (type == input && use == kForward))) return;
    const int64_t stride = padded(columns) * size_of(wide(input));
    formed_ = Lines(rows.count * stride);
    for (int64_t row = 0; row < rows.count && any; ++row)  // one of no rows has no data to read
      target->make_gain(own_order ? input : Type::none, type, rows.data + row * rows.stride, offset, wide(input),
                        formed_.get() + row * stride, columns);
    type = wide(input);
    rows.data = formed_.get(), rows.stride = stride;
  }

  OptionalTensor copy_;
  Lines formed_;
};

// The weight's gain, or ones: of forms whose kernels always multiply.
inline Gain gain_or_ones(const OptionalTensor& weight, double offset, const Tensor& x, const Shape& shape,
                         Gain::For use) {
  return weight ? Gain(weight, offset, x, shape, use) : Gain(1.0, type_of(x), padded(shape.columns));
}

// Whether the sandwich reads half weights where they are. To form gains takes as long as to widen a weight of each of 8
// rows: 1 row of 4096 bf16, with an offset, takes 8.0 us without and 9.1 with.
inline bool few_rows(Type input, int64_t rows) { return size_of(input) == 2 && rows < 8; }

}  // namespace rmsnorm
