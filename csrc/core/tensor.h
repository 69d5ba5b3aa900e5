// TensorRef: what a kernel sees of a tensor. Every message about a wrong argument is built here.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace pyqlora {

enum class DType : uint8_t { f32, f16, bf16, u8, i32, i64, other };
enum class Device : uint8_t { none, cpu, cuda };

inline const char* name(DType t) {
    static constexpr const char* names[] = {"float32", "float16", "bfloat16",     "uint8",
                                            "int32",   "int64",   "another dtype"};
    return names[static_cast<int>(t)];
}
inline const char* name(Device d) {
    static constexpr const char* names[] = {"none", "cpu", "cuda"};
    return names[static_cast<int>(d)];
}
inline int64_t itemsize(DType t) {
    switch (t) {
        case DType::f32:
        case DType::i32:
            return 4;
        case DType::f16:
        case DType::bf16:
            return 2;
        case DType::i64:
            return 8;
        default:
            return 1;
    }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs of `columns` neighbouring elements that begin `stride` apart.
struct Rows {
    int64_t count, columns, stride;
};

struct TensorRef {
    void* data = nullptr;
    int64_t numel = 0;
    DType dtype = DType::other;
    Device device = Device::none;
    int device_index = 0;
    bool contiguous = true;
    int64_t columns = 0;  // of a tensor that is not contiguous: the length of its rows, and how far apart they begin;
    int64_t stride = 0;   // 0 where it has no such rows

    bool defined() const { return device != Device::none; }
    int64_t bytes() const { return numel * itemsize(dtype); }
    Rows rows() const {
        if (contiguous) return {1, numel, numel};
        return {columns ? numel / columns : 0, columns, stride};
    }

    // numel and what follows `contiguous`, of a tensor; no strides: a contiguous one.
    void set_shape(int dims, const int64_t* sizes, const int64_t* strides) {
        int64_t rows = 1;
        bool even = true;
        numel = columns = 1;
        for (int i = dims; i-- > 0; numel *= sizes[i]) {
            if (sizes[i] == 1) continue;
            const int64_t step = strides ? strides[i] : numel;
            if (rows == 1 && step == columns) {
                columns *= sizes[i];
                continue;
            }
            if (rows == 1) stride = step;
            even = even && step == stride * rows;
            rows *= sizes[i];
        }
        contiguous = rows == 1 || numel == 0;
        if (!even) columns = 0;
    }
    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

struct Named {
    const char* name;
    const TensorRef& tensor;
};

// Raises ValueError as "operation: argument: expected ..., got ...".
[[noreturn]] inline void bad_argument(const char* op, const std::string& arg, const std::string& expected,
                                      const std::string& got) {
    throw std::invalid_argument(std::string(op) + ": " + arg + ": expected " + expected + ", got " + got);
}

// Defined, on the device, of one of the dtypes.
inline void check_kind(const char* op, const char* arg, const TensorRef& t, Device device,
                       std::initializer_list<DType> dtypes) {
    if (!t.defined()) bad_argument(op, arg, "a tensor", "None");
    if (t.device != device)
        bad_argument(op, arg, std::string("a tensor on ") + name(device), std::string("one on ") + name(t.device));
    for (DType d : dtypes) {
        if (d == t.dtype) return;
    }
    std::string wanted;
    for (DType d : dtypes) wanted += (wanted.empty() ? "" : " or ") + std::string(name(d));
    bad_argument(op, arg, wanted, name(t.dtype));
}

// Also contiguous and, where numel >= 0, of that many elements.
inline void check_tensor(const char* op, const char* arg, const TensorRef& t, Device device,
                         std::initializer_list<DType> dtypes, int64_t numel = -1) {
    check_kind(op, arg, t, device, dtypes);
    if (!t.contiguous) bad_argument(op, arg, "a contiguous tensor", "a strided one (call .contiguous())");
    if (numel >= 0 && t.numel != numel)
        bad_argument(op, arg, std::to_string(numel) + " elements", std::to_string(t.numel));
}

// What a kernel writes by rows, which may have gaps between them.
inline void check_rows(const char* op, const char* arg, const TensorRef& t, Device device,
                       std::initializer_list<DType> dtypes) {
    check_kind(op, arg, t, device, dtypes);
    if (!t.contiguous && (t.columns == 0 || t.stride < t.columns))
        bad_argument(op, arg, "a contiguous tensor, or rows of one as in buffer[:, :columns]",
                     "one with other strides (decode into a contiguous tensor, then copy_)");
}

// Kernels on a GPU read every argument from one device.
inline void check_same_device(const char* op, std::initializer_list<Named> tensors) {
    const Named* first = nullptr;
    for (const Named& t : tensors) {
        if (!t.tensor.defined()) continue;
        if (!first)
            first = &t;
        else if (t.tensor.device_index != first->tensor.device_index)
            bad_argument(op, t.name,
                         "device index " + std::to_string(first->tensor.device_index) + " like " + first->name,
                         std::to_string(t.tensor.device_index));
    }
}

}  // namespace pyqlora
