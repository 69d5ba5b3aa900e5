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
    constexpr int64_t kScales = 64;  // decoded at a time
    float scales[kScales];
    const uint8_t* bytes = packed + begin / 2;
    int64_t left = blocksize - begin % blocksize;  // of the first block, which may have begun before
    const int64_t blocks = ceil_div(end, blocksize);
    for (int64_t block = begin / blocksize; block < blocks; block += kScales) {
        const int64_t count = std::min(kScales, blocks - block);
        scale.range(block, block + count, scales);
        for (int64_t b = 0; b < count; ++b, left = blocksize) {
            const auto table = Simd::table<Q, T>(scales[b]);
            __builtin_prefetch(bytes + 2048);
            const int64_t n = std::min(left, end - begin);
            for (int64_t i = 0; i < n; i += 32, bytes += 16, out += 32) table.template decode_to<stream>(bytes, out);
            begin += n;
        }
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
