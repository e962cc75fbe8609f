// The only file that is called by Python with tensors as objects: everyday norms, past torch's dispatcher.
//
// From Python to an operator and back takes 1.3 µs, four times the norm of a row of 4096. (2048x128 fp32 takes
// 0.95 and 0.89 of the operator's time by 1 and 2 threads of a Zen 5, 512x4096 0.97 and 0.93; what is larger than the
// last cache is the operator's, which asks for huge pages.) What torch's dispatcher does besides is asked here: one
// call from Python, where each question from there would be one.
#include <cstring>
#include <numeric>

#include "asked.h"
#include "called.h"

namespace rmsnorm {
namespace {

// What a form is given beside the input, and returns beside the output: a row for each of Call::Kind.
struct Form {
  bool known, residual, next, sum;
};
constexpr Form kForms[] = {
    {true, false, false, false},  // the norm
    {true, true, false, true},    // add + norm
    {true, true, false, false},   // norm + add
    {true, true, true, true},     // the sandwich
    {},
    {},
    {true, false, true, false},  // LayerNorm, with a bias
};

// A call: what Python gives, and what that comes to.
struct Everyday {
  Object kind, shape, eps, offset, round_first, output, memory, next_eps, input, residual, weight, next_weight;
  Plain x = Plain(), other = Plain(), gain = Plain(), next = Plain(), y = Plain(), sum = Plain();
  Call call = {};
  bool recorded = false;

  // Whether it is of torch's own classes, and of sizes and types that the kernels take; else the operator serves it, or
  // refuses it.
  bool is_understood() {
    int64_t number_of_kind;
    if (!integer(kind, number_of_kind) || static_cast<size_t>(number_of_kind) >= std::size(kForms)) return false;
    if (!kForms[number_of_kind].known) return false;
    call.kind = static_cast<Call::Kind>(number_of_kind);
    const auto is_tensor = [](Object object) { return !is_there(object) || is_a(object, python.tensor); };
    const auto is_weight = [&](Object object) { return is_tensor(object) || is_a(object, python.parameter); };
    if (!is_there(input) || is_there(residual) != form().residual || (is_there(next_weight) && !form().next))
      return false;
    if (!is_tensor(input) || !is_tensor(residual) || !is_tensor(output)) return false;
    if (!is_weight(weight) || !is_weight(next_weight)) return false;
    x = Plain(input);
    if (x.type == Type::none || x.count == 0 || is_large(x.count * size_of(x.type))) return false;
    recorded = is_recorded();
    if (recorded && !may_be_few()) return false;  // soon: it costs those that are recorded another way
    if (is_there(residual) && !(other = Plain(residual)).is_like(x)) return false;
    if (is_there(weight)) gain = Plain(weight);
    int64_t sizes[kMaxDims];
    const int dims = is_there(output) && is_there(residual) ? own_sizes(sizes) : sizes_of(shape, sizes);
    if (dims == 0 || !x.ends(sizes, dims)) return false;
    const auto fits = [&](Object object, const Plain& one) {
      return !is_there(object) || (one.type == x.type && one.of.ndim == dims && one.ends(sizes, dims));
    };
    if (is_there(next_weight)) next = Plain(next_weight);
    if (!fits(weight, gain) || !fits(next_weight, next)) return false;
    call.columns = std::accumulate(sizes, sizes + dims, int64_t{1}, std::multiplies<>());
    call.rows = x.count / call.columns;
    return takes_numbers();
  }

  // Of a call in place: the weight's sizes, or else that of the last dimension.
  int own_sizes(int64_t* sizes) const {
    const View& of = is_there(weight) ? gain.of : x.of;
    const int dims = of.ndim > kMaxDims ? 0 : is_there(weight) ? of.ndim : std::min(of.ndim, 1);
    std::copy_n(of.shape + of.ndim - dims, dims, sizes);
    return dims;
  }

  bool takes_numbers() {
    const auto read = [](Object object, double& value) { return !is_there(object) || number(object, value); };
    call.eps = x.type == Type::f64 ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
    if (!read(eps, call.eps) || !number(offset, call.offset)) return false;
    if (is_there(memory) && memory != python.lean) return false;  // a text of Python's source is one object
    if (call.kind == Call::kLayerNorm && !is_there(eps)) return false;
    call.next_eps = call.eps;
    if (recorded && call.offset != 0) return false;
    return read(next_eps, call.next_eps) && call.eps >= 0 && call.next_eps >= 0;
  }

  // Whether nothing of torch's watches, and each tensor shows what its memory holds.
  bool is_alone() const {
    return is_unwatched(input) && shows(input) && shows(residual) && shows(weight) && shows(next_weight) &&
           shows(output) && (!is_there(output) || (may_change(output) && may_change(residual)));
  }

  bool is_recorded() const {
    return (learns(input) || learns(weight) || learns(residual) || learns(next_weight) || learns(output)) &&
           !answers(python.is_recording, python.no);
  }

  // Whether few() may serve it, if it is recorded and its offset is 0.
  bool may_be_few() const {
    return call.kind == Call::kNorm && x.count <= python.as_integer(python.few) && is_there(weight) &&
           !is_there(output) && !is_there(memory);
  }

  // As rms_norm_out() has it: nothing shared with what is written, or the very same elements.
  bool is_safe() const {
    const auto apart = [](const Plain& to, const Plain& from) {
      return to.is_beside(from) || to.begin() == from.begin();
    };
    const auto safe = [&](const Plain& to) {
      return apart(to, x) && apart(to, other) && to.is_beside(gain) && to.is_beside(next);
    };
    return safe(y) && (!form().sum || (safe(sum) && y.is_beside(sum)));
  }

  const Form& form() const { return kForms[call.kind]; }
  Object results();
};

// The output, or (output, sum).
Object Everyday::results() {
  const bool given = is_there(output);
  Owned first(given ? new_reference(output) : room(x));
  Owned second(!form().sum || !first.object ? nullptr : given ? new_reference(residual) : room(x));
  if (!first.object || (form().sum && !second.object)) return nullptr;
  y = Plain(first.object);
  if (form().sum) sum = Plain(second.object);
  if (!y.is_like(x) || (form().sum && !sum.is_like(x)) || (given && !is_safe())) return nothing();
  call.input_type = call.output_type = static_cast<int64_t>(x.type), call.round_first = round_first == python.yes;
  call.weight_type = static_cast<int64_t>(gain.type), call.next_weight_type = static_cast<int64_t>(next.type);
  call.input = x.begin(), call.residual = other.begin(), call.weight = gain.begin(), call.next_weight = next.begin();
  call.output = y.begin(), call.sum = sum.begin();
  try {
    const Released lock(x.count > kSmall);
    run_call(call);
  } catch (...) {  // nothing may be thrown into Python; the operator will meet the same, and say so
    return nothing();
  }
  if (given && !tell(output, form().sum ? residual : nullptr)) return nullptr;
  return form().sum ? python.pack(2, first.object, second.object) : first.hand_on();
}

// The call that is being recorded in this thread, until few() has served it.
thread_local Everyday* recording = nullptr;

// What norm() takes, in this order; what is left out at the end is None.
enum {
  kKind,
  kShape,
  kEps,
  kOffset,
  kRoundFirst,
  kOutput,
  kMemory,
  kNextEps,
  kInput,
  kResidual,
  kWeight,
  kNext,
  kCount
};

// (kind, normalized_shape, eps, offset, round_first, output, memory, next_eps, input, residual, weight, next_weight),
// of which all but the kind and the input may be None: the results, and None where the operator is to be asked: it
// serves everything else, or refuses it. With an output beside a residual the sum goes to the residual's place.
// `recorder` is a list of what records few().
Object norm(Object recorder, Object const* given, intptr_t count) {
  if (count <= kInput || count > kCount) return nothing();
  const auto at = [&](int which) { return which < count ? given[which] : python.none; };
  Everyday asked = {at(kKind),   at(kShape),   at(kEps),   at(kOffset),   at(kRoundFirst), at(kOutput),
                    at(kMemory), at(kNextEps), at(kInput), at(kResidual), at(kWeight),     at(kNext)};
  if (!asked.is_understood() || !asked.is_alone()) return nothing();
  if (!asked.recorded) return asked.results();
  const Owned apply(python.item(recorder, 0));
  if (!apply.object) return failed(), nothing();
  Everyday* const before = std::exchange(recording, &asked);  // what else runs meanwhile may call this, too
  const Object output = python.call(apply.object, asked.input, asked.weight, nullptr);
  recording = before;
  return output;
}

// (context, input, weight): the forward of an autograd.Function that keeps the two tensors and eps, of the call that
// norm() has understood.
Object few(Object, Object const* given, intptr_t count) {
  Everyday* const asked = recording;
  if (count != 3 || !asked || given[1] != asked->input || given[2] != asked->weight) return nothing();
  const Owned kept(python.pack(2, given[1], given[2])), eps(python.float_of(asked->call.eps));
  if (!kept.object || !eps.object || python.set(given[0], python.to_save, kept.object) ||
      python.set(given[0], python.materialize_grads, python.no) || python.set(given[0], python.eps, eps.object))
    return nullptr;
  return asked->results();
}

Method methods[] = {
    {"norm", norm, kFastCall, nullptr},
    {"few", few, kFastCall, nullptr},
};

}  // namespace
}  // namespace rmsnorm

// What PyCFunction_NewEx makes the functions of, one behind the other, given DLPack's table and the rest of `Python`;
// null for a table of another kind.
extern "C" __attribute__((visibility("default"))) void* rmsnorm_handed(const void* table, void* const* rest,
                                                                       int64_t count) {
  using rmsnorm::python;
  constexpr int64_t known = sizeof(python) / sizeof(void*) - 1;
  const auto api = static_cast<const rmsnorm::Table*>(table);
  if (api->major != rmsnorm::kMajor || !api->view || count != known) return nullptr;
  std::memcpy(&python.as_double, rest, known * sizeof(void*));
  python.view = api->view;
  return rmsnorm::methods;
}
