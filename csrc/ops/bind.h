// One line per operation, for module.cpp and for the emulation's module; and what module.cpp alone binds.
#pragma once
#include <pybind11/pybind11.h>

namespace pyqlora {

void bind_output_memory(pybind11::module_& cpu);

void bind_optim_step(pybind11::module_& cpu, pybind11::module_& cuda);
void bind_paged(pybind11::module_& cpu, pybind11::module_& cuda);
void bind_quantize(pybind11::module_& cpu, pybind11::module_& cuda);
void bind_linear_4bit(pybind11::module_& cpu, pybind11::module_& cuda);
void bind_lora_linear(pybind11::module_& cpu, pybind11::module_& cuda);
void bind_lora_linear_4bit(pybind11::module_& cpu, pybind11::module_& cuda);
void bind_linear_dense(pybind11::module_& cpu, pybind11::module_& cuda);
void bind_linear_cross_entropy(pybind11::module_& cpu, pybind11::module_& cuda);
void bind_attention(pybind11::module_& cpu, pybind11::module_& cuda);
void bind_rms_norm(pybind11::module_& cpu, pybind11::module_& cuda);
void bind_rotary(pybind11::module_& cpu, pybind11::module_& cuda);
void bind_swiglu(pybind11::module_& cpu, pybind11::module_& cuda);

inline void bind_operations(pybind11::module_& cpu, pybind11::module_& cuda) {
    bind_quantize(cpu, cuda);
    bind_linear_4bit(cpu, cuda);
    bind_lora_linear(cpu, cuda);
    bind_lora_linear_4bit(cpu, cuda);
    bind_linear_dense(cpu, cuda);
    bind_linear_cross_entropy(cpu, cuda);
    bind_attention(cpu, cuda);
    bind_rms_norm(cpu, cuda);
    bind_rotary(cpu, cuda);
    bind_swiglu(cpu, cuda);
    bind_optim_step(cpu, cuda);
    bind_paged(cpu, cuda);
}

}  // namespace pyqlora
