#pragma once

#include <cstdint>

#include "gemm.h"
#include "quantized.h"

namespace quire {

// Of each row of a product its largest number and the lowest place of it, as of `Largest`; the product's own out is not
// used.
template <class Product>
struct Head {
  int64_t rows;
  const Product* product;  // all but rows, x and stride
  const void* x;
  int64_t stride;
  float* values;
  int64_t* places;
};
int64_t head_scratch(int threads, const Head<Linear>& call);
int64_t head_scratch(int threads, const Head<QuantizedLinear>& call);
void largest_of(Pool& pool, const Head<Linear>& call, void* scratch);
void largest_of(Pool& pool, const Head<QuantizedLinear>& call, void* scratch);

}  // namespace quire
