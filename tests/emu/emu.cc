/* The fibres, the barriers and the launch of the host emulation; instructions are in instructions.cc. */
#include "emu.h"

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "launch.h"
#include "status.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SWITCHING(save, stack, size) __sanitizer_start_switch_fiber(save, stack, size)
#define SWITCHED(save, stack, size) __sanitizer_finish_switch_fiber(save, stack, size)
#else
#define SWITCHING(save, stack, size) (void)0
#define SWITCHED(save, stack, size) (void)0
#endif

namespace emu {
namespace {

constexpr size_t STACK = 256 << 10;
constexpr int WARP = 32;

struct Copy {
    void *to;
    const void *from;
    bool valid;
};

enum State { READY, AT_BARRIER, IN_WARP, DONE };

struct Fibre {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    void *fake_stack = nullptr; /* AddressSanitizer's */
    State state = READY;
    const char *instruction = nullptr;
    void *operands = nullptr;
    std::vector<Copy> copies;
};

struct Kernel {
    std::string source, name;
    void (*run)(const void *);
};

std::vector<Kernel> &kernels() {
    static std::vector<Kernel> all;
    return all;
}

/* One launch at a time: the running block, on the thread that launched it. */
struct Machine {
    ucontext_t scheduler;
    void *scheduler_fake = nullptr;
    const void *scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    std::vector<std::unique_ptr<Fibre>> fibres;
    int current = -1, block = 0;
    unsigned char *shared = nullptr;
    void (*run)(const void *) = nullptr;
    const void *params = nullptr;
} machine;

void back_to_scheduler(bool forever) {
    Fibre &fibre = *machine.fibres[machine.current];
    (void)forever;
    SWITCHING(forever ? nullptr : &fibre.fake_stack, machine.scheduler_stack, machine.scheduler_size);
    swapcontext(&fibre.context, &machine.scheduler);
    SWITCHED(fibre.fake_stack, &machine.scheduler_stack, &machine.scheduler_size);
}

void fibre_main() {
    SWITCHED(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
    machine.run(machine.params);
    Fibre &fibre = *machine.fibres[machine.current];
    if (!fibre.copies.empty()) stop("a thread ended with copies that it had not waited for");
    fibre.state = DONE;
    back_to_scheduler(true);
}

void start(Fibre &fibre) {
    fibre.state = READY;
    fibre.copies.clear();
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = STACK;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, fibre_main, 0);
}

void run_until_it_waits(int index) {
    Fibre &fibre = *machine.fibres[index];
    machine.current = index;
    SWITCHING(&machine.scheduler_fake, fibre.stack.data(), STACK);
    swapcontext(&machine.scheduler, &fibre.context);
    SWITCHED(machine.scheduler_fake, nullptr, nullptr);
}

void run_block(std::mt19937 &order, int seed) {
    const int threads = (int)machine.fibres.size();
    for (auto &fibre : machine.fibres) start(*fibre);
    std::vector<int> turn(threads);
    for (int i = 0; i < threads; ++i) turn[i] = seed == 1 ? threads - 1 - i : i;
    for (;;) {
        if (seed > 1) std::shuffle(turn.begin(), turn.end(), order);
        bool ran = false;
        for (int index : turn) {
            if (machine.fibres[index]->state == READY) {
                run_until_it_waits(index);
                ran = true;
            }
        }
        if (ran) continue;
        int done = 0, waiting = 0;
        for (auto &fibre : machine.fibres) {
            done += fibre->state == DONE;
            waiting += fibre->state == AT_BARRIER;
        }
        if (done == threads) return;
        if (waiting < threads) stop("threads wait at a barrier, or for their warp, that others never reach");
        for (auto &fibre : machine.fibres) fibre->state = READY;
    }
}

int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

}  // namespace

void stop(const char *reason) {
    fprintf(stderr, "emulation: block %d, thread %d: %s\n", machine.block, machine.current, reason);
    abort();
}

Registered::Registered(const char *source, const char *kernel, void (*run)(const void *)) {
    kernels().push_back({source, kernel, run});
}

int thread() { return machine.current; }
int block() { return machine.block; }
unsigned char *shared_memory() { return machine.shared; }

void block_barrier() {
    machine.fibres[machine.current]->state = AT_BARRIER;
    back_to_scheduler(false);
}

void together(const char *instruction, void *operands, void (*all)(void *const *)) {
    Fibre &own = *machine.fibres[machine.current];
    own.state = IN_WARP;
    own.instruction = instruction;
    own.operands = operands;
    const int first = machine.current / WARP * WARP;
    void *lanes[WARP];
    bool complete = true;
    for (int lane = 0; lane < WARP; ++lane) {
        Fibre &other = *machine.fibres[first + lane];
        if (other.state != IN_WARP) {
            complete = false;
            if (other.state != READY) stop("lanes of a warp have parted: one waits at a barrier or has ended");
        } else if (other.instruction != instruction) {
            stop("lanes of a warp are at different instructions");
        }
        lanes[lane] = other.operands;
    }
    if (!complete) {
        back_to_scheduler(false);
        return;
    }
    all(lanes);
    for (int lane = 0; lane < WARP; ++lane) machine.fibres[first + lane]->state = READY;
}

void queue_copy(void *to, const void *from, bool valid) {
    if ((uintptr_t)to % 16 || (valid && (uintptr_t)from % 16)) stop("an asynchronous copy of unaligned addresses");
    machine.fibres[machine.current]->copies.push_back({to, from, valid});
}

void finish_copies() {
    for (const Copy &copy : machine.fibres[machine.current]->copies) {
        if (copy.valid)
            memcpy(copy.to, copy.from, 16);
        else
            memset(copy.to, 0, 16);
    }
    machine.fibres[machine.current]->copies.clear();
}

}  // namespace emu

namespace rf {

rf_status current_device(Device *device) {
    device->arch = emu::setting("RF_EMU_ARCH", 90);
    device->shared_memory = device->arch >= 90 ? 227 << 10 : device->arch >= 80 ? 99 << 10 : device->arch >= 75 ? 64 << 10 : 96 << 10;
    return RF_OK;
}

rf_status launch(const Launch &what, const void *params, size_t) {
    for (const emu::Kernel &kernel : emu::kernels()) {
        if (kernel.source != what.source || kernel.name != what.kernel) continue;
        static std::mutex one_at_a_time;
        std::lock_guard<std::mutex> lock(one_at_a_time);
        emu::machine.run = kernel.run;
        emu::machine.params = params;
        while (emu::machine.fibres.size() < what.block) emu::machine.fibres.push_back(std::make_unique<emu::Fibre>());
        emu::machine.fibres.resize(what.block);
        const int seed = emu::setting("RF_EMU_ORDER", 0); /* 0: ascending, 1: descending, else shuffled at each step */
        std::mt19937 order(seed);
        for (unsigned block = 0; block < what.grid; ++block) {
            emu::machine.block = (int)block;
            emu::machine.shared = (unsigned char *)aligned_alloc(16, (what.shared + 15) / 16 * 16);
            memset(emu::machine.shared, 0xff, what.shared);
            emu::run_block(order, seed);
            free(emu::machine.shared);
        }
        return RF_OK;
    }
    return fail(RF_UNSUPPORTED, "the emulation has no kernel %s of %s", what.kernel, what.source);
}

}  // namespace rf

extern "C" const char *rf_architectures(void) { return "emulation"; }
