#pragma once

#include <cstdint>

#include "gemm.h"
#include "quantized.h"

namespace quire {

// Of each row of logits the `chosen` largest, largest first, of equal ones the lower number first; and their shares of
// the softmax over all of the row, or over those that are chosen. Not a number if one of the row is none.
struct Route {
  int64_t rows;
  const float* logits;  // [rows, experts]
  int64_t stride, experts, chosen;
  int64_t over_chosen;
  int64_t* choice;  // [rows, chosen]
  float* shares;    // [rows, chosen]
};
void route(Pool& pool, const Route& call);

// Gated MLPs of which each row goes through a few:
//
//     out[t] = Σ_r shares[t, r] · down_e(silu(gate_e(x[t])) · up_e(x[t])),   e = choice[t, r]
//
// With a limit (1 + up) · gate · sigmoid(alpha · gate) goes down, of min(gate, limit) and of up within ±limit.
struct Experts {
  int64_t rows;
  Format format;  // of x and out
  const void* x;  // [rows, width]
  int64_t stride, width, inner, experts, chosen;
  const int64_t* choice;  // [rows, chosen], none twice in a row
  const float* shares;    // [rows, chosen]
  double alpha, limit;    // no limit: 0
  // The products gate, up and down of each expert, [experts, 3], without rows: one of the two, the other null.
  const Linear* floats;
  const QuantizedLinear* quantized;
  void* out;  // [rows, width]
};
void experts(Pool& pool, const Experts& call, void* scratch);
int64_t experts_scratch(int threads, const Experts& call);

}  // namespace quire
