// What a kernel is given: strided tensors as torch has them, and how kernels are made visible to Python.
#pragma once

#include <cstdint>

namespace bmojo {

constexpr int kMaxDims = BMOJO_MAX_DIMS;

template <typename T>
struct Tensor {
    T* data;  // null if the argument is None
    int64_t size[kMaxDims];
    int64_t stride[kMaxDims];  // in elements

    explicit operator bool() const { return data != nullptr; }

    template <typename... Index>
    T* at(Index... index) const {
        const int64_t i[] = {static_cast<int64_t>(index)...};
        T* found = data;
        for (unsigned d = 0; d < sizeof...(Index); ++d) found += i[d] * stride[d];
        return found;
    }

    template <typename... Index>
    T& operator()(Index... index) const {
        return *at(index...);
    }
};

}  // namespace bmojo

// Python finds `name` as name_float and name_double; all arguments are const Tensor<...>&, int64_t or double.
#define BMOJO_EXPORT(name)                                                                                   \
    extern "C" {                                                                                             \
    __attribute__((visibility("default"))) extern decltype(&bmojo::name<float>) const name##_float;          \
    __attribute__((visibility("default"))) extern decltype(&bmojo::name<double>) const name##_double;        \
    decltype(&bmojo::name<float>) const name##_float = &bmojo::name<float>;                                  \
    decltype(&bmojo::name<double>) const name##_double = &bmojo::name<double>;                               \
    }
