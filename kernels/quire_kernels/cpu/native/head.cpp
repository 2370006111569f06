// The likeliest token without its logits: the head is multiplied some thousand outputs at a time, which are looked
// through while they are in the second cache. All of them are never there at once.
#include "head.h"

#include <algorithm>
#include <cmath>

#include "pointwise.h"

namespace quire {

namespace {

constexpr int64_t kSome = 16384;  // outputs, a multiple of what a panel has

int64_t product_scratch(int, const Linear& call) { return linear_scratch(call.format, call.rows, call.width); }
int64_t product_scratch(int threads, const QuantizedLinear& call) { return quantized_scratch(threads, call); }
void multiply(Pool& pool, const Linear& call, void* scratch) { linear(pool, call, scratch); }
void multiply(Pool& pool, const QuantizedLinear& call, void* scratch) { quantized_linear(pool, call, scratch); }

const char* bytes(const void* at) { return static_cast<const char*>(at); }

// Outputs from `begin` on.
Linear from(Linear call, int64_t begin) {
  const int64_t number = call.format == kFloat32 ? 4 : 2;
  call.weight = bytes(call.weight) + begin * call.width * number;
  if (call.bias) call.bias = bytes(call.bias) + begin * number;
  return call;
}
QuantizedLinear from(QuantizedLinear call, int64_t begin) {
  call.weight += begin * (call.group ? call.width / 2 : (call.width + 3) / 4 * 4);
  call.scales = bytes(call.scales) + begin * (call.group ? call.width / call.group * 2 : 4);
  if (call.bias) call.bias += begin;
  return call;
}

template <class Product>
Product whole(const Head<Product>& call) {
  Product product = *call.product;
  product.rows = call.rows;
  product.x = call.x;
  product.stride = call.stride;
  product.out_format = kFloat32;
  return product;
}

template <class Product>
int64_t some_of(const Head<Product>& call) {
  return (std::min(kSome, call.product->outputs) + 15) / 16 * 16;  // what lies behind begins with a line of memory
}

template <class Product>
int64_t scratch_of(int threads, const Head<Product>& call) {
  return call.rows * some_of(call) * 4 + product_scratch(threads, whole(call));
}

template <class Product>
void search(Pool& pool, const Head<Product>& call, void* scratch) {
  const Product all = whole(call);
  float* logits = static_cast<float*>(scratch);
  for (int64_t begin = 0; begin < all.outputs; begin += kSome) {
    Product some = from(all, begin);
    some.outputs = std::min(kSome, all.outputs - begin);
    some.out = logits;
    some.out_stride = some.outputs;
    multiply(pool, some, logits + call.rows * some_of(call));
    pool.each(call.rows, [&](int64_t row, int) {
      const Peak found = peak(logits + row * some.outputs, 0, some.outputs);
      float& value = call.values[row];
      if (begin != 0 && (std::isnan(value) || !(std::isnan(found.value) || found.value > value))) return;
      value = found.value;
      call.places[row] = begin + found.place;
    });
  }
}

}  // namespace

int64_t head_scratch(int threads, const Head<Linear>& call) { return scratch_of(threads, call); }
int64_t head_scratch(int threads, const Head<QuantizedLinear>& call) { return scratch_of(threads, call); }
void largest_of(Pool& pool, const Head<Linear>& call, void* scratch) { search(pool, call, scratch); }
void largest_of(Pool& pool, const Head<QuantizedLinear>& call, void* scratch) { search(pool, call, scratch); }

}  // namespace quire
