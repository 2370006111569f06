// What this processor and its memory can do, by plain loops: nothing but loads, or nothing but one instruction on
// registers. Whatever computes a model stays below.

#include <immintrin.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

// Seconds that `work(thread)` takes on all threads at once, from the moment the last one is ready.
template <typename Work>
double seconds(int threads, Work work) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread)
        running.emplace_back([&, thread] {
            ready.fetch_add(1);
            while (!go.load(std::memory_order_acquire)) _mm_pause();
            work(thread);
        });
    while (ready.load() < threads) _mm_pause();
    const auto start = std::chrono::steady_clock::now();
    go.store(true, std::memory_order_release);
    for (auto& each : running) each.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

#ifdef __AVX512F__
using Vector = __m512i;
inline Vector either(Vector a, Vector b) { return _mm512_or_si512(a, b); }
inline Vector load(const char* at) { return _mm512_load_si512(at); }
inline Vector zero() { return _mm512_setzero_si512(); }
using Floats = __m512;
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats ones() { return _mm512_set1_ps(1.0f); }
#else
using Vector = __m256i;
inline Vector either(Vector a, Vector b) { return _mm256_or_si256(a, b); }
inline Vector load(const char* at) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(at)); }
inline Vector zero() { return _mm256_setzero_si256(); }
using Floats = __m256;
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats ones() { return _mm256_set1_ps(1.0f); }
#endif
constexpr std::size_t WIDTH = sizeof(Vector);

// Reads `bytes` (a multiple of 16 vectors) and keeps the compiler from leaving it out.
void read(const char* from, std::size_t bytes) {
    Vector sums[4] = {zero(), zero(), zero(), zero()};
    for (const char* at = from; at < from + bytes; at += 16 * WIDTH)
        for (int i = 0; i < 16; ++i) sums[i % 4] = either(sums[i % 4], load(at + i * WIDTH));
    asm volatile("" ::"v"(sums[0]), "v"(sums[1]), "v"(sums[2]), "v"(sums[3]) : "memory");
}

constexpr int CHAINS = 12;  // independent sums: more than an instruction's latency (up to 5) times two units
#define EACH_CHAIN(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)

// Calls of `step(sum)` a second on all threads, in CHAINS sums each. They are named one by one: an array of them
// would live in memory.
template <typename Sum, typename Step>
double rate(int threads, long rounds, Sum start, Step step) {
    const double took = seconds(threads, [=](int) {
#define BEGIN(i) Sum sum##i = start;
        EACH_CHAIN(BEGIN)
        for (long round = 0; round < rounds; ++round) {
#define STEP(i)           \
    sum##i = step(sum##i); \
    asm volatile("" : "+v"(sum##i));
            EACH_CHAIN(STEP)
        }
    });
    return double(threads) * rounds * CHAINS / took;
}

}  // namespace

extern "C" {

// Memory for `read_rate`, in large pages where there are any.
void* buffer(std::size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    madvise(at, bytes, MADV_HUGEPAGE);
    std::memset(at, 1, bytes);
    return at;
}

void forget(void* buffer, std::size_t bytes) { munmap(buffer, bytes); }

// Bytes a second that `threads` threads read, each its part of the buffer.
double read_rate(const char* from, std::size_t bytes, int threads) {
    const std::size_t part = bytes / threads / (16 * WIDTH) * (16 * WIDTH);
    const double took = seconds(threads, [=](int thread) { read(from + thread * part, part); });
    return double(part) * threads / took;
}

// Operations a second (a multiplication and an addition are two) of float32 vfmadd.
double fma_rate(int threads, long rounds) {
    const Floats one = ones();
    return rate(threads, rounds, one, [=](Floats sum) { return fused(one, one, sum); }) * (sizeof(Floats) / 4) * 2;
}

// The same of vdpbf16ps; 0 where the processor has none.
double dpbf16_rate(int threads, long rounds) {
#ifdef __AVX512BF16__
    const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);
    return rate(threads, rounds, _mm512_setzero_ps(), [=](__m512 sum) { return _mm512_dpbf16_ps(sum, one, one); }) *
           16 * 4;
#else
    return 0.0;
#endif
}

// The same of vpdpbusd; 0 where the processor has none.
double dpbusd_rate(int threads, long rounds) {
#if defined(__AVX512VNNI__)
    const __m512i one = _mm512_set1_epi8(1);
    return rate(threads, rounds, zero(), [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, one, one); }) * 16 * 8;
#elif defined(__AVXVNNI__)
    const __m256i one = _mm256_set1_epi8(1);
    return rate(threads, rounds, zero(), [=](__m256i sum) { return _mm256_dpbusd_avx_epi32(sum, one, one); }) * 8 * 8;
#else
    return 0.0;
#endif
}

}  // extern "C"
