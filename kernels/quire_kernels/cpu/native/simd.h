// One vector of floats or of whole numbers, as wide as the machine has them, and the number formats that tensors come
// in.
//
// Floats are computed in float32: loads widen, stores round to nearest even. The file is compiled for one level
// of instructions at a time (see build.py); nothing here asks the processor anything.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace quire {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

struct Vec {
  __m512 v;
};
constexpr int kLanes = 16;

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec where_less(Vec a, Vec b, Vec then, Vec otherwise) {
  return {_mm512_mask_mov_ps(otherwise.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), then.v)};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec round_to_int(Vec a) { return {_mm512_roundscale_ps(a.v, 8)}; }
// a · 2^n for whole n
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline int not_numbers(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }  // a bit for each lane
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec widen(__m256i bits) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))}; }
inline __m256i narrow(Vec a) {
  // nearest even; what is not a number stays so
  __m512i bits = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(rounded);
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
inline Vec load(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}
inline Vec load(const fp16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
inline void store(fp16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void store(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }
inline void store(fp16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// 2 · kLanes numbers that lie in pairs: the first of each, and the second.
struct Pair {
  __m512i v;
};
inline Pair load_pair(const bf16* p) { return {_mm512_loadu_si512(p)}; }
inline Pair load_pair(const bf16* p, int n) { return {_mm512_maskz_loadu_epi32(first(n), p)}; }
inline Vec even(Pair a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
inline Vec odd(Pair a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}

// Two vectors of numbers in a row to those at even and at odd places, and back.
inline void unzip(Vec& a, Vec& b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  Vec first{_mm512_permutex2var_ps(a.v, even, b.v)};
  b = {_mm512_permutex2var_ps(a.v, _mm512_or_si512(even, _mm512_set1_epi32(1)), b.v)};
  a = first;
}
inline void zip(Vec& a, Vec& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  Vec first{_mm512_permutex2var_ps(a.v, low, b.v)};
  b = {_mm512_permutex2var_ps(a.v, _mm512_or_si512(low, _mm512_set1_epi32(8)), b.v)};
  a = first;
}

// kLanes whole numbers of 32 bits, or the same bits as bytes.
struct Ints {
  __m512i v;
};
inline Ints splat(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints operator>>(Ints a, int n) { return {_mm512_srli_epi32(a.v, n)}; }
inline Vec to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints to_int(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }  // nearest, even
// Those bits of `a` that are in `of`, below bit 23, as a number; less `taken`. Exact.
inline Vec field(Ints a, int32_t of, float taken) {
  const __m512i one = _mm512_set1_epi32(0x4b000000);  // 2^23, whose last bit counts one
  return {_mm512_sub_ps(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(a.v, _mm512_set1_epi32(of), one, 0xea)),
                        _mm512_set1_ps(8388608.0f + taken))};
}
inline Ints load_ints(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Ints load_ints(const void* p, int n) { return {_mm512_maskz_loadu_epi32(first(n), p)}; }
inline void store_ints(void* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline Ints widen_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_bytes(int8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// Four vectors that follow each other; what does not fit into a byte saturates.
inline void store_bytes(int8_t* p, const Ints (&a)[4]) {
  __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a[0].v, a[1].v), _mm512_packs_epi32(a[2].v, a[3].v));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}

#if defined(__AVX512VNNI__)
// acc[i] + Σ_4 bytes of weights[i] · of inputs[i]: the weights without, the inputs with a sign. Exact.
struct Weights {
  __m512i v;
};
struct Inputs {
  __m512i v;
};
inline Weights weights(Ints a) { return {a.v}; }
inline Inputs inputs(int32_t four) { return {_mm512_set1_epi32(four)}; }
inline Ints dot(Ints acc, Weights w, Inputs x) {
  // not the intrinsic: with it GCC 12 copies each sum before and after, and spills them all in every step
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
  return acc;
}
#else
// The same by products of 16 bits. (Products of bytes that end in 16 bits saturate.)
struct Weights {
  __m512i even, odd;
};
using Inputs = Weights;
inline Weights weights(Ints a) {
  return {_mm512_and_si512(a.v, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(a.v, 8)};
}
inline Inputs inputs(int32_t four) {
  __m512i x = _mm512_set1_epi32(four);
  return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
}
inline Ints dot(Ints acc, Weights w, Inputs x) {
  return {_mm512_add_epi32(acc.v, _mm512_add_epi32(_mm512_madd_epi16(w.even, x.even), _mm512_madd_epi16(w.odd, x.odd)))};
}
#endif

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Vec {
  __m256 v;
};
constexpr int kLanes = 8;

inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec where_less(Vec a, Vec b, Vec then, Vec otherwise) {
  return {_mm256_blendv_ps(otherwise.v, then.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline float sum(Vec a) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float largest(Vec a) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
inline Vec round_to_int(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline int not_numbers(Vec a) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)); }
inline Vec scale_by_power(Vec a, Vec n) {
  // in two halves, so that results below the smallest normal number come out, too
  __m256i whole = _mm256_cvtps_epi32(n.v);
  __m256i half = _mm256_srai_epi32(whole, 1);
  auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
}
inline Vec widen(__m128i bits) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))}; }
inline __m128i narrow(Vec a) {
  __m256i bits = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
inline void store(fp16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
template <class T>
inline Vec load(const T* p, int n) {
  T some[kLanes] = {};
  std::memcpy(some, p, n * sizeof(T));
  return load(some);
}
template <class T>
inline void store(T* p, Vec a, int n) {
  T some[kLanes];
  store(some, a);
  std::memcpy(p, some, n * sizeof(T));
}
struct Pair {
  __m256i v;
};
inline Pair load_pair(const bf16* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Pair load_pair(const bf16* p, int n) {
  bf16 some[2 * kLanes] = {};
  std::memcpy(some, p, 2 * n * sizeof(bf16));
  return load_pair(some);
}
inline Vec even(Pair a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))}; }
inline Vec odd(Pair a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
}

struct Ints {
  __m256i v;
};
inline Ints splat(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.v, b.v)}; }
inline Ints operator>>(Ints a, int n) { return {_mm256_srli_epi32(a.v, n)}; }
inline Vec to_float(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Ints to_int(Vec a) { return {_mm256_cvtps_epi32(a.v)}; }
inline Vec field(Ints a, int32_t of, float taken) {
  const __m256i one = _mm256_set1_epi32(0x4b000000);
  __m256i some = _mm256_or_si256(_mm256_and_si256(a.v, _mm256_set1_epi32(of)), one);
  return {_mm256_sub_ps(_mm256_castsi256_ps(some), _mm256_set1_ps(8388608.0f + taken))};
}
inline Ints load_ints(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline Ints load_ints(const void* p, int n) {
  int32_t some[kLanes] = {};
  std::memcpy(some, p, n * sizeof(int32_t));
  return load_ints(some);
}
inline void store_ints(void* p, Ints a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
inline Ints widen_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_bytes(int8_t* p, Ints a) {
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline void store_bytes(int8_t* p, const Ints (&a)[4]) {
  __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a[0].v, a[1].v), _mm256_packs_epi32(a[2].v, a[3].v));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
}
struct Weights {
  __m256i even, odd;
};
using Inputs = Weights;
inline Weights weights(Ints a) {
  return {_mm256_and_si256(a.v, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(a.v, 8)};
}
inline Inputs inputs(int32_t four) {
  __m256i x = _mm256_set1_epi32(four);
  return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
inline Ints dot(Ints acc, Weights w, Inputs x) {
  return {_mm256_add_epi32(acc.v, _mm256_add_epi32(_mm256_madd_epi16(w.even, x.even), _mm256_madd_epi16(w.odd, x.odd)))};
}

#else
#error "this level of instructions is below AVX2 with FMA and F16C"
#endif

inline float as_float(float x) { return x; }
inline float as_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float as_float(fp16 x) { return _cvtsh_ss(x.bits); }

// e^x: x = n · ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r, times 2^n. Relative error below 2e-7.
inline Vec exp(Vec x) {
  x = min(splat(88.3f), max(splat(-87.3f), x));  // in this order what is not a number goes through
  Vec n = round_to_int(x * splat(1.44269504f));
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.0f / 720.0f);
  p = fma(p, r, splat(1.0f / 120.0f));
  p = fma(p, r, splat(1.0f / 24.0f));
  p = fma(p, r, splat(1.0f / 6.0f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return scale_by_power(p, n);
}

// 2^x for x of at most 127; 0 below -125, where what it is multiplied by might be too small to be fast. Relative error
// below 2e-7.
inline Vec exp2(Vec x) {
  const Vec least = splat(-125.0f);
  Vec some = max(least, x);  // in this order what is not a number goes through
  Vec n = round_to_int(some);
  Vec r = some - n;
  Vec p = splat(0.001326472731307149f);
  p = fma(p, r, splat(0.009671512991189957f));
  p = fma(p, r, splat(0.05550733581185341f));
  p = fma(p, r, splat(0.24022242426872253f));
  p = fma(p, r, splat(0.6931470036506653f));
  p = fma(p, r, splat(1.0f));
  return where_less(x, least, zero(), scale_by_power(p, n));
}

// (1 - f) / (1 + f) with f = e^(-2 |x|), and near 0, where that takes one from what is nearly one, the series that errs least.
// Relative error below 4e-7, near 0 as well; what is not a number stays so.
inline Vec tanh(Vec x) {
  const Vec one = splat(1.0f), far = max(x, zero() - x), fall = exp2(far * splat(-2.88539008f));
  const Vec square = far * far;
  Vec p = fma(splat(-0.04914849744115f), square, splat(0.13299825315039f));
  p = fma(p, square, splat(-0.33332663161891f));
  const Vec near = fma(p * square, far, far);
  const Vec found = where_less(far, splat(0.35f), near, (one - fall) / (one + fall));
  return where_less(x, zero(), zero() - found, found);
}

}  // namespace quire
