/* What linear_rows.cpp and linear_int8.cpp share: the order in which sums are finished. */
#ifndef RADIO_FAST_CPU_ROWS_H
#define RADIO_FAST_CPU_ROWS_H

#include <stdint.h>

namespace rf {

/* Sums of up to 32 tokens in some panels, on their way to memory between the tile instructions for the next 32: row by
 * row, of each a panel's results at a time, by Self::finish, which calls `move` then.
 *
 * A panel's sums are 4 tiles: tokens 0…15 × features 0…15, × features 16…31, tokens 16…31 × …
 */
template <class Self>
struct Rows {
    static constexpr int64_t TOKENS = 32;
    const float *tiles = nullptr, *sums = nullptr;  // all of them; 16 of what is next, and 256 further on 16 more
    int64_t panels = 0, panel = 0, row = 0, rows = 0, due = 0;

    void begin(const float *from, int64_t count_panels, int64_t count_rows) {
        tiles = sums = from, panels = count_panels, rows = count_rows < TOKENS ? count_rows : TOKENS;
        panel = row = due = 0;
    }

    /* Whether that was the row's last panel. */
    inline __attribute__((always_inline)) bool move() {
        sums += 1024;
        if (++panel < panels) return false;
        panel = 0, row++;
        sums = tiles + (row >> 4) * 512 + (row & 15) * 16;
        return true;
    }

    /* What is due after one more of `steps`: all of it when 32 tokens have met as many panels. */
    inline __attribute__((always_inline)) void advance(int64_t steps) {
        for (due += TOKENS; due >= steps; due -= steps)
            if (row < rows) static_cast<Self *>(this)->finish();
    }

    void end() {
        while (row < rows) static_cast<Self *>(this)->finish();
    }
};

}  // namespace rf
#endif
