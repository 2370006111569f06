// A row of numbers rounded to 8 bits with a sign:
//
//     most = max |x|,   code[k] = round(x[k] · (127 / most)),   scale = most / 127
//
// The scale of a row with a number that is not finite is NaN.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "simd.h"

namespace quire {

constexpr float kNothing = 1e-30f;  // a row that has nothing larger is zero: 127 by less may be infinite

// `codes` get zeros from `width` up to `padded`. `start`, of each `group` of codes, is -added · Σ code: where sums of
// products begin whose other side had `added` added to it. A group divides the width.
template <class X>
void round_row(const X* x, int64_t width, int64_t group, int32_t added, int64_t padded, int8_t* codes, int32_t* start,
               float* scale) {
  // bits of numbers without their signs are in the order of the numbers; what is not a number comes last
  const Ints no_sign = splat(int32_t{0x7fffffff});
  Ints most_bits = splat(int32_t{0});
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) most_bits = max(most_bits, bits(load(x + k)) & no_sign);
  if (k < width) most_bits = max(most_bits, bits(load(x + k, static_cast<int>(width - k))) & no_sign);
  int32_t found = largest(most_bits);
  float most;
  std::memcpy(&most, &found, 4);
  bool finite = found < 0x7f800000, usable = finite && most >= kNothing;
  *scale = usable ? most / 127.0f : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  std::memset(codes + width, 0, padded - width);
  if (!usable) {
    std::memset(codes, 0, width);
    std::fill_n(start, width / group, 0);
    return;
  }
  const Vec inverse = splat(127.0f / most);
  for (int64_t begin = 0; begin < width; begin += group) {
    Ints total = splat(int32_t{0});
    int64_t end = begin + group;
    for (k = begin; k + kLanes <= end; k += kLanes) {
      Ints code = to_int(load(x + k) * inverse);
      total = total + code;
      store_bytes(codes + k, code);
    }
    if (k < end) {
      Ints code = to_int(load(x + k, static_cast<int>(end - k)) * inverse);
      int8_t some[kLanes];
      store_bytes(some, code);
      std::memcpy(codes + k, some, end - k);
      total = total + code;
    }
    start[begin / group] = -added * sum(total);
  }
}

// As vpdpbusd takes them.
inline int32_t four_codes(const int8_t* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return four;
}

}  // namespace quire
