#include "ops/lora_linear.h"

#include <pybind11/stl.h>

#include "core/backend.h"
#include "core/tensor_caster.h"
#include "ops/bind.h"

namespace pyqlora {
namespace {

namespace py = pybind11;
using namespace py::literals;

template <class Backend, class F>
void bind_dropout(py::module_& m, F lora_dropout) {
    m.def(
        "lora_dropout",
        [=](TensorRef x, TensorRef y, TensorRef seed, double dropout, int64_t columns, int64_t context) {
            run<Backend>(LoraDropoutArgs{x, y, {seed, dropout}, columns}, context, lora_dropout);
        },
        "x"_a, "y"_a, "seed"_a, "dropout"_a, "columns"_a, "context"_a);
}

#if PYQLORA_BIND_CUDA
void bind_products(py::module_& m) {
    m.def(
        "lora_down",
        [](TensorRef x, std::vector<TensorRef> a, int64_t k, std::vector<float> scales, TensorRef tiles, TensorRef seed,
           double dropout, TensorRef s, TensorRef workspace, int64_t context) {
            run<CudaBackend>(
                LoraDownArgs{x, {std::move(a), k}, std::move(scales), tiles, {seed, dropout}, s, workspace}, context,
                cuda::lora_down);
        },
        "x"_a, "a"_a, "k"_a, "scales"_a, "tiles"_a, "seed"_a, "dropout"_a, "s"_a, "workspace"_a, "context"_a);
    m.def(
        "lora_up",
        [](TensorRef s, std::vector<TensorRef> b, int64_t n, TensorRef tiles, TensorRef seed, double dropout,
           TensorRef y, bool accumulate, int64_t context) {
            run<CudaBackend>(LoraUpArgs{s, {std::move(b), n}, tiles, {seed, dropout}, y, accumulate}, context,
                             cuda::lora_up);
        },
        "s"_a, "b"_a, "n"_a, "tiles"_a, "seed"_a, "dropout"_a, "y"_a, "accumulate"_a, "context"_a);
    m.def(
        "lora_backward",
        [](TensorRef dy, TensorRef b, TensorRef s, double scale, TensorRef seed, double dropout, TensorRef ds,
           TensorRef db, bool transposed, TensorRef ds_parts, TensorRef db_parts, int64_t n, int64_t context) {
            run<CudaBackend>(
                LoraBackwardArgs{dy, b, s, scale, {seed, dropout}, ds, db, transposed, ds_parts, db_parts, n}, context,
                cuda::lora_backward);
        },
        "dy"_a, "b"_a, "s"_a, "scale"_a, "seed"_a, "dropout"_a, "ds"_a, "db"_a, "transposed"_a, "ds_parts"_a,
        "db_parts"_a, "n"_a, "context"_a);
    m.def("lora_down_splits", &cuda::lora_down_splits, "tiles"_a, "k"_a, "multiprocessors"_a);
    m.def("lora_backward_chunks", &cuda::lora_backward_chunks, "m"_a, "n"_a, "multiprocessors"_a);
    m.def("lora_backward_column_blocks", [](int64_t n) { return ceil_div(n, LoraBackwardArgs::columns); }, "n"_a);
}
#endif

}  // namespace

void bind_lora_linear([[maybe_unused]] py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
#if PYQLORA_BIND_CPU
    bind_dropout<CpuBackend>(cpu, cpu::lora_dropout);
#endif
#if PYQLORA_BIND_CUDA
    bind_dropout<CudaBackend>(cuda, cuda::lora_dropout);
    bind_products(cuda);
#endif
}

}  // namespace pyqlora
