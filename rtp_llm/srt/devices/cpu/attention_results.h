// Whole and partial results, the merge of the latter, and the queries of an item's columns.
#pragma once

#include "attention_plan.h"

namespace {

// Partial results of one query head: the weighted sum, padded to vectors, then maximum and sum of weights.
struct Partials {
    float* base;
    int64_t size, num_heads;  // size: floats of one result

    float* at(int64_t partial, int64_t head) const { return base + (partial * num_heads + head) * size; }
};

template <class T>
INLINE void store_row(T* out, const float* sums_of, float factor, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(out + i, load(sums_of + i) * factor);
    if (i < size) {
        float rest[LANES] = {};
        for (int64_t j = i; j < size; j++) rest[j - i] = sums_of[j];
        store_part(out + i, load(rest) * factor, int(size - i));
    }
}

template <class T>
void finish(const Attention& a, int64_t token, int64_t head, const float* weighted, float maximum, float total) {
    float factor = 1.0f / total;
    if (a.sinks) {
        float sink = a.sinks[head] * LOG2E, top = std::max(maximum, sink);
        float scale = exp2_of(maximum - top);
        factor = scale / (total * scale + exp2_of(sink - top));
    }
    store_row(static_cast<T*>(a.out) + (token * a.num_heads + head) * a.v_head_dim, weighted, factor, a.v_head_dim);
}

void leave_partial(const Attention& a, float* to, int64_t size, const float* weighted, float maximum, float total) {
    std::memcpy(to, weighted, size_t(a.v_head_dim) * 4);
    to[size - 2] = maximum;
    to[size - 1] = total;
}

// Merges a row's partial results of one head into the first of them.
template <class T>
void merge(const Attention& a, const Partials& partials, int64_t token, int64_t first, int64_t count, int64_t head) {
    float* into = partials.at(first, head);
    int64_t size = partials.size;
    float maximum = into[size - 2];
    for (int64_t i = 1; i < count; i++) maximum = std::max(maximum, partials.at(first + i, head)[size - 2]);
    float scale = exp2_of(into[size - 2] - maximum), total = into[size - 1] * scale;
    for (int64_t d = 0; d < a.v_head_dim; d += LANES) store(into + d, load(into + d) * scale);
    for (int64_t i = 1; i < count; i++) {
        const float* other = partials.at(first + i, head);
        scale = exp2_of(other[size - 2] - maximum);
        total += other[size - 1] * scale;
        for (int64_t d = 0; d < a.v_head_dim; d += LANES) store(into + d, load(into + d) + load(other + d) * scale);
    }
    finish<T>(a, token, head, into, maximum, total);
}

// An item's columns for one key head: query i, head g of the group is column i * group_size + g.
struct Columns {
    const Attention& a;
    const Step& step;
    const Item& item;

    int count() const { return item.num_queries * item.group_size; }
    int64_t row(int column) const {
        return item.shared ? a.members[item.query + column / item.group_size] : item.row;
    }
    int64_t token(int column) const {
        int query = column / item.group_size;
        return item.shared ? step.tokens[size_t(row(column))] : item.query + query;
    }
    int64_t head(int column, int64_t kv_head) const {
        return kv_head * (a.num_heads / a.num_kv_heads) + item.in_group + column % item.group_size;
    }
    int64_t position(int column) const { return a.starts[row(column)] + token(column) - step.tokens[size_t(row(column))]; }
    int64_t partial(int column) const {
        if (item.shared) return step.member_partials[size_t(item.query + column / item.group_size)] + item.partial;
        return item.partial;
    }
    // The item's keys that the column sees.
    void visible(int column, int32_t& from, int32_t& to) const {
        from = item.begin;
        to = item.end;
        if (item.shared) return;
        int64_t at = position(column), end = at + 1;
        if (a.visible_ends) end = std::max(end, a.visible_ends[token(column)]);
        from = int32_t(std::max<int64_t>(from, first_visible(a, at)));
        to = int32_t(std::min<int64_t>(to, end));
    }
};

}  // namespace
