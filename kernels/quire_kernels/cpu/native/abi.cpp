// The door: what Python calls through ctypes. One `Engine` is a pool of threads and a scratch; its calls do not overlap.
//
// All operations of a step have one form, a struct that begins with the number of rows. So a row of them is a program
// that one call runs for any number of tokens.
#include <cstdlib>
#include <exception>

#include "attention.h"
#include "experts.h"
#include "gemm.h"
#include "head.h"
#include "pointwise.h"
#include "quantized.h"

namespace {

struct Engine {
  explicit Engine(int threads) : pool(threads) {}
  ~Engine() { std::free(scratch); }

  void* room(int64_t bytes) {
    if (bytes > size) {
      std::free(scratch);
      size = (bytes + 4095) / 4096 * 4096;
      scratch = std::aligned_alloc(4096, static_cast<size_t>(size));
      if (!scratch) std::abort();  // a step that has no memory cannot go on, and nothing here may throw
    }
    return scratch;
  }

  quire::Pool pool;
  void* scratch = nullptr;
  int64_t size = 0;
};

}  // namespace

using namespace quire;

extern "C" {

// Null if the machine gives no such number of threads.
void* quire_open(int threads) {
  try {
    return new Engine(threads);
  } catch (const std::exception&) {
    return nullptr;
  }
}
// Bytes that it keeps between operations.
int64_t quire_kept(void* engine) { return static_cast<Engine*>(engine)->size; }
void quire_close(void* engine) { delete static_cast<Engine*>(engine); }

void quire_pack(void* engine, int64_t format, void* weight, int64_t outputs, int64_t width) {
  auto* it = static_cast<Engine*>(engine);
  pack(it->pool, static_cast<Format>(format), weight, outputs, width,
       it->room(pack_scratch(it->pool.size(), static_cast<Format>(format), width)));
}

void quire_pack_quantized(void* engine, void* weight, int64_t outputs, int64_t row_bytes, int four_bits) {
  auto* it = static_cast<Engine*>(engine);
  pack_quantized(it->pool, weight, outputs, row_bytes, four_bits != 0,
                 it->room(pack_quantized_scratch(it->pool.size(), row_bytes)));
}

void quire_unpack_rows(Engine* it, const UnpackRows* call) { unpack_rows(it->pool, *call); }
void quire_unpack_quantized(Engine* it, const UnpackQuantized* call) { unpack_quantized(it->pool, *call); }
void quire_linear(Engine* it, const Linear* call) {
  linear(it->pool, *call, it->room(linear_scratch(call->format, call->rows, call->width)));
}
void quire_quantized_linear(Engine* it, const QuantizedLinear* call) {
  quantized_linear(it->pool, *call, it->room(quantized_scratch(it->pool.size(), *call)));
}
void quire_linear_largest(Engine* it, const Head<Linear>* call) {
  largest_of(it->pool, *call, it->room(head_scratch(it->pool.size(), *call)));
}
void quire_quantized_largest(Engine* it, const Head<QuantizedLinear>* call) {
  largest_of(it->pool, *call, it->room(head_scratch(it->pool.size(), *call)));
}
void quire_route(Engine* it, const Route* call) { route(it->pool, *call); }
void quire_experts(Engine* it, const Experts* call) {
  experts(it->pool, *call, it->room(experts_scratch(it->pool.size(), *call)));
}
void quire_rms_norm(Engine* it, const RmsNorm* call) { rms_norm(it->pool, *call); }
void quire_add_rms_norm(Engine* it, const AddRmsNorm* call) { add_rms_norm(it->pool, *call); }
void quire_turns(Engine* it, const Turns* call) { turns(it->pool, *call); }
void quire_place_heads(Engine* it, const PlaceHeads* call) {
  place_heads(it->pool, *call, it->room(place_heads_scratch(it->pool.size(), *call)));
}
void quire_silu_mul(Engine* it, const Gate* call) { silu_mul(it->pool, *call); }
void quire_gelu_mul(Engine* it, const Gate* call) { gelu_mul(it->pool, *call); }
void quire_multiply(Engine* it, const Multiply* call) { multiply(it->pool, *call); }
void quire_take(Engine* it, const Take* call) { take(it->pool, *call); }
void quire_largest(Engine* it, const Largest* call) { largest(it->pool, *call, it->room(largest_scratch(*call))); }
void quire_cap_logits(Engine* it, const CapLogits* call) { cap_logits(it->pool, *call); }
void quire_mask_tokens(Engine* it, const MaskTokens* call) { mask_tokens(it->pool, *call); }

// What a step says of its sequences to every layer of a kind.
struct StepSequences {
  int64_t count, table_width;
  const int32_t *block_tables, *query_starts, *contexts;
};
struct StepAttention {
  int64_t rows;
  Attention rest;
  const StepSequences* step;
};
void quire_attention(Engine* it, const StepAttention* call) {
  Attention whole = call->rest;
  whole.sequences = call->step->count;
  whole.table_width = call->step->table_width;
  whole.block_tables = call->step->block_tables;
  whole.query_starts = call->step->query_starts;
  whole.contexts = call->step->contexts;
  const AttentionPlan plan(whole, it->pool.size());
  attention(it->pool, whole, plan, it->room(plan.scratch(it->pool.size())));
}

// An operation, its struct, and which of the counts is its rows.
struct Recorded {
  void (*run)(void*, void*);
  int64_t* call;
  int64_t count;
};
void quire_run(void* engine, const Recorded* program, int64_t length, const int64_t* counts) {
  for (const Recorded* at = program; at != program + length; ++at) {
    if (counts[at->count] == 0) continue;
    *at->call = counts[at->count];
    at->run(engine, at->call);
  }
}

}  // extern "C"
