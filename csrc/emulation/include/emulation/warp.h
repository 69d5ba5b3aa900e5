// Barriers, shuffles, votes.
#pragma once

inline void __syncthreads(EMULATION_HERE) { emulation::block_barrier(0, emulation::none, file, line); }
inline int __syncthreads_or(int p, EMULATION_HERE) {
    return emulation::block_barrier(p != 0, emulation::any, file, line);
}
inline int __syncthreads_and(int p, EMULATION_HERE) {
    return emulation::block_barrier(p != 0, emulation::all, file, line);
}
inline int __syncthreads_count(int p, EMULATION_HERE) {
    return emulation::block_barrier(p != 0, emulation::count, file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_HERE) {
    emulation::warp_collective(emulation::sync_warp, mask, nullptr, [](unsigned, void* const*) {}, file, line);
}

namespace emulation {

struct Shuffle {
    uint64_t in, out;
    int source;
};
inline void shuffle_lanes(unsigned lanes, void* const* operands) {
    for (int l = 0; l < 32; ++l) {
        if (!(lanes >> l & 1)) continue;
        auto* s = static_cast<Shuffle*>(operands[l]);
        const bool there = lanes >> s->source & 1;
        s->out = there ? static_cast<Shuffle*>(operands[s->source])->in : ~uint64_t(0);  // poison from an absent lane
    }
}
template <class T>
T shuffle_from(unsigned mask, T value, int source, const char* file, int line) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    Shuffle s{0, 0, source};
    std::memcpy(&s.in, &value, sizeof(T));
    warp_collective(shuffle, mask, &s, shuffle_lanes, file, line);
    std::memcpy(&value, &s.out, sizeof(T));
    return value;
}

struct Ballot {
    bool in;
    uint32_t out;
};
inline void ballot_lanes(unsigned lanes, void* const* operands) {
    uint32_t votes = 0;
    for (int l = 0; l < 32; ++l) {
        if (lanes >> l & 1 && static_cast<Ballot*>(operands[l])->in) votes |= 1u << l;
    }
    for (int l = 0; l < 32; ++l) {
        if (lanes >> l & 1) static_cast<Ballot*>(operands[l])->out = votes;
    }
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_HERE) {
    const int first = emulation::lane() & ~(width - 1);
    return emulation::shuffle_from(mask, value, first | (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATION_HERE) {
    const int l = emulation::lane(), source = l ^ bits;
    const bool inside = (source & ~(width - 1)) <= (l & ~(width - 1));
    return emulation::shuffle_from(mask, value, inside ? source : l, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_HERE) {
    const int l = emulation::lane(), d = static_cast<int>(delta);
    return emulation::shuffle_from(mask, value, (l & (width - 1)) + d < width ? l + d : l, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_HERE) {
    const int l = emulation::lane(), d = static_cast<int>(delta);
    return emulation::shuffle_from(mask, value, (l & (width - 1)) >= d ? l - d : l, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, EMULATION_HERE) {
    emulation::Ballot b{p != 0, 0};
    emulation::warp_collective(emulation::ballot, mask, &b, emulation::ballot_lanes, file, line);
    return b.out;
}
inline int __any_sync(unsigned mask, int p, EMULATION_HERE) { return __ballot_sync(mask, p, file, line) != 0; }
inline int __all_sync(unsigned mask, int p, EMULATION_HERE) { return __ballot_sync(mask, !p, file, line) == 0; }
