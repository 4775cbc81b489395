// Calls of kernels from a list, without Python between them: a kernel's function of its own arguments, and one of an
// array of them, eight bytes each.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

typedef int64_t (*Replayed)(const int64_t* slots);

template <class T>
static inline T from_slot(const int64_t* slot) {
    static_assert(sizeof(T) <= sizeof *slot, "an argument has at most eight bytes");
    T value;
    std::memcpy(&value, slot, sizeof value);  // its first bytes, as all processors of ours store numbers
    return value;
}

template <class Result, class... Types, size_t... I>
static inline int64_t call_with(Result (*kernel)(Types...), const int64_t* slots, std::index_sequence<I...>) {
    if constexpr (std::is_void<Result>::value) {
        kernel(from_slot<Types>(slots + I)...);
        return 0;
    } else return int64_t(kernel(from_slot<Types>(slots + I)...));
}

template <class Result, class... Types>
static inline int64_t call_with(Result (*kernel)(Types...), const int64_t* slots) {
    return call_with(kernel, slots, std::index_sequence_for<Types...>());
}

// Declares that recorded calls of a kernel may be made from a list: name_replayed(slots).
#define REPLAYED(name) \
    KERNEL int64_t name##_replayed(const int64_t* slots) { return call_with(&name, slots); }
