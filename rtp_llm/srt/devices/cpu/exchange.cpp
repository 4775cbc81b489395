// Sums over the ranks of one machine, concatenations, and tokens for experts, through memory that they share.
//
// The segment: a line for each rank, with the number of its last exchange and of the last one that it has reduced, and
// its process; then, for each rank, two slots, which exchanges use in turns, and a result for each turn. A rank that
// begins exchange e + 2 knows that all have begun e + 1, so that nobody reads the slots of e any more.
#include "common.h"

#include <atomic>
#include <cstdint>
#include <type_traits>

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

// Tokens of all ranks: counts[r] of rank r. In a piece of an exchange are `most` of each rank, from `piece` on.
struct Tokens {
    const int64_t* counts;
    int64_t ranks;

    int64_t in_piece(int64_t r, int64_t piece, int64_t most) const {
        int64_t left = counts[r] > piece ? counts[r] - piece : 0;
        return left < most ? left : most;
    }

    int64_t before(int64_t rank) const {
        int64_t sum = 0;
        for (int64_t r = 0; r < rank; r++) sum += counts[r];
        return sum;
    }

    int64_t longest() const {
        int64_t most = 0;
        for (int64_t r = 0; r < ranks; r++) most = counts[r] > most ? counts[r] : most;
        return most;
    }
};

// y[i] = the sum of the rows of the ranks in destinations[i], in their order and in float32, rounded once. row_of(r, i):
// rank r's row for this rank's token i.
template <typename T, typename RowOf>
void add_up_tokens(int64_t count, int64_t width, int64_t ranks, const uint64_t* destinations, T* y, RowOf row_of) {
#pragma omp parallel for schedule(static) if (count * width * int64_t(sizeof(T)) >= WORTH_THREADS)
    for (int64_t i = 0; i < count; i++) {
        const T* rows[64];
        int64_t n = 0, j = 0;
        for (int64_t r = 0; r < ranks; r++)
            if (destinations[i] >> r & 1) rows[n++] = row_of(r, i);
        T* to = y + i * width;
        for (; j + LANES <= width; j += LANES) {
            vec sum = splat(0);
            for (int64_t r = 0; r < n; r++) sum += load(rows[r] + j);
            store(to + j, sum);
        }
        for (; j < width; j++) {
            float sum = 0;
            for (int64_t r = 0; r < n; r++) sum += to_float(rows[r][j]);
            to[j] = from_float<T>(sum);
        }
    }
}

template <typename T>
int sum_tokens(const Exchange& exchange, const Tokens& tokens, const T* rows, int64_t width, const int64_t* places,
               const uint64_t* destinations, T* y) {
    Line& own = exchange.line(exchange.rank);
    int64_t row_bytes = width * sizeof(T), most = exchange.slot_bytes / (exchange.ranks * row_bytes);
    int64_t longest = tokens.longest(), rank = exchange.rank;
    const int64_t* own_places = places + tokens.before(rank);
    for (int64_t piece = 0; piece < longest; piece += most) {
        int64_t number = own.arrived.load(std::memory_order_relaxed) + 1, turn = number % 2, first = piece;
        for (int64_t r = 0; r < exchange.ranks; first += tokens.counts[r++]) {
            int64_t count = r == rank ? 0 : tokens.in_piece(r, piece, most);
            char* slot = exchange.slot(rank, turn) + r * most * row_bytes;
#pragma omp parallel for schedule(static) if (count * row_bytes >= WORTH_THREADS)
            for (int64_t i = 0; i < count; i++)
                if (places[first + i] >= 0) std::memcpy(slot + i * row_bytes, rows + places[first + i] * width, row_bytes);
        }
        own.arrived.store(number, std::memory_order_release);
        if (int error = exchange.wait(&Line::arrived, number)) return error;
        auto row_of = [&](int64_t r, int64_t i) {
            if (r == rank) return rows + own_places[piece + i] * width;
            return reinterpret_cast<const T*>(exchange.slot(r, turn) + (rank * most + i) * row_bytes);
        };
        int64_t count = tokens.in_piece(rank, piece, most);
        add_up_tokens(count, width, exchange.ranks, destinations + piece, y + piece * width, row_of);
        own.reduced.store(number, std::memory_order_release);
    }
    return DONE;
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

// Brings tokens to the ranks that have one of their experts: rank r those from r * own_experts on.
//
// counts[r]: tokens of rank r. x, ids, weights: rows of row_bytes, experts and weights [top_k] of this rank's. To rows,
// their_ids and their_weights, with room for the tokens of all ranks, go those that have an expert here, *arrived of
// them; places: of each token of all ranks there, -1 of others. Bit r of destinations, of this rank's tokens: it goes to
// rank r. Returns as exchange_all_reduce. A token must fit into a slot.
KERNEL int exchange_send_tokens(char* base, int64_t rank, int64_t ranks, int64_t slot_bytes, double timeout_s,
                                const int64_t* counts, const char* x, const int64_t* ids, const float* weights,
                                int64_t row_bytes, int64_t top_k, int64_t own_experts, char* rows, int64_t* their_ids,
                                float* their_weights, int64_t* places, uint64_t* destinations, int64_t* arrived) {
    Exchange exchange{base, rank, ranks, slot_bytes, timeout_s};
    Tokens tokens{counts, ranks};
    Line& own = exchange.line(rank);
    int64_t ids_bytes = top_k * sizeof(int64_t), weights_bytes = top_k * sizeof(float), longest = tokens.longest();
    int64_t most = slot_bytes / (ids_bytes + weights_bytes + row_bytes), num_arrived = 0;
    int64_t first_expert = rank * own_experts;
    for (int64_t piece = 0; piece < longest; piece += most) {
        int64_t number = own.arrived.load(std::memory_order_relaxed) + 1, turn = number % 2, first = piece;
        int64_t count = tokens.in_piece(rank, piece, most);
        char* slot = exchange.slot(rank, turn);
        const int64_t* own_ids = ids + piece * top_k;
        const float* own_weights = weights + piece * top_k;
        std::memcpy(slot, own_ids, count * ids_bytes);
        std::memcpy(slot + most * ids_bytes, own_weights, count * weights_bytes);
        copy(slot + most * (ids_bytes + weights_bytes), x + piece * row_bytes, count * row_bytes);
        own.arrived.store(number, std::memory_order_release);
        if (int error = exchange.wait(&Line::arrived, number)) return error;
        for (int64_t i = 0; i < count; i++) {
            uint64_t bits = 0;
            for (int64_t k = 0; k < top_k; k++) bits |= uint64_t(1) << (own_ids[i * top_k + k] / own_experts);
            destinations[piece + i] = bits;
        }
        for (int64_t r = 0; r < ranks; first += counts[r++]) {
            const char* from = exchange.slot(r, turn);
            const int64_t* from_ids = r == rank ? own_ids : reinterpret_cast<const int64_t*>(from);
            const float* from_weights =
                r == rank ? own_weights : reinterpret_cast<const float*>(from + most * ids_bytes);
            const char* from_rows = r == rank ? x + piece * row_bytes : from + most * (ids_bytes + weights_bytes);
            int64_t their_count = tokens.in_piece(r, piece, most);
            for (int64_t i = 0; i < their_count; i++) {
                bool is_here = false;
                for (int64_t k = 0; k < top_k; k++)
                    is_here |= uint64_t(from_ids[i * top_k + k] - first_expert) < uint64_t(own_experts);
                places[first + i] = is_here ? num_arrived : -1;
                if (!is_here) continue;
                std::memcpy(their_ids + num_arrived * top_k, from_ids + i * top_k, ids_bytes);
                std::memcpy(their_weights + num_arrived++ * top_k, from_weights + i * top_k, weights_bytes);
            }
#pragma omp parallel for schedule(static) if (their_count * row_bytes >= WORTH_THREADS)
            for (int64_t i = 0; i < their_count; i++)
                if (places[first + i] >= 0)
                    std::memcpy(rows + places[first + i] * row_bytes, from_rows + i * row_bytes, row_bytes);
        }
        own.reduced.store(number, std::memory_order_release);
    }
    *arrived = num_arrived;
    return DONE;
}

// Brings each token's rows [width] of the ranks that it went to back, and sums them up to y; dtype as in
// exchange_all_reduce, which it returns as. rows: of the tokens that arrived here, otherwise as of exchange_send_tokens.
// A row for each rank must fit into a slot.
KERNEL int exchange_sum_tokens(char* base, int64_t rank, int64_t ranks, int64_t slot_bytes, double timeout_s,
                               const int64_t* counts, const void* rows, int64_t width, int dtype, const int64_t* places,
                               const uint64_t* destinations, void* y) {
    Exchange exchange{base, rank, ranks, slot_bytes, timeout_s};
    Tokens tokens{counts, ranks};
    auto sum = [&](auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        return sum_tokens(exchange, tokens, static_cast<const T*>(rows), width, places, destinations, typed);
    };
    if (dtype == 0) return sum(static_cast<float*>(y));
    if (dtype == 1) return sum(static_cast<bf16*>(y));
    return sum(static_cast<f16*>(y));
}

#endif
