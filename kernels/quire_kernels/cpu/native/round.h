// A row of numbers rounded to 8 bits with a sign:
//
//     most = max |x|,   code[k] = round(x[k] · (127 / most)),   scale = most / 127
//
// The scale of a row with a number that is not finite is NaN.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace quire {

constexpr float kNothing = 1e-30f;  // a row that has nothing larger is zero: 127 by less may be infinite

// The largest |x|, by bits: without their signs they are in the order of the numbers, and what is not a number comes
// last.
template <class X>
inline float largest_magnitude(const X* x, int64_t width) {
  using Bits = std::conditional_t<sizeof(X) == 4, uint32_t, uint16_t>;
  constexpr Bits no_sign = static_cast<Bits>(~Bits{0}) >> 1;
  Bits most = 0;
  for (int64_t k = 0; k < width; ++k) {
    Bits bits;
    std::memcpy(&bits, x + k, sizeof bits);
    most = std::max<Bits>(most, bits & no_sign);
  }
  X found;
  std::memcpy(&found, &most, sizeof most);
  return as_float(found);
}

inline int32_t sum(const int8_t* codes, int64_t count) {
  // 128 more than each, so that they are added without a sign
  __m256i more = _mm256_set1_epi8(-128), total = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + k));
    total = _mm256_add_epi64(total, _mm256_sad_epu8(_mm256_xor_si256(some, more), _mm256_setzero_si256()));
  }
  __m128i half = _mm_add_epi64(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  half = _mm_add_epi64(half, _mm_unpackhi_epi64(half, half));
  int32_t found = _mm_cvtsi128_si32(half) - 128 * static_cast<int32_t>(k);
  for (; k < count; ++k) found += codes[k];
  return found;
}

// `codes` get zeros from `width` up to `padded`. `start`, of each `group` of codes, is -added · Σ code: where sums of
// products begin whose other side had `added` added to it. A group divides the width.
template <class X>
void round_row(const X* x, int64_t width, int64_t group, int32_t added, int64_t padded, int8_t* codes, int32_t* start,
               float* scale) {
  const float most = largest_magnitude(x, width);
  const bool finite = most <= std::numeric_limits<float>::max(), usable = finite && most >= kNothing;
  *scale = usable ? most / 127.0f : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  std::memset(codes + width, 0, padded - width);
  if (!usable) {
    std::memset(codes, 0, width);
    std::fill_n(start, width / group, 0);
    return;
  }
  const Vec inverse = splat(127.0f / most);
  int64_t k = 0;
  for (; k + 4 * kLanes <= width; k += 4 * kLanes) {
    Ints code[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) code[i] = to_int(load(x + k + i * kLanes) * inverse);
    store_bytes(codes + k, code);
  }
  for (; k < width; k += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, width - k));
    int8_t some[kLanes];
    store_bytes(some, to_int((n == kLanes ? load(x + k) : load(x + k, n)) * inverse));
    std::memcpy(codes + k, some, n);
  }
  for (int64_t begin = 0; begin < width; begin += group) *start++ = -added * sum(codes + begin, group);
}

// As vpdpbusd takes them.
inline int32_t four_codes(const int8_t* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return four;
}

}  // namespace quire
