// The kernel of rotary over a `Simd`: rotary_cpu.cpp includes this file once for each instruction set.

template <class T>
Simd::Floats rounded(Simd::Floats x) {
    T bits[Simd::width];
    Simd::store(bits, x);
    return Simd::load(bits);
}

template <class T>
void rotate(const T* x, const Angle<T>& a, int64_t half, T* y) {
    const Simd::Floats sign = Simd::set(a.sign), back = Simd::set(-a.sign);
    int64_t i = 0;
    for (; i + Simd::width <= half; i += Simd::width) {
        const Simd::Floats x0 = Simd::load(x + i), x1 = Simd::load(x + half + i);
        const Simd::Floats along0 = rounded<T>(Simd::mul(x0, Simd::load(a.cos + i)));
        const Simd::Floats along1 = rounded<T>(Simd::mul(x1, Simd::load(a.cos + half + i)));
        const Simd::Floats across0 = rounded<T>(Simd::mul(x1, Simd::mul(back, Simd::load(a.sin0 + i))));
        const Simd::Floats across1 = rounded<T>(Simd::mul(x0, Simd::mul(sign, Simd::load(a.sin1 + i))));
        Simd::store(y + i, Simd::add(along0, across0));
        Simd::store(y + half + i, Simd::add(along1, across1));
    }
    rotate_rest(x, a, half, i, y);
}
