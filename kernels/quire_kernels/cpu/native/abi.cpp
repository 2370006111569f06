// The door: what Python calls through ctypes. One `Engine` is a pool of threads and a scratch; its calls do not overlap.
#include <cstdlib>
#include <exception>

#include "attention.h"
#include "gemm.h"
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

void quire_unpack_rows(void* engine, int64_t format, const void* packed, int64_t outputs, int64_t width,
                       const int64_t* rows, int64_t count, void* to) {
  unpack_rows(static_cast<Engine*>(engine)->pool, static_cast<Format>(format), packed, outputs, width, rows, count, to);
}

void quire_linear(void* engine, const Linear* call) {
  auto* it = static_cast<Engine*>(engine);
  linear(it->pool, *call, it->room(linear_scratch(call->format, call->rows, call->width)));
}

void quire_pack_quantized(void* engine, void* weight, int64_t outputs, int64_t row_bytes, int four_bits) {
  auto* it = static_cast<Engine*>(engine);
  pack_quantized(it->pool, weight, outputs, row_bytes, four_bits != 0,
                 it->room(pack_quantized_scratch(it->pool.size(), row_bytes)));
}

void quire_unpack_quantized(void* engine, const void* packed, const void* scales, int64_t group, int64_t outputs,
                            int64_t width, const int64_t* rows, int64_t count, int64_t format, void* to) {
  unpack_quantized(static_cast<Engine*>(engine)->pool, packed, scales, group, outputs, width, rows, count,
                   static_cast<Format>(format), to);
}

void quire_quantized_linear(void* engine, const QuantizedLinear* call) {
  auto* it = static_cast<Engine*>(engine);
  quantized_linear(it->pool, *call, it->room(quantized_scratch(it->pool.size(), *call)));
}

void quire_attention(void* engine, const Attention* call) {
  auto* it = static_cast<Engine*>(engine);
  const AttentionPlan plan(*call, it->pool.size());
  attention(it->pool, *call, plan, it->room(plan.scratch(it->pool.size())));
}

void quire_write_kv(void* engine, const WriteKV* call) { write_kv(static_cast<Engine*>(engine)->pool, *call); }

void quire_rms_norm(void* engine, int64_t format, int64_t rows, int64_t heads, int64_t width, const void* x,
                    int64_t row_stride, int64_t head_stride, const void* weight, double eps, void* out) {
  rms_norm(static_cast<Engine*>(engine)->pool, static_cast<Format>(format), {rows, heads, width}, x, row_stride,
           head_stride, weight, static_cast<float>(eps), out);
}

void quire_add_rms_norm(void* engine, int64_t format, int64_t rows, int64_t width, const void* x, int64_t x_stride,
                        void* residual, int64_t residual_stride, const void* weight, double eps, void* out) {
  add_rms_norm(static_cast<Engine*>(engine)->pool, static_cast<Format>(format), rows, width, x, x_stride, residual,
               residual_stride, weight, static_cast<float>(eps), out);
}

void quire_rotary(void* engine, int64_t format, int64_t rows, int64_t heads, int64_t width, const void* x,
                  int64_t row_stride, int64_t head_stride, const float* cos, const float* sin, void* out) {
  rotary(static_cast<Engine*>(engine)->pool, static_cast<Format>(format), {rows, heads, width}, x, row_stride,
         head_stride, cos, sin, out);
}

void quire_silu_mul(void* engine, int64_t format, int64_t rows, int64_t width, const void* gate_up, int64_t stride,
                    void* out) {
  silu_mul(static_cast<Engine*>(engine)->pool, static_cast<Format>(format), rows, width, gate_up, stride, out);
}

void quire_largest(void* engine, const float* logits, int64_t stride, int64_t rows, int64_t width, float* values,
                   int64_t* places) {
  auto* it = static_cast<Engine*>(engine);
  largest(it->pool, logits, stride, rows, width, values, places, it->room(largest_scratch(rows, width)));
}

void quire_mask_tokens(void* engine, float* logits, int64_t stride, int64_t width, const int64_t* rows, int64_t count,
                       const uint8_t* bits, int64_t bits_stride) {
  mask_tokens(static_cast<Engine*>(engine)->pool, logits, stride, width, rows, count, bits, bits_stride);
}

}  // extern "C"
