// What other operations use of lora_linear on the CPU: dropout in a product.
#pragma once
#include "core/gemm.h"
#include "ops/lora_linear.h"

namespace pyqlora::cpu {

// `then` that drops C in place; empty without dropout.
OnRow drop_in_place(const Dropout& dropout);

}  // namespace pyqlora::cpu
