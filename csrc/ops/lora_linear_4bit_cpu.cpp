#include "ops/linear_4bit_gemm.h"
#include "ops/lora_linear_4bit.h"
#include "ops/lora_linear_cpu.h"

namespace pyqlora::cpu {

void lora_linear_4bit(const LoraLinear4bitArgs& a, int threads) {
    lora_down(a.down, threads);
    if (a.int16)
        linear_4bit_int16({a.linear}, threads);
    else
        linear_4bit(a.linear, threads);
}

void lora_linear_4bit_backward(const LoraLinear4bitBackwardArgs& a, int threads) {
    const Linear4bitBackwardArgs& l = a.linear;
    lora_backward(a.of_b, threads);
    if (a.of_a.db.defined()) lora_backward(a.of_a, threads);
    if (!l.dx.defined()) return;
    const Weight weight(l.packed, l.scales, l.k, l.blocksize, l.type);
    const int64_t rank = a.of_b.rank();
    // The update first: what is dropped of it is dropped before the rest is added.
    const Term update{rank, strips_along(rows_of(a.of_b.ds, rank)), pack_across(rows_of(a.a, l.k)),
                      drop_in_place(a.of_a.dropout)};
    const Term base{l.n, strips_along(rows_of(l.dy, l.n)), columns_of(weight), store_to(l.dx, l.k)};
    multiply(l.m(), l.k, {update, base}, threads);
}

}  // namespace pyqlora::cpu
