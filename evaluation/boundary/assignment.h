// Of all maximum matchings of prediction and ground-truth pixels within a distance one with the least sum of distances,
// kept up to date as the prediction changes. Several annotators need it: which pixels are matched counts there.
//
// A pair's weight is its cost, whole hundredths of a pixel, less a bonus above any sum of costs; a pixel that stays alone
// weighs nothing. The least total weight is kept with the dual variables of its linear program (Kuhn, "The Hungarian
// method for the assignment problem", 1955): weight - u - v >= 0 for each possible pair and 0 for the pairs taken,
// u, v <= 0, and 0 at whoever is alone. A pixel that arrives, on either side, is one search for the shortest augmenting
// path (Dijkstra on weight - u - v); a prediction pixel that leaves makes its partner arrive anew. Such a search ends
// where it pays no longer, mostly after a few pixels.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

class Assignment {
  public:
    enum Side { PREDICTION, TRUTH };

    Assignment(const bool* truth, int height, int width, double distance) : height_(height), width_(width) {
        frame_ = static_cast<int>(std::min(distance, std::max(height, width) - 1.0));
        stride_ = width + 2 * frame_;
        const size_t framed = static_cast<size_t>(height + 2 * frame_) * stride_;
        for (auto& side : sides_) {
            side.present.assign(framed, 0);
            side.partner.assign(framed, ALONE);
            side.dual.assign(framed, 0);
            side.length.assign(framed, 0);
            side.seen.assign(framed, 0);
            side.before.assign(framed, ALONE);
        }
        for (int dy = -frame_; dy <= frame_; ++dy)
            for (int dx = -frame_; dx <= frame_; ++dx)
                if (static_cast<double>(dy) * dy + static_cast<double>(dx) * dx <= distance * distance)
                    disc_.push_back({dy * stride_ + dx, hundredths(dy, dx) - BONUS});
        std::sort(disc_.begin(), disc_.end(), [](const Offset& a, const Offset& b) { return a.weight < b.weight; });
        for (int32_t i = 0; i < height * width; ++i) sides_[TRUTH].present[framed_at(i)] = truth[i];
    }

    // Makes the matching the cheapest maximum one for the prediction pixels `set`, whose H x W picture is `map`.
    void update(const std::vector<int32_t>& set, const std::vector<uint8_t>& map) {
        auto& [prediction, truth] = sides_;
        std::vector<int32_t> freed;
        for (const int32_t pixel : set_) {
            if (map[pixel]) continue;
            const int32_t at = framed_at(pixel), partner = prediction.partner[at];
            prediction.present[at] = 0;
            if (partner == ALONE) continue;
            prediction.partner[at] = truth.partner[partner] = ALONE;
            truth.present[partner] = 0;                                  // until it arrives below
            freed.push_back(partner);
            --size_;
        }
        for (const int32_t at : freed) arrive(TRUTH, at);
        for (const int32_t pixel : set)
            if (!prediction.present[framed_at(pixel)]) arrive(PREDICTION, framed_at(pixel));
        set_ = set;
    }

    int64_t size() const { return size_; }

    // Hundredths of a pixel, each pair's distance rounded.
    int64_t cost() const {
        int64_t sum = 0;
        for (const int32_t pixel : set_) {
            const int32_t at = framed_at(pixel), other = sides_[PREDICTION].partner[at];
            if (other != ALONE) sum += hundredths(other / stride_ - at / stride_, other % stride_ - at % stride_);
        }
        return sum;
    }

    // The flat index of a prediction pixel's partner, or ALONE.
    int32_t partner(int32_t pixel) const {
        const int32_t at = sides_[PREDICTION].partner[framed_at(pixel)];
        return at == ALONE ? ALONE : (at / stride_ - frame_) * width_ + at % stride_ - frame_;
    }

    static constexpr int32_t ALONE = -1;

  private:
    static constexpr int64_t BONUS = int64_t{1} << 40;

    struct Offset {
        int32_t step;
        int64_t weight;
    };

    // Arrays over the framed map. length, before: of the present search, valid where `seen` holds its number.
    struct Nodes {
        std::vector<uint8_t> present;
        std::vector<int32_t> partner, before;
        std::vector<int64_t> dual, length, seen;
    };

    static int64_t hundredths(double dy, double dx) { return std::llrint(100 * std::sqrt(dy * dy + dx * dx)); }

    int32_t framed_at(int32_t pixel) const { return (pixel / width_ + frame_) * stride_ + pixel % width_ + frame_; }

    void arrive(Side side, int32_t root) {
        Nodes &own = sides_[side], &other = sides_[1 - side];
        own.present[root] = 1;
        int64_t dual = 0;
        for (const auto& [step, weight] : disc_)
            if (const int32_t at = root + step; other.present[at]) dual = std::min(dual, weight - other.dual[at]);
        own.dual[root] = dual;
        if (dual < 0) search(own, other, root);
    }

    // From `root`, alone, along the shortest path to where the total weight is least: to a free pixel of the other side,
    // or to one of its own side that is left alone instead.
    void search(Nodes& own, Nodes& other, int32_t root) {
        ++search_;
        reached_.clear();
        queue_.clear();
        own_.clear();
        int64_t best = INT64_MAX;
        int32_t loser = ALONE, winner = ALONE;                           // who is alone in the end; who no longer is
        for (int32_t at = root; at != ALONE;) {
            const int64_t here = at == root ? 0 : own.length[at];
            own.length[at] = here;
            own_.push_back(at);
            if (here - own.dual[at] < best) {
                best = here - own.dual[at];
                loser = at;
                winner = ALONE;
            }
            for (const auto& [step, weight] : disc_) {
                const int32_t next = at + step;
                if (!other.present[next]) continue;
                const int64_t length = here + weight - own.dual[at] - other.dual[next];
                if (length >= best || (other.seen[next] == search_ && other.length[next] <= length)) continue;
                if (other.seen[next] != search_) reached_.push_back(next);
                other.seen[next] = search_;
                other.length[next] = length;
                other.before[next] = at;
                if (other.partner[next] == ALONE) {
                    best = length;
                    winner = next;
                } else {
                    queue_.emplace_back(length, next);
                    std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
                }
            }
            at = next_own(own, other, best);
        }
        for (const int32_t at : own_) own.dual[at] += best - own.length[at];
        for (const int32_t at : reached_) other.dual[at] -= std::max<int64_t>(best - other.length[at], 0);
        take(own, other, root, winner != ALONE ? winner : own.partner[loser]);
        if (winner == ALONE && loser != root) own.partner[loser] = ALONE;
        size_ += winner != ALONE;
    }

    // The nearest pixel of the own side that is not done, or ALONE where none is nearer than `best`.
    int32_t next_own(Nodes& own, const Nodes& other, int64_t best) {
        while (!queue_.empty()) {
            const auto [length, at] = queue_.front();
            std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
            queue_.pop_back();
            if (length >= best) return ALONE;
            if (length > other.length[at]) continue;                     // a shorter way was found
            own.length[other.partner[at]] = length;
            return other.partner[at];
        }
        return ALONE;
    }

    // Changes partners along the path that leads from `root` to `end` on the other side.
    void take(Nodes& own, Nodes& other, int32_t root, int32_t end) {
        while (end != ALONE) {
            const int32_t at = other.before[end], next = own.partner[at];
            own.partner[at] = end;
            other.partner[end] = at;
            if (at == root) return;
            end = next;
        }
    }

    int height_, width_, frame_, stride_;
    std::array<Nodes, 2> sides_;
    std::vector<Offset> disc_;
    std::vector<int32_t> set_;                                           // prediction pixels
    std::vector<int32_t> own_, reached_;                                 // by the present search
    std::vector<std::pair<int64_t, int32_t>> queue_;
    int64_t search_ = 0, size_ = 0;
};
