// A thread's memory, and slots of keys and values in the cache.
#pragma once

#include "attention_vectors.h"

#include <cstdlib>
#include <new>

namespace {

// Scratch memory of one thread; it grows and is kept.
class Arena {
  public:
    ~Arena() { std::free(base_); }

    void reserve(size_t bytes) {
        used_ = 0;
        if (bytes <= size_) return;
        std::free(base_);
        size_ = size_t(round_up(int64_t(bytes), 4096));
        base_ = static_cast<char*>(std::aligned_alloc(4096, size_));
        if (!base_) throw std::bad_alloc();
    }

    template <class T>
    T* take(int64_t count) {
        T* taken = reinterpret_cast<T*>(base_ + used_);
        used_ += bytes<T>(count);
        return taken;
    }

    template <class T>
    static size_t bytes(int64_t count) {
        return size_t(round_up(count * int64_t(sizeof(T)), 64));
    }

  private:
    char* base_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

thread_local Arena scratch;

void find_slots(const Attention& a, int64_t table, int64_t begin, int64_t count, int64_t* slots) {
    const int32_t* pages = a.page_table + table * a.table_row;
    if (a.page_size == 1) {
        for (int64_t i = 0; i < count; i++) slots[i] = pages[begin + i];
        return;
    }
    for (int64_t i = 0, page = begin / a.page_size, in_page = begin % a.page_size; i < count; page++, in_page = 0) {
        const int64_t first = pages[page] * a.page_size;
        for (; in_page < a.page_size && i < count; in_page++) slots[i++] = first + in_page;
    }
}

INLINE void prefetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// Prefetches rows of keys and of values before they are needed, a few at a time.
struct Ahead {
    const char *keys, *values;
    int64_t key_step, value_step, key_bytes, value_bytes;
    const int64_t* slots;
    int count, at_a_time, next = 0;

    INLINE void ask() {
        for (int end = std::min(next + at_a_time, count); next < end; next++) {
            prefetch(keys + slots[next] * key_step, key_bytes);
            prefetch(values + slots[next] * value_step, value_bytes);
        }
    }
};

}  // namespace
