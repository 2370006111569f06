// What all operations share. Tensors are row-major; a stride counts numbers between two rows.
#pragma once

#include <cstdint>

#include "pool.h"

namespace quire {

enum Format : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };  // kInt8: of caches alone

constexpr int64_t kPanel = 64;  // outputs of a weight that lie together; the last panel has what is left
inline int64_t panels(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

}  // namespace quire
