"""Which slots a step's pieces read and write, and in which order."""

from typing import Any

import pytest
import torch

from rtp_llm.srt.cache.spec import StateGroup, StateSpec, StateTensor
from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.forward_batch import StateWave
from rtp_llm.srt.plan import Admission, RowWork, StateAccess
from rtp_llm.srt.state_pool import StatePool
from rtp_llm.srt.worker.layout import state_group
from rtp_llm.srt.worker.states import RowStates

GROUP = StateGroup(((0, StateSpec((StateTensor("sum", (2,), "float32"),))),))
ROWS = {0: 5, 1: 9, 3: 2}  # row -> its slot


@pytest.fixture
def states() -> RowStates:
    states = RowStates(StatePool(GROUP, 12, "cpu"), 6, provider_named("cpu"))
    spec: Any = None  # it is not read
    states.admit([Admission(row, "", [], [], spec, state_slot=slot) for row, slot in ROWS.items()])
    return states


def pieces(wave: StateWave) -> list[tuple[int, int, list[int]]]:
    """(load, store, tokens of the batch) of each piece."""
    tokens = list(range(wave.cu_seqlens_cpu[-1])) if wave.tokens is None else wave.tokens.tolist()
    cuts = wave.cu_seqlens.tolist()
    assert cuts == wave.cu_seqlens_cpu
    columns = zip(wave.load.tolist(), wave.store.tolist(), cuts, cuts[1:], strict=False)
    return [(load, store, tokens[begin:end]) for load, store, begin, end in columns]


def test_rows_that_decode_read_and_write_their_own_slots(states: RowStates) -> None:
    (wave,) = states.waves([RowWork(3, 7, 1, True), RowWork(0, 4, 1, True)], [], num_dummies=2)
    assert pieces(wave) == [(2, 2, [0]), (5, 5, [1]), (13, 13, [2]), (13, 13, [3])]
    assert wave.tokens is None


def test_a_row_begins_from_another_slot(states: RowStates) -> None:
    work = [RowWork(0, 0, 3, True), RowWork(1, 6, 2, True), RowWork(3, 4, 1, True)]
    (wave,) = states.waves(work, [StateAccess(0, 0), StateAccess(1, 11)], num_dummies=0)
    assert pieces(wave) == [(0, 5, [0, 1, 2]), (11, 9, [3, 4]), (2, 2, [5])]


def test_a_row_is_cut_where_its_states_are_saved(states: RowStates) -> None:
    work = [RowWork(1, 6, 5, True), RowWork(3, 4, 1, True), RowWork(0, 0, 4, True)]
    accesses = [StateAccess(1, 11, [(7, 1), (10, 3)]), StateAccess(0, 0, [(4, 4)])]
    first, second, third = states.waves(work, accesses, num_dummies=1)
    assert pieces(first) == [(11, 1, [0]), (2, 2, [5]), (0, 5, [6, 7, 8, 9]), (13, 13, [10])]
    assert pieces(second) == [(1, 3, [1, 2, 3])]
    assert pieces(third) == [(3, 9, [4])]
    assert [wave.first_token for wave in (first, second, third)] == [None, 1, 4]


def test_what_is_saved_at_the_end_of_a_row_is_copied(states: RowStates) -> None:
    work, accesses = [RowWork(0, 0, 4, True), RowWork(1, 2, 2, True)], [StateAccess(0, 0, [(2, 3), (4, 4)])]
    waves = states.waves(work, accesses, num_dummies=0)
    assert [pieces(wave) for wave in waves] == [[(0, 3, [0, 1]), (9, 9, [4, 5])], [(3, 5, [2, 3])]]
    states.pool.tensor(0, "sum")[5] = torch.tensor([1.0, 2.0])
    states.keep_last(work, accesses)
    assert states.pool.tensor(0, "sum")[4].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("slot", [0, 13])
def test_a_plan_without_slots_is_refused(states: RowStates, slot: int) -> None:
    spec: Any = None
    with pytest.raises(ValueError, match=f"row 2 was given state slot {slot}, but slots are 1 to 12"):
        states.admit([Admission(2, "", [], [], spec, state_slot=slot)])


class Keeps(torch.nn.Module):
    def __init__(self, layer_id: int, *names: str) -> None:
        super().__init__()
        self.layer_id, self.names = layer_id, names

    def state_spec(self) -> StateSpec:
        return StateSpec(tuple(StateTensor(name, (3,), "bfloat16") for name in self.names))


def test_the_states_of_a_layers_modules_are_joined() -> None:
    group = state_group(torch.nn.ModuleList([Keeps(4, "conv"), Keeps(2, "conv"), Keeps(4, "recurrent", "norm")]))
    assert group is not None and group.bytes_per_slot == 4 * 3 * 2
    assert [(layer, [tensor.name for tensor in spec.tensors]) for layer, spec in group.layers] == [
        (2, ["conv"]),
        (4, ["conv", "recurrent", "norm"]),
    ]
    assert state_group(torch.nn.Linear(1, 1)) is None
    with pytest.raises(ValueError, match="layer 4 has a state 'conv' already"):
        state_group(torch.nn.ModuleList([Keeps(4, "conv"), Keeps(4, "conv")]))
