#include "ops/lora_linear_4bit.h"

namespace pyqlora::cpu {

void lora_linear_4bit(const LoraLinear4bitArgs& a, int threads) {
    lora_down(a.down, threads);
    if (a.int16)
        linear_4bit_int16({a.linear}, threads);
    else
        linear_4bit(a.linear, threads);
}

}  // namespace pyqlora::cpu
