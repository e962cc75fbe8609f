// The only file that both sides of the boundary include: what a kernel is asked to do, in plain pointers.
//
// A kernel is handed a batch of rows as an array of row pointers. So any outer layout (strided, transposed,
// expanded, sliced) costs nothing but the pointers, and how rows are grouped depends on their index alone.
#pragma once

#include <cstdint>

// Both sides have these functions: one that is left to a linker may be the copy of a CPU that is not this one.
#define RMSNORM_ALWAYS inline __attribute__((always_inline))

namespace rmsnorm {

enum class Type : int8_t { none, f32, f64, bf16, f16 };

RMSNORM_ALWAYS int64_t size_of(Type type) {
  return type == Type::f64 ? 8 : type == Type::f32 ? 4 : type == Type::none ? 0 : 2;
}

// The type in which statistics leave the kernel and gains are formed: fp32, or fp64 for fp64.
RMSNORM_ALWAYS Type wide(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

// Most rows in one batch: enough that the first and the last row, which have nobody to overlap with, hardly count. A
// divisor of kFlush, so that batches never straddle a flush of the weight's gradient.
constexpr int64_t kBatch = 32;

// Columns of scratch that the kernels keep in an order of their own: whole vectors of the widest CPU.
RMSNORM_ALWAYS int64_t padded(int64_t columns) { return (columns + 31) / 32 * 32; }

// Rows whose weight gradients are summed in fp32 before they are added to the fp64 totals.
constexpr int64_t kFlush = 32;

// Rows of one chunk of backward at least, and chunks at most (rows.h).
constexpr int64_t kLeastChunk = 32, kMostChunks = 128;

// The activation of a gate that multiplies the output, or first of all the input.
enum class Gate : int8_t { none, silu, sigmoid };

// What is turned: the norm's output (which has a gain then), the input itself, or, backwards, a gradient.
enum class Turn : int8_t { none, norm, input, back };

// What is modulated: the norm's output, by scales and shifts, or, before a norm, what is added to a residual, by a
// gate.
enum class Modulate : int8_t { none, norm, add };

// A weight or its gradient, by rows: row r of a tensor goes with row r mod `count`.
struct WeightRows {
  char* data = nullptr;
  int64_t count = 1;
  int64_t stride = 0;  // bytes
};

struct Forward {
  int64_t columns;
  double eps;  // added to the mean square; negative: -eps is the least that it counts as (statistic.h)
  Type input;
  Type output;       // the input's, or f32 for a half input that is rounded before an f32 gain
  Type gain_type;    // none, the input's, or wide(input)
  bool round_first;  // round to the input's type before the gain (Llama) instead of after it (torch)
  bool add;          // sum = input + residual first, or,
  bool scale;        // with it, input · factor
  bool add_after;    // the output is residual + the norm's, or,
  bool times;        // with it, residual · the norm's
  bool twice;        // sum = that, with the first norm's gain and eps, and the output is the sum's norm
  WeightRows gain;   // of these: of the input's type and without the offset, or formed, wide, in the kernel's own order
  WeightRows first_gain;
  double offset, first_eps, factor;
  bool layer;        // LayerNorm: the mean is subtracted; gain_type is none or wide(input), with a bias of that type
  const void* bias;  // or of the general form, of
  Type bias_type;
  Gate gate;           // the gain is there then, and as in Backward
  bool gate_first;     // output may be f32 only then
  bool round_output;   // to the input's type, before it is f32: of the general form, or add in bf16 as Llama rounds
  bool round_product;  // rounding first, the product with the gain is rounded to the input's type, too
  Turn turn;           // pairs of columns are turned while they are stored (heads.h); output is the input's type
  bool interleaved;    // the pairs are neighbours, not columns of two halves
  Type angle;          // of cosines and sines: the input's, or f32 for a half input
  int64_t turned;      // columns that are turned: the first ones
  bool general;        // the form of general.h; `input` is the type in which a row is computed, and these are those of
  Type x, residual;    // what is read, and of
  Type sum;            // what is written, or, where nothing is added, of x again; output may be none
  bool unrounded;      // of half types alone: their sum is normalised before it is rounded (unrounded.h)
  int64_t counted;     // columns in the statistic: the first ones
  int64_t divisor;     // of the sum of their squares: as many, or 1 for an L2 norm; 0: all columns there are
  Modulate modulate;   // output is the input's type then, and there is no gain
  Type modulation;     // of scales and shifts, or of gates: the input's, or f32 for a half input
};

// Rows whose sums are found before the first of them is stored: 16 KiB of them, so that what is read again is still in
// L1 beside the gain and the output (512x4096 fp32 on a Zen 5: 1.5 times memcpy; one row's sum and another's store in
// one loop, 1.8).
constexpr int64_t kBlockRows = kBatch;
RMSNORM_ALWAYS int64_t block_rows(Type type, int64_t columns) {
  const int64_t most = 16384 / (columns > 0 ? columns * size_of(type) : 1);
  return most < 1 ? 1 : most > kBlockRows ? kBlockRows : most;
}

// Rows whose gradients are turned back before the first of them is used: two of them share what a column needs.
RMSNORM_ALWAYS int64_t turned_rows(Type type, int64_t columns) {
  const int64_t rows = block_rows(wide(type), columns);
  return rows < 2 ? 2 : rows;
}

struct ForwardRows {
  int64_t count;
  void* input[kBatch];     // read only, as are the residual, the gate and the gain
  void* residual[kBatch];  // or sines, or shifts
  void* sum[kBatch];
  void* output[kBatch];
  void* gate[kBatch];  // or cosines, or scales
  void* gain[kBatch];
  void* first_gain[kBatch];
  void* scratch;     // scratch_bytes() of rows.h: a block of rows, if the gate is first, if there are two norms, or if
                     // what is turned is normed
  void* rstd;        // one wide(input) value per row of this batch, negative where it is the floor's; or null
  void* first_rstd;  // the same, of the first of two norms
  double* mean;      // the same, for LayerNorm
  bool stream;       // output is larger than the caches: its stores should go past them
  bool add_again;    // a sum's should, and it is added again for them, or kept in scratch until then
  bool back;         // rows are stored from their end on
  bool keep_gain;    // a row, its output and its gain fit in L1, if only just
  bool ask;          // rows to come are asked for into L2, as L1 has no room for them
  bool even;         // all rows lie as far apart as the first two, and `count`, which may be any, goes by that (even.h)
  bool woven;        // with it, in a cache: rows are stored in the loop that sums others, as past the caches
  int64_t next;      // bytes from a row of the input to the next, where they are evenly spaced: to ask for rows to come
  int64_t next_output, next_residual;  // the same, of the others
};

struct Backward {
  int64_t columns;
  double eps;
  Type input;  // also the gradient's type
  bool need_input;
  bool need_weight;
  bool add;         // a gradient arrives at the sum itself, and is added
  bool round_add;   // to what is rounded first, as by two steps
  WeightRows gain;  // wide(input), or null; what make_gain() made for this type of row, unless that is f32 or f64
  bool layer;       // LayerNorm; add is false
  Gate gate;        // there is a gain then; add is false
  bool gate_first;
  bool need_gate;
  bool general;              // any row of general.h; what is missing there, the other fields have
  Type grad;                 // of what arrives at the output, if anything does
  bool need_bias;            // with or without need_weight; of a LayerNorm that means both
  int64_t counted, divisor;  // as in Forward
  const void* mask;          // ones of the columns that count, then zeros, as a gain; null where all do
  WeightRows inverse;  // wide(input), in the order of the gain, which is there then, or null: 1 / gain, and 0 for 0.
                       // The input is the norm's output, and x̂ = output · inverse
  Forward
      turn;  // of turn.turn == Turn::norm: the gradient is turned back first; need_input, and a gain, are there then
  Modulate modulate;  // need_weight: the gradients of modulations that rows share are added up
  Type modulation;    // as in Forward
};

struct BackwardRows {
  int64_t count;
  void* input[kBatch];  // read only, as are the gradients that come in, the gate and the gain
  void* grad[kBatch];
  void* grad_sum[kBatch];  // or sines
  void* grad_input[kBatch];
  void* gate[kBatch];       // or cosines, or scales, or inverse gains
  void* grad_gate[kBatch];  // or where the gradient of a row's own scales goes, or null
  void* gain[kBatch];       // or the same of its shifts
  const void* rstd;         // one wide(input) value per row of this batch, as forward kept it
  const double* mean;  // the same, for LayerNorm; with inverse gains, and of the general form, what arrives at 1/rms
  // wide(input)[padded(columns)] each, added to, in the kernel's order; LayerNorm has the bias's behind it, scales the
  // shifts'.
  void* grad_weight[kBatch];
  bool shared_weight;  // all rows have one
  bool stream, back;   // as in forward
  bool ask;            // rows to come are asked for: so many further on as there are here, of modulated forms, or the
                       // next two, where a gradient is added
  bool pairs;          // two rows are stored while the next two are summed, where there is a loop for it
  int64_t next[2];     // as in forward, of input and grad
  void* scratch;       // turned_rows() · padded(columns) of wide(input); only if the gradient is turned
};

// What the sandwich's gradients do ahead of a batch: they ask for columns, and sum the next batch's first two rows
// while they store this one's last two. So those have pointers behind this one's, of the second norm.
struct SandwichAhead {
  int64_t asks;    // bytes from a column to the one that is asked for
  bool more;       // there are two such rows
  bool found;      // whether that was done, for this batch by the last, and, behind it, for the next: then these are
  double sums[2];  // their sums of h·x̂
};

using ForwardKernel = void (*)(const Forward&, const ForwardRows&);
using BackwardKernel = void (*)(const Backward&, const BackwardRows&);

// What finds the kernel for what is asked.
struct Kernels {
  ForwardKernel (*forward)(const Forward&);
  BackwardKernel (*backward)(const Backward&);
  // Both backward kernels of a sandwich, first that of x, then that of the sum, with all gradients of fp32 or bf16,
  // over an even number of rows. False where a row isn't safe: nothing is done then. Or null.
  bool (*sandwich)(Type type, const Backward* norms, const BackwardRows* rows, SandwichAhead& ahead);
};

// What a weight's gradient is the sum of, in this order: totals, so many doubles apart, and parts, so many bytes apart,
// in wide() of a type of rows and in the columns' order.
struct Summands {
  const double* totals = nullptr;
  int64_t totals_count = 0, totals_apart = 0;
  const char* parts = nullptr;
  int64_t parts_count = 0, parts_apart = 0;
  Type row = Type::none;
};

// One instance per CPU target, all compiled from target.cpp.
struct Target : Kernels {
  const char* name;
  bool even, even_bf16;  // has the loops of even.h for rows of fp32, and of bf16
  // gain[padded(count)] = offset + weight, in wide(input); weight of any type. In the order in which backward wants it
  // for rows of a type; for none, in the columns'.
  void (*make_gain)(Type row, Type weight_type, const void* weight, double offset, Type gain_type, void* gain,
                    int64_t count);
  // total[i] += partial[i] (= for the first), then partial[i] = 0, for the gradient of the weight of rows of a type.
  void (*flush)(Type row, void* partial, double* total, int64_t count, bool first);
  // The columns of a partial, which rows of bf16 sum in another order, in their own.
  void (*put_in_order)(Type row, void* partial, int64_t count);
  // weight gradient [begin, end) = the sum of what there is, in the weight's type.
  void (*finish)(const Summands& summands, int64_t begin, int64_t end, Type type, void* grad_weight);
  // The same of a single partial, which is all there is: as flush() and finish() would have it, without totals.
  void (*finish_one)(Type row, void* partial, int64_t count, Type type, void* grad_weight);
  // What decides the bits, as text of at most `room` bytes.
  void (*describe)(char* text, int64_t room);
  // Bytes and a scale for a row of any type but f64, in int8 or float8.
  void (*quantise)(Type type, const void* row, int64_t columns, bool e4m3, void* codes, float* scale);
};

// The targets that were built and that this CPU can run, best first; ends with null.
const Target* const* available_targets();
// The target in use: the best one, or the one that was set.
const Target& current_target();

}  // namespace rmsnorm
