// What all operations share. Tensors are row-major; a stride counts numbers between two rows.
#pragma once

#include <cstdint>

#include "pool.h"

namespace quire {

enum Format : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };  // kInt8: of caches alone

}  // namespace quire
