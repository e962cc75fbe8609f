// The only file that asks what torch's dispatcher would decide, of tensors that Python hands over: past it, whoever
// watches would see nothing, and who shows other values than lie in memory would be read as they lie.
#pragma once

#include "python.h"

namespace rmsnorm {

// Elements from which on other threads of Python don't wait: 4 µs by one thread, where letting go takes 0.05.
constexpr int64_t kSmall = 32768;

inline bool is_there(Object object) { return object != python.none; }

// Whether nobody hears of operators. Profilers do, and what has callbacks of its own (the execution trace's observer):
// torch's C++ knows of all, what Python knows is whether torch.profiler runs.
inline bool is_unheard() {
  return python.place ? !python.observed() : has(python.profiler, python.is_profiling, python.no);
}

// Whether nobody records operators before autograd sees them: make_fx(pre_dispatch=True), whose mode is in no list.
inline bool is_unforeseen() {
  return python.place ? !python.included(static_cast<uint16_t>(python.key))
                      : answers(python.is_included, python.pre_dispatch, python.no);
}

// Whether nothing of torch's watches: no mode, profiler, tracer or transform. Any tensor of torch's own class will do.
inline bool is_unwatched(Object tensor) {
  return is_unheard() && is_unforeseen() && has(python.forward_ad, python.level, python.minus_one) &&
         answers(python.is_overridden, tensor, python.no) && answers(python.modes, python.zero) &&
         answers(python.is_transformed, python.no) && answers(python.tracer, python.none);
}

// Of a tensor, or None, C++ is asked where it can be: of Python, a question takes 65 ns, in which it lets go of its
// lock.

// Whether it shows what its memory holds: it may be a negated view.
inline bool shows(Object tensor) {
  if (!is_there(tensor)) return true;
  return python.place ? !python.negated(inside(tensor)) : answers(python.is_negated, tensor, python.no);
}

// Whether it may be written to: outside inference mode, tensors of that may not.
inline bool may_change(Object tensor) {
  if (!is_there(tensor)) return true;
  const bool plain =
      python.place ? !python.made_in_inference(inside(tensor)) : answers(python.is_inference, tensor, python.no);
  return plain || answers(python.in_inference, python.yes);
}

// Whether it has gradients to come, if they are recorded.
inline bool learns(Object tensor) {
  if (!is_there(tensor)) return false;
  return python.place ? python.requires_gradient(*static_cast<void**>(inside(tensor)))
                      : !has(tensor, python.requires_grad, python.no);
}

// Tells autograd what was written, as an operator of ours doesn't; false with an error of Python's.
inline bool tell(Object first, Object second = nullptr) {
  const Owned tensors(second ? python.pack(2, first, second) : python.pack(1, first));
  return tensors.object && Owned(python.call(python.written, tensors.object, nullptr)).object;
}

}  // namespace rmsnorm
