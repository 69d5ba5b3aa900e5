// The 4-bit kernels over a `Simd`: quantize_cpu.cpp includes this file once for each instruction set, inside its
// namespace and target region. What is no multiple of 32 elements goes through the portable code.

template <class T, class Q>
void quantize_blocks(const Quantize4bitArgs& a, int64_t first_block, int64_t last_block) {
    const T* x = a.x.as<T>();
    uint8_t* packed = a.packed.as<uint8_t>();
    float* absmax = a.absmax.as<float>();
    const int64_t full_blocks = std::min(last_block, a.x.numel / a.blocksize);
    for (int64_t block = first_block; block < full_blocks; ++block) {
        const int64_t begin = block * a.blocksize, end = begin + a.blocksize;
        Simd::Ints bits = Simd::abs_bits(Simd::zero());
        for (int64_t i = begin; i < end; i += Simd::width) bits = Simd::max(bits, Simd::abs_bits(Simd::load(x + i)));
        absmax[block] = Simd::max_abs(bits);
        const Simd::Floats factor = Simd::set(1.0f / divisor(absmax[block]));
        for (int64_t i = begin; i < end; i += 32) {
            Simd::Floats scaled[Simd::registers];
            for (int r = 0; r < Simd::registers; ++r)
                scaled[r] = Simd::mul(Simd::load(x + i + Simd::width * r), factor);
            Simd::encode<Q>(scaled, packed + i / 2);
        }
    }
    if (full_blocks < last_block) scalar::quantize_blocks<T, Q>(a, std::max(first_block, full_blocks), last_block);
}

// Whole chunks of 32, the first of them at element `begin` of the weight and at `out`.
template <class T, class Q, bool stream>
void decode_chunks(const uint8_t* packed, const BlockScale& scale, int64_t blocksize, int64_t begin, int64_t end,
                   T* out) {
    int64_t i = begin;
    for (int64_t block = begin / blocksize; i < end; ++block) {
        const int64_t stop = std::min((block + 1) * blocksize, end);
        const auto table = Simd::table<Q, T>(scale(block));
        for (; i < stop; i += 32) table.template decode_to<stream>(packed + i / 2, out + (i - begin));
    }
    if (stream) _mm_sfence();
}

template <class T, class Q>
void decode(const uint8_t* packed, const BlockScale& scale, int64_t blocksize, int64_t begin, int64_t end, T* out,
            bool stream) {
    const int64_t first = std::min((begin + 31) / 32 * 32, end), last = std::max(first, end / 32 * 32);
    T* chunks = out + (first - begin);
    scalar::decode<T, Q>(packed, scale, blocksize, begin, first, out);
    if (stream && reinterpret_cast<uintptr_t>(chunks) % 64 == 0)
        decode_chunks<T, Q, true>(packed, scale, blocksize, first, last, chunks);
    else
        decode_chunks<T, Q, false>(packed, scale, blocksize, first, last, chunks);
    scalar::decode<T, Q>(packed, scale, blocksize, last, end, out + (last - begin));
}
