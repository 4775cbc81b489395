// Sums over the ranks of one machine, concatenations, and rows for each other, through memory that they share.
//
// The segment: a line for each rank, with the number of its last exchange and of the last one that it has reduced, and
// its process; then, for each rank, two slots, which exchanges use in turns, and a result for each turn. A rank that
// begins exchange e + 2 knows that all have begun e + 1, so that nobody reads the slots of e any more.
#include "common.h"

#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>
#endif

#if defined(__linux__)

namespace {

constexpr int64_t LINE = 128;
constexpr int64_t WORTH_THREADS = 1 << 16;  // bytes from which a parallel region saves more than it costs
constexpr int64_t ALONE = 1 << 15;          // bytes up to which each rank adds up all of a sum
constexpr int SPINS = 2000;                 // then other processes get the processor
constexpr int YIELDS = 2000;                // then this one sleeps
enum { DONE = 0, TIMED_OUT = 1, DIED = 2 };

struct alignas(LINE) Line {
    std::atomic<int64_t> arrived, reduced, process;
};

double now_s() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

inline void pause_spinning() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Exchange {
    char* base;
    int64_t rank, ranks, slot_bytes;
    double timeout_s;

    Line& line(int64_t r) const { return reinterpret_cast<Line*>(base)[r]; }
    char* slot(int64_t r, int64_t turn) const { return base + LINE * ranks + (turn * (ranks + 1) + r) * slot_bytes; }
    char* result(int64_t turn) const { return slot(ranks, turn); }

    // Waits until the counter of every rank has reached `turn`.
    int wait(std::atomic<int64_t> Line::*counter, int64_t turn) const {
        for (int64_t r = 0; r < ranks; r++) {
            double begin_s = 0;
            for (int64_t tries = 0; (line(r).*counter).load(std::memory_order_acquire) < turn; tries++) {
                if (tries < SPINS) {
                    pause_spinning();
                } else if (tries < SPINS + YIELDS) {
                    sched_yield();
                } else {
                    timespec nap{0, 50000};
                    nanosleep(&nap, nullptr);
                    double time_s = now_s();
                    if (begin_s == 0) begin_s = time_s;
                    if (time_s - begin_s > timeout_s) return TIMED_OUT;
                    pid_t process = pid_t(line(r).process.load());
                    if (tries % 64 == 0 && kill(process, 0) != 0 && errno == ESRCH) return DIED;
                }
            }
        }
        return DONE;
    }
};

void copy(char* to, const char* from, int64_t bytes) {
    constexpr int64_t PIECE = 1 << 14;
#pragma omp parallel for schedule(static) if (bytes >= WORTH_THREADS)
    for (int64_t i = 0; i < bytes; i += PIECE) std::memcpy(to + i, from + i, bytes - i < PIECE ? bytes - i : PIECE);
}

// y[i] = the sum of x[r][i] over ranks, in their order and in float32, rounded once; for elements [begin, end).
template <typename T>
void add_up(const Exchange& exchange, int64_t turn, T* y, int64_t begin, int64_t end) {
    const T* x[64];
    for (int64_t r = 0; r < exchange.ranks; r++) x[r] = reinterpret_cast<const T*>(exchange.slot(r, turn));
    int64_t whole = begin + (end - begin) / LANES * LANES;
#pragma omp parallel for schedule(static) if ((end - begin) * int64_t(sizeof(T)) >= WORTH_THREADS)
    for (int64_t i = begin; i < whole; i += LANES) {
        vec sum = load(x[0] + i);
        for (int64_t r = 1; r < exchange.ranks; r++) sum += load(x[r] + i);
        store(y + i, sum);
    }
    for (int64_t i = whole; i < end; i++) {
        float sum = to_float(x[0][i]);
        for (int64_t r = 1; r < exchange.ranks; r++) sum += to_float(x[r][i]);
        y[i] = from_float<T>(sum);
    }
}

// Sums n elements that fit into a slot, in place.
template <typename T>
int all_reduce_slot(const Exchange& exchange, T* x, int64_t n) {
    Line& own = exchange.line(exchange.rank);
    int64_t number = own.arrived.load(std::memory_order_relaxed) + 1, turn = number % 2, bytes = n * sizeof(T);
    copy(exchange.slot(exchange.rank, turn), reinterpret_cast<const char*>(x), bytes);
    own.arrived.store(number, std::memory_order_release);
    if (int error = exchange.wait(&Line::arrived, number)) return error;
    if (exchange.ranks == 2 || bytes <= ALONE) {
        add_up(exchange, turn, x, 0, n);
        own.reduced.store(number, std::memory_order_release);
        return DONE;
    }
    T* result = reinterpret_cast<T*>(exchange.result(turn));
    int64_t share = (n / exchange.ranks + LANES) / LANES * LANES;  // of each rank, the last ones may have less
    int64_t begin = exchange.rank * share < n ? exchange.rank * share : n, end = begin + share < n ? begin + share : n;
    add_up(exchange, turn, result, begin, end);
    own.reduced.store(number, std::memory_order_release);
    if (int error = exchange.wait(&Line::reduced, number)) return error;
    copy(reinterpret_cast<char*>(x), reinterpret_cast<const char*>(result), bytes);
    return DONE;
}

template <typename T>
int all_reduce(const Exchange& exchange, T* x, int64_t n) {
    int64_t most = exchange.slot_bytes / sizeof(T);
    for (int64_t i = 0; i < n; i += most)
        if (int error = all_reduce_slot(exchange, x + i, n - i < most ? n - i : most)) return error;
    return DONE;
}

// Rows that ranks send to each other, of which each rank's, without those for itself, are one stream of bytes.
struct Streams {
    const int64_t* counts;
    int64_t ranks, row_bytes;

    int64_t bytes(int64_t from, int64_t to) const { return counts[from * ranks + to] * row_bytes; }

    // Bytes in a rank's stream before those for rank `to`.
    int64_t before(int64_t from, int64_t to) const {
        int64_t sum = 0;
        for (int64_t r = 0; r < to; r++) sum += r == from ? 0 : bytes(from, r);
        return sum;
    }

    int64_t longest() const {
        int64_t most = 0;
        for (int64_t r = 0; r < ranks; r++) most = before(r, ranks) > most ? before(r, ranks) : most;
        return most;
    }
};

// Calls use(begin, place, bytes) for the part of [0, size), a section at `start` in a stream, that is in a piece of the
// stream: it begins at `begin` in the section and at `place` in the piece.
template <typename Use>
void for_part(int64_t start, int64_t size, int64_t piece, int64_t piece_bytes, Use use) {
    int64_t first = start > piece ? start : piece;
    int64_t end = start + size < piece + piece_bytes ? start + size : piece + piece_bytes;
    if (first < end) use(first - start, first - piece, end - first);
}

}  // namespace

// Bytes of a segment.
KERNEL int64_t exchange_bytes(int64_t ranks, int64_t slot_bytes) { return LINE * ranks + 2 * (ranks + 1) * slot_bytes; }

// Enters this process into a zeroed segment.
KERNEL void exchange_enter(char* base, int64_t rank) { reinterpret_cast<Line*>(base)[rank].process.store(getpid()); }

// Sums x [n] over the ranks, in place. dtype: 0 float32, 1 bfloat16, 2 float16. Returns 0; 1: a rank did not come in
// time; 2: one has died.
KERNEL int exchange_all_reduce(char* base, int64_t rank, int64_t ranks, int64_t slot_bytes, double timeout_s, void* x,
                               int64_t n, int dtype) {
    Exchange exchange{base, rank, ranks, slot_bytes, timeout_s};
    if (dtype == 0) return all_reduce(exchange, static_cast<float*>(x), n);
    if (dtype == 1) return all_reduce(exchange, static_cast<bf16*>(x), n);
    return all_reduce(exchange, static_cast<f16*>(x), n);
}

// Copies the `bytes` at x of each rank r to y + r * bytes; returns as exchange_all_reduce.
KERNEL int exchange_all_gather(char* base, int64_t rank, int64_t ranks, int64_t slot_bytes, double timeout_s,
                               const char* x, int64_t bytes, char* y) {
    Exchange exchange{base, rank, ranks, slot_bytes, timeout_s};
    Line& own = exchange.line(rank);
    for (int64_t i = 0; i < bytes; i += slot_bytes) {
        int64_t count = bytes - i < slot_bytes ? bytes - i : slot_bytes;
        int64_t number = own.arrived.load(std::memory_order_relaxed) + 1, turn = number % 2;
        copy(exchange.slot(rank, turn), x + i, count);
        own.arrived.store(number, std::memory_order_release);
        if (int error = exchange.wait(&Line::arrived, number)) return error;
        for (int64_t r = 0; r < ranks; r++) copy(y + r * bytes + i, exchange.slot(r, turn), count);
        own.reduced.store(number, std::memory_order_release);
    }
    return DONE;
}

// Sends rows to ranks: counts[a * ranks + b] from rank a to rank b. x has this rank's in the order of those that they are
// for, y gets those for it in the order of those that they are from. Returns as exchange_all_reduce.
KERNEL int exchange_all_to_all(char* base, int64_t rank, int64_t ranks, int64_t slot_bytes, double timeout_s,
                               const char* x, const int64_t* counts, int64_t row_bytes, char* y) {
    Exchange exchange{base, rank, ranks, slot_bytes, timeout_s};
    Streams streams{counts, ranks, row_bytes};
    Line& own = exchange.line(rank);
    int64_t longest = streams.longest();
    for (int64_t piece = 0; piece < longest; piece += slot_bytes) {
        int64_t number = own.arrived.load(std::memory_order_relaxed) + 1, turn = number % 2;
        const char* from = x;
        for (int64_t r = 0; r < ranks; from += streams.bytes(rank, r++))
            if (r != rank)
                for_part(streams.before(rank, r), streams.bytes(rank, r), piece, slot_bytes,
                         [&](int64_t begin, int64_t place, int64_t bytes) {
                             copy(exchange.slot(rank, turn) + place, from + begin, bytes);
                         });
        own.arrived.store(number, std::memory_order_release);
        if (int error = exchange.wait(&Line::arrived, number)) return error;
        char* to = y;
        for (int64_t r = 0; r < ranks; to += streams.bytes(r++, rank))
            if (r != rank)
                for_part(streams.before(r, rank), streams.bytes(r, rank), piece, slot_bytes,
                         [&](int64_t begin, int64_t place, int64_t bytes) {
                             copy(to + begin, exchange.slot(r, turn) + place, bytes);
                         });
        own.reduced.store(number, std::memory_order_release);
    }
    for (int64_t r = 0; r < rank; r++) x += streams.bytes(rank, r), y += streams.bytes(r, rank);
    copy(y, x, streams.bytes(rank, rank));
    return DONE;
}

#endif
