// The extension module pyqlora._C: submodules cpu and cuda with the same functions over the same arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/backend.h"
#include "core/cpu_features.h"
#include "ops/bind.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of pyqlora.";
    py::module_ cpu = m.def_submodule("cpu", "Kernels on CPU tensors; `context` is the number of threads.");
    py::module_ cuda = m.def_submodule("cuda", "Kernels on CUDA tensors; `context` is a cudaStream_t.");
    m.attr("with_cuda") = static_cast<bool>(PYQLORA_BIND_CUDA);
    m.attr("cuda_architectures") = PYQLORA_CUDA_ARCHITECTURES;  // CMake's names, with spaces in between
    m.attr("cuda_toolkit") = PYQLORA_CUDA_TOOLKIT;

    cpu.def("isa", [] { return pyqlora::cpu::name(pyqlora::cpu::active_isa()); }, "Instruction set in use.");
    cpu.def("set_isa", &pyqlora::cpu::set_isa, "Use this instruction set from now on; '' for the default.");
    cpu.def("supported_isas", [] {
        std::vector<std::string> names;
        for (auto isa : pyqlora::cpu::supported_isas()) names.emplace_back(pyqlora::cpu::name(isa));
        return names;
    });

    pyqlora::bind_output_memory(cpu);
    pyqlora::bind_operations(cpu, cuda);
}
