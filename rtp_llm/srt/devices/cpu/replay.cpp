// Runs the calls of a recorded step (graphs.py).
#include "common.h"
#include "replay.h"

struct Call {
    Replayed function;
    const int64_t* slots;
    int64_t result;  // that is expected
};

// Makes calls one after the other; returns how many gave the expected result before one that did not.
KERNEL int64_t run_calls(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (calls[i].function(calls[i].slots) != calls[i].result) return i;
    return count;
}
