"""A model whose image encoder errs, for tests of what ends with it."""

from rtp_llm.models_py.qwen2_vl import Qwen2VLForConditionalGeneration
from rtp_llm.srt.distributed.parallel_state import get_tp_group


class ErringQwen2VL(Qwen2VLForConditionalGeneration):
    """Raises for an image that is taller than wide; on rank 1 alone, gives a row too few for a square one."""

    def get_image_feature(self, items):
        grids = [item.image_grid_thw[0].tolist() for item in items]
        if any(rows > columns for _, rows, columns in grids):
            raise KeyError("too tall")
        features = super().get_image_feature(items)
        is_short = get_tp_group().rank == 1 and any(rows == columns for _, rows, columns in grids)
        return features[:-1] if is_short else features
