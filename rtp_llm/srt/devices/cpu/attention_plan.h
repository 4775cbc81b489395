// The items of a step, each of some keys, some heads and some queries.
#pragma once

#include "attention_memory.h"

#include <vector>

namespace {

enum Kind { NARROW, WIDE };

struct Item {
    Kind kind;
    int32_t table;  // row of the page table
    int32_t begin, end;  // keys
    int32_t head, num_heads;  // key heads; one of a wide item
    int32_t query, num_queries;  // tokens of the batch, or members of a shared prefix
    int32_t in_group, group_size;  // query heads of each key head: the first, and their number
    int32_t row;  // of the batch
    int32_t partial;  // index of a partial result; -1: the result is whole. Of a shared prefix: the number of its split
    bool shared;  // of a prefix that several rows share
    int64_t cost;
};

struct Step {
    std::vector<Item> items;
    std::vector<int32_t> tokens;  // per row, its first token
    std::vector<int32_t> own_begin;  // per row, the end of its shared prefixes
    std::vector<int32_t> first_partial, num_partials;  // per row
    std::vector<int32_t> member_partials;  // per member of a shared prefix, the partial of its first split
    int64_t total_partials = 0, total_cost = 0;
};

int64_t first_visible(const Attention& a, int64_t position) {
    if (a.chunk) return position / a.chunk * a.chunk;
    return a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
}

int32_t num_splits(int64_t num_keys, int64_t keys_per_split) {
    return int32_t(std::min<int64_t>(std::max<int64_t>(1, num_keys / keys_per_split), MAX_SPLITS));
}

// Splits of a row of one token. They depend on its keys alone, so that its result does not depend on other rows.
int32_t splits_of_single(int64_t num_keys) {
    const int64_t few = std::min<int64_t>(num_keys / FEWEST_KEYS_OF_SPLIT, SPLITS_OF_SHORT);
    return std::max(num_splits(num_keys, KEYS_PER_SPLIT), int32_t(few));
}

// Start of part i of n of [begin, end); parts are multiples of 8 keys, except the last.
int32_t split_at(int64_t begin, int64_t end, int32_t i, int32_t n) {
    if (i == n) return int32_t(end);
    return int32_t(begin + (end - begin) * i / n / 8 * 8);
}

void add(Step& step, Item item, int64_t width) {
    item.cost = int64_t(item.end - item.begin) * width;
    step.total_cost += item.cost;
    step.items.push_back(item);
}

// A row's shared prefixes follow one another, from 0 on. A prefix that some row does not see wholly is left out, with
// those that follow it.
void use_shared(const Attention& a, Step& step, std::vector<int32_t>& used) {
    step.own_begin.assign(size_t(a.num_rows), 0);
    step.member_partials.assign(size_t(a.num_shared ? a.shared[3 * a.num_shared - 2] + a.shared[3 * a.num_shared - 1] : 0), 0);
    for (int64_t s = 0; s < a.num_shared; s++) {
        int32_t end = a.shared[3 * s], first = a.shared[3 * s + 1], count = a.shared[3 * s + 2];
        int32_t begin = step.own_begin[size_t(a.members[first])];
        bool usable = begin < end;
        for (int32_t i = first; i < first + count && usable; i++) {
            int32_t row = a.members[i];
            usable = step.own_begin[size_t(row)] == begin && a.counts[row] == 1 && end <= a.starts[row] &&
                     first_visible(a, a.starts[row]) <= begin;
        }
        used.push_back(usable ? begin : -1);
        if (usable)
            for (int32_t i = first; i < first + count; i++) step.own_begin[size_t(a.members[i])] = end;
    }
}

void add_shared(const Attention& a, Step& step, const std::vector<int32_t>& used, int32_t heads_per_item) {
    int32_t group = int32_t(a.num_heads / a.num_kv_heads);
    int32_t heads = std::min(group, WIDE_COLUMNS), queries = std::max(1, WIDE_COLUMNS / group);
    for (int64_t s = 0; s < a.num_shared; s++) {
        if (used[size_t(s)] < 0) continue;
        int32_t begin = used[size_t(s)], end = a.shared[3 * s], first = a.shared[3 * s + 1], count = a.shared[3 * s + 2];
        int32_t splits = num_splits(end - begin, KEYS_PER_SHARED_SPLIT), table = a.rows[a.members[first]];
        for (int32_t i = first; i < first + count; i++) {
            int32_t row = a.members[i];
            step.member_partials[size_t(i)] = step.first_partial[size_t(row)] + step.num_partials[size_t(row)];
            step.num_partials[size_t(row)] += splits;
        }
        for (int32_t i = 0; i < splits; i++) {
            int32_t from = split_at(begin, end, i, splits), to = split_at(begin, end, i + 1, splits);
            if (count * group <= NARROW_HEADS) {
                for (int32_t head = 0; head < a.num_kv_heads; head += heads_per_item) {
                    int32_t taken = std::min(heads_per_item, int32_t(a.num_kv_heads) - head);
                    add(step, {NARROW, table, from, to, head, taken, first, count, 0, group, -1, i, true, 0}, taken * count * group);
                }
                continue;
            }
            for (int32_t q = 0; q < count; q += queries)
                for (int32_t g = 0; g < group; g += heads)
                    for (int32_t head = 0; head < a.num_kv_heads; head++) {
                        int32_t num_queries = std::min(queries, count - q), size = std::min(heads, group - g);
                        add(step, {WIDE, table, from, to, head, 1, first + q, num_queries, g, size, -1, i, true, 0}, num_queries * size);
                    }
        }
    }
}

// Partials of the row itself come first, then those of its shared prefixes.
void add_single(const Attention& a, Step& step, int32_t row, int32_t heads_per_item) {
    int32_t group = int32_t(a.num_heads / a.num_kv_heads), end = a.starts[row] + 1, token = step.tokens[size_t(row)];
    int32_t begin = std::max(step.own_begin[size_t(row)], int32_t(first_visible(a, a.starts[row])));
    int32_t splits = splits_of_single(end - begin);
    for (int32_t i = 0; i < splits; i++) {
        int32_t from = split_at(begin, end, i, splits), to = split_at(begin, end, i + 1, splits);
        int32_t partial = step.num_partials[size_t(row)] > 1 ? step.first_partial[size_t(row)] + i : -1;
        if (group <= NARROW_HEADS) {
            for (int32_t head = 0; head < a.num_kv_heads; head += heads_per_item) {
                int32_t heads = std::min(heads_per_item, int32_t(a.num_kv_heads) - head);
                add(step, {NARROW, a.rows[row], from, to, head, heads, token, 1, 0, group, row, partial, false, 0}, heads * group);
            }
            continue;
        }
        for (int32_t head = 0; head < a.num_kv_heads; head++)
            for (int32_t g = 0; g < group; g += WIDE_COLUMNS) {
                int32_t size = std::min(WIDE_COLUMNS, group - g);
                add(step, {WIDE, a.rows[row], from, to, head, 1, token, 1, g, size, row, partial, false, 0}, size);
            }
    }
}

void add_several(const Attention& a, Step& step, int32_t row) {
    int32_t group = int32_t(a.num_heads / a.num_kv_heads), count = a.counts[row];
    int32_t heads = std::min(group, WIDE_COLUMNS), queries = std::max(1, WIDE_COLUMNS / group);
    for (int32_t q = 0; q < count; q += queries) {
        int32_t num_queries = std::min(queries, count - q), token = step.tokens[size_t(row)] + q;
        int64_t position = a.starts[row] + q, end = position + num_queries;
        if (a.visible_ends)
            for (int32_t i = 0; i < num_queries; i++) end = std::max(end, a.visible_ends[token + i]);
        end = std::min<int64_t>(end, a.starts[row] + count);
        for (int32_t g = 0; g < group; g += heads)
            for (int32_t head = 0; head < a.num_kv_heads; head++) {
                int32_t size = std::min(heads, group - g);
                add(step, {WIDE, a.rows[row], int32_t(first_visible(a, position)), int32_t(end), head, 1, token, num_queries, g,
                           size, row, -1, false, 0}, num_queries * size);
            }
    }
}

void plan(const Attention& a, Step& step) {
    step.items.clear();
    step.tokens.clear();
    step.total_partials = step.total_cost = 0;
    std::vector<int32_t> used;
    use_shared(a, step, used);
    int32_t token = 0;
    int64_t singles = 0;
    step.first_partial.assign(size_t(a.num_rows), 0);
    step.num_partials.assign(size_t(a.num_rows), 0);
    for (int64_t row = 0; row < a.num_rows; row++) {
        step.tokens.push_back(token);
        token += a.counts[row];
        if (a.counts[row] != 1) continue;
        int64_t begin = std::max<int64_t>(step.own_begin[size_t(row)], first_visible(a, a.starts[row]));
        step.num_partials[size_t(row)] = splits_of_single(a.starts[row] + 1 - begin);
        singles += step.num_partials[size_t(row)];
    }
    std::vector<int32_t> of_shared(size_t(a.num_rows), 0);
    for (int64_t s = 0; s < a.num_shared; s++) {
        if (used[size_t(s)] < 0) continue;
        int32_t splits = num_splits(a.shared[3 * s] - used[size_t(s)], KEYS_PER_SHARED_SPLIT), first = a.shared[3 * s + 1];
        for (int32_t i = first; i < first + a.shared[3 * s + 2]; i++) of_shared[size_t(a.members[i])] += splits;
    }
    for (size_t row = 0; row < size_t(a.num_rows); row++) {
        if (step.num_partials[row] + of_shared[row] < 2) continue;
        step.first_partial[row] = int32_t(step.total_partials);
        step.total_partials += step.num_partials[row] + of_shared[row];
    }
    // An item has all key heads of its keys, so that memory is read in long runs, unless threads would be idle.
    int64_t heads_per_item = a.num_kv_heads, wanted = omp_get_max_threads();
    while (heads_per_item > 1 && singles * ((a.num_kv_heads + heads_per_item - 1) / heads_per_item) < wanted)
        heads_per_item = (heads_per_item + 1) / 2;
    add_shared(a, step, used, int32_t(heads_per_item));
    for (int32_t row = 0; row < a.num_rows; row++) {
        if (a.counts[row] == 1) add_single(a, step, row, int32_t(heads_per_item));
        if (a.counts[row] > 1) add_several(a, step, row);
    }
    std::stable_sort(step.items.begin(), step.items.end(), [](const Item& x, const Item& y) { return x.cost > y.cost; });
}

}  // namespace
