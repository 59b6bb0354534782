// Thinning of boundary maps (Lam, Lee, Suen, PAMI 1992). A sub-iteration visits only pixels beside a removed one.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

using Table = std::array<std::array<bool, 256>, 2>;

// Whether a pixel with this neighbourhood goes, per sub-iteration (Lam, Lee, Suen, PAMI 1992, p. 879). Bit k - 1 of the
// index is the paper's neighbour x_k: east, then counter-clockwise.
inline Table removal_table() {
    Table table{};
    for (int code = 0; code < 256; ++code) {
        std::array<bool, 10> x{};
        for (int k = 0; k < 10; ++k) x[k] = code >> (k + 7) % 8 & 1;     // x[1] .. x[8], x[9] = x[1]
        int crossings = 0, odd = 0, even = 0;
        for (int k = 1; k < 8; k += 2) {
            crossings += !x[k] && (x[k + 1] || x[k + 2]);
            odd += x[k] || x[k + 1];
            even += x[k + 1] || x[k + 2];
        }
        const int pairs = std::min(odd, even);
        const bool removable = crossings == 1 && pairs >= 2 && pairs <= 3;
        table[0][code] = removable && !((x[2] || x[3] || !x[8]) && x[1]);
        table[1][code] = removable && !((x[6] || x[7] || !x[4]) && x[5]);
    }
    return table;
}

// Thins a map that has a frame of zeros around it. All pixels of a sub-iteration are judged before any is removed.
class Thinner {
  public:
    Thinner(int height, int width)
        : stride_(width + 2), stamp_((height + 2) * static_cast<size_t>(stride_), 0),
          around_{1, 1 - stride_, -stride_, -1 - stride_, -1, stride_ - 1, stride_, stride_ + 1} {}

    // `set`: the positions of the set pixels of `map`.
    void thin(std::vector<uint8_t>& map, const std::vector<int32_t>& set) {
        static const Table table = removal_table();
        std::vector<int32_t> removed[2], candidates;
        for (int step = 0;; ++step) {
            if (step < 2) {
                candidates = set;
            } else {                                   // only what lost a neighbour since this rule was last applied
                candidates.clear();
                ++now_;
                for (const auto& list : removed)
                    for (const int32_t pixel : list)
                        for (const int offset : around_) add(map, pixel + offset, candidates);
            }
            auto& gone = removed[step % 2];
            gone.clear();
            for (const int32_t pixel : candidates) {
                if (!map[pixel]) continue;
                int code = 0;
                for (int k = 0; k < 8; ++k) code |= map[pixel + around_[k]] << k;
                if (table[step % 2][code]) gone.push_back(pixel);
            }
            for (const int32_t pixel : gone) map[pixel] = 0;
            if (step > 0 && removed[0].empty() && removed[1].empty()) return;
        }
    }

  private:
    void add(const std::vector<uint8_t>& map, int32_t pixel, std::vector<int32_t>& candidates) {
        if (!map[pixel] || stamp_[pixel] == now_) return;
        stamp_[pixel] = now_;
        candidates.push_back(pixel);
    }

    int stride_;
    std::vector<uint32_t> stamp_;
    uint32_t now_ = 0;
    std::array<int, 8> around_;
};
