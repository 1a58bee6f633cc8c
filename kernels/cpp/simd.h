// Vectors as wide as the machine's registers, by the compiler's vector extensions, and the exponential on them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace bmojo {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct Simd {
    typedef T Vector __attribute__((vector_size(kVectorBytes)));
    typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

template <typename T>
using Vector = typename Simd<T>::Vector;

template <typename T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

template <typename T>
inline Vector<T> load(const T* from) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned*>(from);
}

template <typename T>
inline void store(T* to, Vector<T> x) {
    *reinterpret_cast<typename Simd<T>::Unaligned*>(to) = x;
}

template <typename T>
inline Vector<T> splat(T x) {
    return Vector<T>{} + x;
}

template <typename T>
inline Vector<T> larger(Vector<T> a, Vector<T> b) {
    return a > b ? a : b;
}

template <typename T>
constexpr int64_t round_up(int64_t n) {  // to whole vectors
    return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, without branches, for a float or a vector of them.
// Relative error below 1e-7; exactly 0 below -87 (so for -inf), infinite above 88.
template <typename Float, typename Int>
inline Float exponential_by_parts(Float x) {
    const Float zero{}, low = zero - 87.0f, high = zero + 88.0f;
    const Float inside = x < low ? low : (x > high ? high : x);
    const Float shifted = inside * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const Float n = shifted - 12582912.0f;
    const Float r = (inside - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
    Float series = r * 1.98412698e-4f + 1.38888889e-3f;
    series = series * r + 8.33333333e-3f;
    series = series * r + 4.16666667e-2f;
    series = series * r + 1.66666667e-1f;
    series = series * r + 0.5f;
    series = series * r * r + r + 1.0f;
    Int bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;  // 2^n; the higher bits of the rounding constant fall off
    Float power;
    std::memcpy(&power, &bits, sizeof power);
    const Float infinity = zero + std::numeric_limits<float>::infinity();
    return x < low ? zero : (x > high ? infinity : series * power);
}

inline float exponential(float x) {
    return exponential_by_parts<float, uint32_t>(x);
}

inline Vector<float> exponential(Vector<float> x) {
    return exponential_by_parts<Vector<float>, Vector<uint32_t>>(x);
}

inline double exponential(double x) {
    return std::exp(x);
}

inline Vector<double> exponential(Vector<double> x) {
    for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

// 2^x for x below 127, likewise but cheaper: what is below 2^-126.5 (so -inf) gives exactly 0.
inline Vector<float> power_of_two(Vector<float> x) {
    const Vector<float> low = splat(-127.0f);
    const Vector<float> inside = low > x ? low : x;
    const Vector<float> shifted = inside + 12582912.0f;
    const Vector<float> f = inside - (shifted - 12582912.0f);
    Vector<float> series = f * 1.546144746e-4f + 1.339086735e-3f;
    series = series * f + 9.618056670e-3f;
    series = series * f + 5.550357104e-2f;
    series = series * f + 2.402265092e-1f;
    series = series * f + 6.931471880e-1f;
    series = series * f + 1.0f;
    Vector<uint32_t> bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    Vector<float> power;
    std::memcpy(&power, &bits, sizeof power);
    return series * power;
}

inline Vector<double> power_of_two(Vector<double> x) {
    for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
    return x;
}

template <typename T>
inline T sigmoid(T x) {
    return T(1) / (T(1) + exponential(-x));
}

template <typename T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

}  // namespace bmojo
