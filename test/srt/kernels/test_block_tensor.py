"""A BlockTensor gives what its values would give, and moves rows and blocks without computing them."""

from collections.abc import Callable

import pytest
import torch
from gguf_blocks import random_blocks, values_of

from rtp_llm.srt.kernels.block_tensor import BlockTensor, plain
from rtp_llm.srt.layers.weights import load_part, make_parameter
from rtp_llm.srt.models.written_bytes import WrittenBytes

Function = Callable[[torch.Tensor], torch.Tensor]
BLOCKS = random_blocks("Q4_K", (24, 512))
VALUES = values_of(BLOCKS, "Q4_K")
MOVES: dict[str, Function] = {
    "rows": lambda x: x[3:9],
    "row": lambda x: x[5],
    "steps": lambda x: x[::2],
    "all": lambda x: x[:],
    "none": lambda x: x[7:7],
    "narrow": lambda x: x.narrow(0, 2, 4),
    "columns": lambda x: x[:, 256:],
    "transposed": lambda x: x.t(),
    "twice transposed": lambda x: x.t().t(),
    "columns of transposed": lambda x: x.t()[:, 2:4].t(),
    "unflattened": lambda x: x.unflatten(0, (4, 3, 2)),
    "unflattened, transposed": lambda x: x.t().unflatten(1, (4, 6)),
    "permuted": lambda x: x.reshape(4, 2, 3, 512).swapaxes(1, 2).reshape(24, 512),
    "permuted dims": lambda x: x.view(2, 12, 512).permute(1, 0, 2),
    "inferred": lambda x: x.view(-1, 3, 512),
    "by head": lambda x: torch.cat([part.flatten(0, 1) for part in x.unflatten(0, (4, 6)).split([2, 3, 1], 1)]),
    "chunks": lambda x: torch.cat([part for part in reversed(x.chunk(5))]),
    "unbound": lambda x: x.unbind(0)[3],
    "unsqueezed": lambda x: x[None],
    "selected": lambda x: x.index_select(0, torch.tensor([3, 1])),
    "copied": lambda x: x.clone(),
    "moved": lambda x: x.to("cpu"),
    "detached": lambda x: x.detach(),
}
COMPUTATIONS: dict[str, Function] = {
    "columns within a block": lambda x: x[:, 3:300],
    "column": lambda x: x[:, 3],
    "steps of columns": lambda x: x[:, ::2],
    "sum": lambda x: x + 1,
    "flattened": lambda x: x.flatten(),
    "other dtype": lambda x: x.to(torch.bfloat16),
    "rows of transposed": lambda x: x.t()[5],
    "contiguous": lambda x: x.t().contiguous(),
    "product": lambda x: x @ x.t(),
    "beside plain": lambda x: torch.cat((x, torch.ones(1, 512))),
    "columns of several": lambda x: torch.stack(x.unbind(1)[:2]),
}


def blocks_of(rows: slice = slice(None)) -> BlockTensor:
    return BlockTensor(BLOCKS[rows], "Q4_K", torch.float32)


@pytest.mark.parametrize("name", MOVES)
def test_moves_keep_blocks(name: str) -> None:
    result, expected = MOVES[name](blocks_of()), MOVES[name](VALUES)
    assert isinstance(result, BlockTensor)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert result.stride() == expected.stride()
    assert torch.equal(plain(result), expected)


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_everything_else_is_computed(name: str) -> None:
    result, expected = COMPUTATIONS[name](blocks_of()), COMPUTATIONS[name](VALUES)
    assert not isinstance(result, BlockTensor)
    assert torch.equal(result, expected)


def test_it_compares_as_its_values_do() -> None:
    blocks = blocks_of()
    other = BlockTensor(BLOCKS.flip(0), "Q4_K", torch.float32)
    assert torch.equal(blocks, blocks)
    assert torch.equal(blocks, VALUES)
    assert not torch.equal(blocks, other)
    assert bool(blocks.any())
    assert blocks.is_floating_point()


def test_a_plain_parameter_takes_the_values() -> None:
    target = torch.empty(12, 512, dtype=torch.bfloat16)
    with WrittenBytes([target]) as written:
        load_part(target, blocks_of(), 0, 1, 2, "rows")
    assert written.described(target) is None
    assert torch.equal(target, VALUES[12:].bfloat16())


def test_a_target_takes_blocks_by_rows() -> None:
    param = make_parameter(BlockTensor.to_be_written((12, 512), "Q4_K", torch.float32), load_part, 1, 0)
    load_part(param.data.narrow(0, 0, 5), blocks_of()[:10], 0, 1, 2, "rows")
    load_part(param.data.narrow(0, 5, 7), blocks_of()[10:17], 0, 0, 1, "rows")
    expected = torch.cat((VALUES[5:10], VALUES[10:17]))
    assert torch.equal(param.data.written().values(), expected)
    param.data[3:].zero_()
    assert torch.equal(param.data.written().values(), torch.cat((expected[:3], torch.zeros(9, 512))))


def test_a_target_adopts_what_is_all_of_it() -> None:
    target = BlockTensor.to_be_written((12, 512), "Q4_K", torch.float32)
    load_part(target.data, blocks_of(), 0, 1, 2, "rows")
    assert target.written().blocks.data_ptr() == BLOCKS[12:].data_ptr()
    assert torch.equal(target.written().values(), VALUES[12:])
    target[2:3].copy_(blocks_of()[:1])  # which is no reason to change what was adopted
    assert torch.equal(target.written().values()[2], VALUES[0])
    assert torch.equal(target.written().values()[3:], VALUES[15:])
    assert torch.equal(values_of(BLOCKS, "Q4_K"), VALUES)


def test_what_a_target_cannot_take_is_an_error() -> None:
    target = BlockTensor.to_be_written((24, 512), "Q4_K", torch.float32)
    wrong: list[Callable[[], object]] = [
        lambda: target[:, 3:5].zero_(),
        lambda: target.copy_(VALUES),
        lambda: target.copy_(BlockTensor(random_blocks("Q5_K", (24, 512)), "Q5_K", torch.float32)),
        lambda: target.mul_(2),
        lambda: blocks_of().mul_(2),
    ]
    for write in wrong:
        with pytest.raises(TypeError, match="cannot be done in the blocks of a Q4_K tensor"):
            write()
    with pytest.raises(ValueError, match="144 bytes each"):
        BlockTensor(BLOCKS[:, 1:], "Q4_K", torch.float32)
