#include "ops/lora_linear.h"

#include <pybind11/stl.h>

#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"

namespace pyqlora {
namespace {

namespace py = pybind11;
using namespace py::literals;

// The dtype of s and ds.
template <class Backend>
DType inner(const TensorRef& x) {
    if (std::is_same_v<Backend, CpuBackend>) return DType::f32;
    return x.dtype == DType::bf16 ? DType::bf16 : DType::f16;
}

template <class Backend, class Drop, class Down, class Up, class Backward>
void bind(py::module_& m, Drop lora_dropout, Down lora_down, Up lora_up, Backward lora_backward) {
    m.def(
        "lora_dropout",
        [=](TensorRef x, TensorRef y, TensorRef seed, double dropout, int64_t columns, int64_t context) {
            run<Backend>(LoraDropoutArgs{x, y, {seed, dropout}, columns}, context, lora_dropout);
        },
        "x"_a, "y"_a, "seed"_a, "dropout"_a, "columns"_a, "context"_a);
    m.def(
        "lora_down",
        [=](TensorRef x, std::vector<TensorRef> a, int64_t k, std::vector<float> scales, TensorRef tiles,
            TensorRef seed, double dropout, TensorRef s, TensorRef workspace, int64_t context) {
            const LoraFactors factors{std::move(a), k};
            run<Backend>(
                LoraDownArgs{inner<Backend>(x), x, factors, std::move(scales), tiles, {seed, dropout}, s, workspace},
                context, lora_down);
        },
        "x"_a, "a"_a, "k"_a, "scales"_a, "tiles"_a, "seed"_a, "dropout"_a, "s"_a, "workspace"_a, "context"_a);
    m.def(
        "lora_up",
        [=](TensorRef s, std::vector<TensorRef> b, int64_t n, TensorRef tiles, TensorRef seed, double dropout,
            TensorRef y, bool accumulate, int64_t context) {
            const LoraFactors factors{std::move(b), n};
            run<Backend>(LoraUpArgs{inner<Backend>(y), s, factors, tiles, {seed, dropout}, y, accumulate}, context,
                         lora_up);
        },
        "s"_a, "b"_a, "n"_a, "tiles"_a, "seed"_a, "dropout"_a, "y"_a, "accumulate"_a, "context"_a);
    m.def(
        "lora_backward",
        [=](TensorRef dy, TensorRef b, TensorRef s, double scale, TensorRef seed, double dropout, TensorRef ds,
            TensorRef db, bool transposed, TensorRef ds_parts, TensorRef db_parts, int64_t n, int64_t context) {
            const Dropout mask{seed, dropout};
            run<Backend>(
                LoraBackwardArgs{inner<Backend>(dy), dy, b, s, scale, mask, ds, db, transposed, ds_parts, db_parts, n},
                context, lora_backward);
        },
        "dy"_a, "b"_a, "s"_a, "scale"_a, "seed"_a, "dropout"_a, "ds"_a, "db"_a, "transposed"_a, "ds_parts"_a,
        "db_parts"_a, "n"_a, "context"_a);
}

#if PYQLORA_BIND_CUDA
void bind_splits(py::module_& m) {
    m.def("lora_down_splits", &cuda::lora_down_splits, "tiles"_a, "k"_a, "multiprocessors"_a);
    m.def("lora_backward_chunks", &cuda::lora_backward_chunks, "m"_a, "n"_a, "multiprocessors"_a);
    m.def("lora_backward_column_blocks", [](int64_t n) { return ceil_div(n, LoraBackwardArgs::columns); }, "n"_a);
}
#endif

}  // namespace

void bind_lora_linear([[maybe_unused]] py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
#if PYQLORA_BIND_CPU
    bind<CpuBackend>(cpu, cpu::lora_dropout, cpu::lora_down, cpu::lora_up, cpu::lora_backward);
#endif
#if PYQLORA_BIND_CUDA
    bind<CudaBackend>(cuda, cuda::lora_dropout, cuda::lora_down, cuda::lora_up, cuda::lora_backward);
    bind_splits(cuda);
#endif
}

}  // namespace pyqlora
