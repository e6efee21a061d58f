/* What the CPU kernels share: errors, threads, scratch memory. */
#ifndef RADIO_FAST_CPU_INTERNAL_H
#define RADIO_FAST_CPU_INTERNAL_H

#include <atomic>
#include <stddef.h>
#include <stdint.h>

#include "radio_fast_cpu.h"

namespace rf {

/* Keep a printf-style text as this thread's last error and return `status`. */
__attribute__((format(printf, 2, 3))) rf_cpu_status fail(rf_cpu_status status, const char *format, ...);
void clear_error();

/* Memory of this thread, of at least `bytes`, 64-byte aligned, kept for its next call; null if there is none. `use`: 0 for
 * what a thread works with, 1 for what the calling thread shares with the others. */
void *scratch(int use, size_t bytes);

/* Run body(argument) on `threads` threads of the OpenMP pool that torch has already loaded, on this one if there is
 * none. A second pool would fight with torch's for the cores: its workers spin for a while after each call. */
void run_parallel(int threads, void (*body)(void *), void *argument);

/* Local(body).run(item) for 0…items − 1, each taken by the next thread that is free: cores shared with others differ in
 * speed. A thread makes its own Local before its first item. False if one had no memory, and was not ready(). */
template <class Body>
bool for_each(int64_t items, int threads, Body &body) {
    struct Shared {
        Body &body;
        int64_t items;
        std::atomic<int64_t> next{0};
        std::atomic<bool> failed{false};
    } shared{body, items};
    auto worker = [](void *argument) {
        Shared &all = *static_cast<Shared *>(argument);
        int64_t item = all.next.fetch_add(1);
        if (item >= all.items) return;
        typename Body::Local local(all.body);
        if (!local.ready()) {
            all.failed = true;
            all.body.give_up();
            return;
        }
        for (; item < all.items && !all.failed; item = all.next.fetch_add(1)) local.run(item);
    };
    run_parallel(items < threads ? static_cast<int>(items) : threads, worker, &shared);
    return !shared.failed;
}

}  // namespace rf
#endif
