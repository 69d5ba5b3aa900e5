// One line per operation: the functions that module.cpp (and the emulation's module) calls.
#pragma once
#include <pybind11/pybind11.h>

namespace pyqlora {

void bind_quantize(pybind11::module_& cpu, pybind11::module_& cuda);

}  // namespace pyqlora
