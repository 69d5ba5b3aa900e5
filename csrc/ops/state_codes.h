// Encoding on a dynamic map: the index of the entry nearest to y in [-1, 1], the lower one on a tie, by one table
// lookup.
//
// Floats sort like their bits, so the top bits of |y| (the exponent and a few bits of the mantissa) cut the axis into
// buckets. The map is coarse against them: a bucket holds at most one of the 255 midpoints. Its table entry is
//     code at the start of the bucket << shift  +  distance from the midpoint to the end of the bucket (0: no midpoint)
// and adding the remaining low bits of y carries into the code exactly when y lies above the midpoint.
// Negative y run the other way: their low bits are inverted, and their buckets have a table of their own.
//
// In vector registers `Decades` and `Regions` give the same code without a memory access: within a decade of the map
// the codes are evenly spaced, so the rank of |y| above zero is floor(|y| * slope + start), exact but for values next
// to a midpoint, which are seen by their fraction and looked up in the table.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/float16.h"

namespace pyqlora::cpu {

class StateCodes {
  public:
    // Below 2^-23 lies no midpoint of either map, 1 is the largest input.
    static constexpr uint32_t lowest = 0x34000000u, highest = 0x3f800000u;

    // `sign` says whether negative values occur: the signed map's 128 entries a side need one bit less.
    StateCodes(const float* given, bool sign) : sign(sign), shift(sign ? 17 : 16) {
        std::copy_n(given, 256, map);
        for (int i = 0; i < 255; ++i) {
            const double middle = (static_cast<double>(map[i]) + map[i + 1]) / 2;
            float above = static_cast<float>(middle);
            if (above <= middle) above = std::nextafter(above, 2.0f);
            above_[i] = above;
        }
        if (!std::is_sorted(map, map + 256) || code(0.0f) != code(as_float(lowest))) unsupported();
        if (sign && code(0.0f) != code(-as_float(lowest))) unsupported();
        buckets = ((highest - lowest) >> shift) + 1;
        table.resize(buckets * (sign ? 2 : 1));
        const uint32_t last = (1u << shift) - 1;
        uint32_t next = code(as_float(lowest));
        for (uint32_t b = 0; b < buckets; ++b) {
            const uint32_t first = lowest + (b << shift);
            table[b] = entry(as_float(first), as_float(first + last), next);
        }
        next = 0;
        for (uint32_t b = sign ? buckets : 0; b-- > 0;) {
            const uint32_t first = lowest + (b << shift);
            table[buckets + b] = entry(-as_float(first + last), -as_float(first), next);
        }
        fill_regions(fill_decades());
        for (int i = 0; i < 256; ++i)
            for (int b = 0; b < 4; ++b) map_bytes[b][i] = static_cast<uint8_t>(bit_cast<uint32_t>(map[i]) >> 8 * b);
    }

    uint8_t operator()(float y) const {
        const auto bits = bit_cast<uint32_t>(y);
        const uint32_t a = std::min(std::max(bits & 0x7fffffffu, lowest), highest) - lowest;
        const bool negative = sign && bits >> 31;
        const uint32_t mask = (1u << shift) - 1, low = negative ? ~a & mask : a & mask;
        return static_cast<uint8_t>((table[(a >> shift) + (negative ? buckets : 0)] + low) >> shift);
    }

    // Regions of |y|: 0 below the first midpoint, 1 to 7 the decades, 8 from the last midpoint up.
    struct Decades {
        static constexpr float margin = 0x1p-12f;
        // By the low 5 bits of the exponent, to be added to the float's bits: the region then stands from bit 23 up.
        // The float just below a region gives ones in all lower bits.
        uint32_t region[32] = {};
        float slope[16] = {}, start[16] = {}, last[16] = {};  // last: the largest floor in a region, plus a half
    };

    // The same for registers of eight. Throughout decade d = 1 to 7 the float |y| * slope + offset runs from 1 to 2,
    // and its significand from the leading one on is the rank of |y| (on the unsigned map the rank plus one) and a
    // fraction: a shift by 24 - d (23 - d) leaves the rank. Slopes for regions 0 and 8, which share an entry, fit the
    // same formula. The shift stands for the region, its low three bits for the entry.
    struct Regions {
        static constexpr int margin = 4;  // of the significand's last digits: what the arithmetic may be off by
        static constexpr uint32_t one = 126u << 23, below_two = 0x3fffffffu;  // one: leaves the leading one at bit 23
        static constexpr float offset = 8.0f / 9.0f + margin * 0x1p-23f;
        int first = 0;           // what the shift leaves above the rank
        uint8_t shift[16] = {};  // where the fourfold range begins that |y|'s upper eight bits, modulo 16, name
        int32_t next[8] = {};    // the largest float below the region after this one
        float slope[8] = {};

        // The rank of |y|, or -1 where it is too near a midpoint to tell.
        int rank(float y) const {
            const uint32_t a = std::max(bit_cast<uint32_t>(y) & 0x7fffffffu, lowest);
            int s = shift[a >> 24 & 15];
            s -= static_cast<int32_t>(a) > next[s & 7];
            const auto significand = bit_cast<uint32_t>(fmaf(as_float(a), slope[s & 7], offset));
            const uint32_t fraction =
                significand & ((1u << (s - (significand > below_two))) - 1);  // from 2 up digits count double
            if (fraction < 2 * margin) return -1;
            return std::max(static_cast<int>((std::min(significand, below_two) - one) >> s) - first, 0);
        }
    };

    alignas(64) float map[256];
    bool sign;
    int shift;
    uint32_t buckets;
    std::vector<uint32_t> table;
    int zero;  // the code of 0
    Decades decades;
    Regions regions;
    alignas(64) uint8_t map_bytes[4][256];  // each byte of the map's floats, for lookups by byte

  private:
    std::array<float, 255> above_;  // the smallest float above each midpoint

    uint32_t code(float y) const {
        return static_cast<uint32_t>(std::upper_bound(above_.begin(), above_.end(), y) - above_.begin());
    }

    static float as_float(uint32_t bits) { return bit_cast<float>(bits); }

    // The entry of the bucket [from, to]; `next` is the first midpoint not yet passed.
    uint32_t entry(float from, float to, uint32_t& next) const {
        while (next < 255 && above_[next] <= from) ++next;
        if (next == 255 || above_[next] > to) return next << shift;
        if (next < 254 && above_[next + 1] <= to) unsupported();
        const auto distance = static_cast<int32_t>(bit_cast<uint32_t>(above_[next]) - bit_cast<uint32_t>(from));
        return (next << shift) + (1u << shift) - std::abs(distance);
    }

    // Returns the smallest value of regions 1 to 8.
    std::array<float, 8> fill_decades() {
        zero = code(0.0f);
        decades.start[0] = decades.last[0] = 0.5f;
        std::array<float, 8> splits;
        int rank = 1;
        for (int d = 1; d <= 7; ++d) {
            const int cells = (sign ? 1 : 2) << (d - 1);
            const double low = std::pow(10.0, d - 8), slope = cells / (9 * low), start = rank - low * slope;
            decades.slope[d] = static_cast<float>(slope);
            decades.start[d] = static_cast<float>(start);
            decades.last[d] = static_cast<float>(rank + cells - 1) + 0.5f;
            splits[d - 1] = above_[zero + rank - 1];
            for (int k = rank + 1; k < rank + cells; ++k) {
                if (std::fabs(above_[zero + k - 1] * slope + start - k) > Decades::margin / 2) unsupported();
            }
            // The negative side is the mirror image, but for a tie: one float below a split is looked up as well.
            const float below = std::nextafter(std::nextafter(splits[d - 1], 0.0f), 0.0f);
            if (sign && code(-splits[d - 1]) != code(-below) - 1) unsupported();
            rank += cells;
        }
        if (zero + rank != 255 || (!sign && zero != 0)) unsupported();
        splits[7] = above_[254];
        decades.start[8] = decades.last[8] = static_cast<float>(rank) + 0.5f;
        for (uint32_t exponent = lowest >> 23; exponent <= highest >> 23; ++exponent) {
            const float* split = std::upper_bound(splits.begin(), splits.end(), as_float(exponent << 23));
            uint32_t& region = decades.region[exponent & 31];
            region = (static_cast<uint32_t>(split - splits.begin()) - exponent) << 23;
            if (split != splits.end() && bit_cast<uint32_t>(*split) >> 23 == exponent)
                region += (1u << 23) - (bit_cast<uint32_t>(*split) & 0x7fffffu);
        }
        return splits;
    }

    void fill_regions(const std::array<float, 8>& splits) {
        const int top = sign ? 24 : 23;  // the shift of region 0
        regions.first = 24 - top;
        auto region = [&](uint32_t bits) {
            return static_cast<int>(std::upper_bound(splits.begin(), splits.end(), as_float(bits)) - splits.begin());
        };
        for (int r = 0; r < 8; ++r) {
            const int entry = (top - r) & 7;
            regions.next[entry] = bit_cast<int32_t>(splits[r]) - 1;
            regions.slope[entry] = static_cast<float>(1 / (9 * std::pow(10.0, r - 8)));
        }
        // Region 0 has values of next to nothing, region 8 values of nearly 1.
        regions.slope[top & 7] = 1.0f / 9.0f + 0x1p-9f;
        if (sign) {  // the one cell of region 1 begins a float early, which may be a tie, and is seen to be near
            --regions.next[top & 7];
            regions.slope[(top - 1) & 7] = 1.0f / 9.0f / splits[0];
        }
        for (uint32_t bits = lowest; bits < highest; bits += 1u << 24) {
            const int from = region(bits);
            if (region(bits + (1u << 24) - 1) > from + 1) unsupported();
            regions.shift[bits >> 24 & 15] = static_cast<uint8_t>(top - from);
        }
        for (int i = 0; i < 255; ++i) {
            const float ends[2] = {std::nextafter(above_[i], -2.0f), above_[i]};
            for (int side = 0; side < 2; ++side) {
                const int rank = regions.rank(ends[side]);
                if (rank != std::abs(i + side - zero) && rank >= 0) unsupported();
            }
        }
    }

    [[noreturn]] void unsupported() const {
        throw std::invalid_argument(std::string("optim_step: ") + (sign ? "qmap1" : "qmap2") + ": expected the " +
                                    (sign ? "signed" : "unsigned") + " dynamic map of create_dynamic_map, got another");
    }
};

}  // namespace pyqlora::cpu
