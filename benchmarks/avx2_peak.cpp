// Multiply-accumulates a second of one core: AVX2's floats and bytes.
//
//     g++ -O2 -mavx2 -mfma -o avx2_peak benchmarks/avx2_peak.cpp && ./avx2_peak
//
// Operands stay in registers, and twelve sums are independent: what is left is how many such
// instructions the core can start. The best of many short runs, so that other programs disturb little.

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

constexpr int SUMS = 12, ROUNDS = 20000, RUNS = 400;

struct Floats {  // one instruction: 8 products
    static constexpr double macs = 8;
    using Sum = __m256;
    static Sum zero() { return _mm256_setzero_ps(); }
    static void step(Sum& sum, __m256i a, __m256i b) {
        sum = _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum);
    }
};

struct Bytes {  // vpmaddubsw, vpmaddwd, vpaddd: 32 products, pairs of them in 16 bits
    static constexpr double macs = 32;
    using Sum = __m256i;
    static Sum zero() { return _mm256_setzero_si256(); }
    static void step(Sum& sum, __m256i a, __m256i b) {
        const __m256i pairs = _mm256_maddubs_epi16(a, b);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

template <class Kind>
double gmacs() {
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
    double best = 1e9;
    for (int run = 0; run < RUNS; ++run) {
        typename Kind::Sum sums[SUMS];
        for (auto& sum : sums) sum = Kind::zero();
        const auto start = std::chrono::steady_clock::now();
        for (int round = 0; round < ROUNDS; ++round) {
            asm volatile("" : "+x"(a), "+x"(b));  // new operands, for all the compiler knows
#pragma GCC unroll 12
            for (auto& sum : sums) Kind::step(sum, a, b);
        }
        for (auto& sum : sums) asm volatile("" : "+x"(sum));
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        best = std::min(best, took.count());
    }
    return Kind::macs * SUMS * ROUNDS / best * 1e-9;
}

int main() {
    const double floats = gmacs<Floats>(), bytes = gmacs<Bytes>();
    std::printf("float, vfmadd: %.1f billion multiply-accumulates a second\n", floats);
    std::printf("bytes, vpmaddubsw + vpmaddwd + vpaddd: %.1f, %.2f of float\n", bytes, bytes / floats);
}
