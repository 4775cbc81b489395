"""The smallest attention back end: each row by itself, in plain torch. It is right everywhere, and slow.

python row_by_row.py
"""

import torch

from rtp_llm import Engine
from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.device.registry import register_attention_backend
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kv_pool import slots_of


class RowByRow(AttentionBackend):
    def plan(self, batch):
        """(the row's place in page tables, first position, end, first token of the batch) of each row."""
        self.rows, token = [], 0
        for b, start in enumerate(batch.extend_prefix_lens_cpu):
            self.rows.append((batch.req_pool_indices[b], start, batch.seq_lens_cpu[b], token))
            token += batch.extend_seq_lens_cpu[b]

    def forward(self, q, k, v, layer, batch, save_kv_cache=True, sinks=None):
        cache = batch.kv_pool.layer(layer.layer_id)
        if save_kv_cache and k is not None:
            batch.kv_pool.write(layer.layer_id, batch.out_cache_locs[cache.group], k, v)
        out = q.new_empty(q.shape[0], layer.num_heads, layer.v_head_dim)
        for row, start, end, token in self.rows:
            first = layer.first_visible(start)  # the oldest key that is seen
            positions = torch.arange(first, end, device=q.device)
            slots = slots_of(batch.page_tables[cache.group], row, positions, cache.page_size)
            keys, values = cache.numbers(slots, q.dtype)
            tokens = slice(token, token + end - start)
            ends = None if batch.visible_ends is None else batch.visible_ends[tokens] - first
            options = (layer.window, layer.logit_cap, sinks, ends, layer.alibi_slopes, layer.chunk)
            out[tokens] = reference.attention(q[tokens], keys, values, layer.scaling, start - first, *options)
        return out.flatten(1)


# The name, and where the class is found: module and attribute. Python must find the module in the engine's processes.
register_attention_backend("row_by_row", "row_by_row:RowByRow")

if __name__ == "__main__":
    with Engine(attention_backend="row_by_row") as engine:
        params = {"temperature": 0, "max_new_tokens": 16}
        print(engine.generate("The capital of France is", sampling_params=params)["text"])
