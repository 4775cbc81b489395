"""Copies of a call's arguments, which the call, and later ones, cannot change."""

import dataclasses
from collections import deque
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig


def copied(value: Any) -> Any:
    """Return a copy of an argument: tensors and containers at any depth are new ones, all else is the same object.

    A layer may append to a list that it is given, or add to a tensor in place: its call could not be made again then.
    """
    if isinstance(value, torch.Tensor):
        return value if isinstance(value, nn.Parameter) else value.detach().clone()
    if type(value) in (list, set, deque):
        return type(value)(map(copied, value))
    if isinstance(value, tuple):
        items = map(copied, value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, dict, PreTrainedConfig)):
        other = copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(other, field.name, copied(getattr(value, field.name)))  # it may be frozen
        return other
    return value
