"""Training on a CPU with one process for each core: each computes the gradient of its share of a batch.

A step of a small model is thousands of products, each too short to be shared by threads, which wait for each other after every
one: a single other busy program then slows training many times over. Processes of one thread wait once a step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from tasks.completions import completion_loss, lengths, parts
from tasks.core import hardware
from tasks.core.lifetime import die_with_parent
from tasks.frozen import restore_16bit
from tasks.qlora import FinetuneConfig, build_model, tokens_at_a_time

RESTORE = "restore"  # a task without an answer
GONE = "a process that shares the training ended; if memory ran out, train.workers=1 needs less"


class WorkerError(RuntimeError):
    """A worker process ended before its work was done."""


class GradientWorkers:
    """Processes with a copy of the model each, which follow its trainable parameters and add to their gradients.

    They are forked on Linux, so the caller must not have computed in several threads before. They build their copies while the caller
    builds the model. `follow` that, and for each batch `start`, the caller's own forward and backward pass, then `finish`: the
    parameters' gradients are those of the whole batch.
    """

    def __init__(self, count: int, config: FinetuneConfig, base_model: Path, autocast: bool) -> None:
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._pipes, self._processes = [], []
        for _ in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(os.getpid(), config, base_model, autocast, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def follow(self, model: Any) -> None:
        """Share the memory of a model's trainable parameters and of their gradients with the processes."""
        self._model = model
        size = sum(parameter.numel() for parameter in self._parameters)
        self._values = torch.zeros(size).share_memory_()
        self._gradients = [torch.zeros(size).share_memory_() for _ in self._pipes]
        for pipe, gradients in zip(self._pipes, self._gradients, strict=True):
            self._send(pipe, (self._values, gradients))

    @property
    def _parameters(self) -> list[torch.nn.Parameter]:
        return _trainable(self._model)

    def start(self, inputs: dict[str, torch.Tensor], items: int) -> dict[str, torch.Tensor]:
        """Hand out a batch whose loss is divided by `items`; the share that is left to the caller."""
        parameters = self._parameters
        with torch.no_grad():
            torch._foreach_copy_(_views(self._values, parameters), [parameter.data for parameter in parameters])
        shares = len(self._pipes) + 1
        order = even_order(lengths(inputs), shares)
        inputs = {name: tensor[order] for name, tensor in inputs.items()}
        for number, pipe in enumerate(self._pipes, 1):
            self._send(pipe, ({name: tensor[number::shares].numpy() for name, tensor in inputs.items()}, items))
        return {name: tensor[0::shares] for name, tensor in inputs.items()}

    def finish(self) -> float:
        """Add the workers' gradients to the parameters'; the sum of their losses."""
        loss = sum(float(self._receive(pipe)) for pipe in self._pipes)
        parameters = self._parameters
        totals: list[Any] = [parameter.grad for parameter in parameters]
        for gradients in self._gradients:
            torch._foreach_add_(totals, _views(gradients, parameters))
        return loss

    def restore_16bit(self) -> None:
        """Let the processes go on with the base model's own weights, see `tasks/frozen.py`."""
        for pipe in self._pipes:
            self._send(pipe, RESTORE)

    def close(self) -> float:
        """End the processes; their peak resident memory in all, MB, 0 for those that were gone."""
        peak = 0.0
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            try:
                self._send(pipe, None)
                peak += float(self._receive(pipe))
            except WorkerError:
                process.kill()
            process.join()
        return peak

    def _send(self, pipe: Any, task: Any) -> None:
        try:
            pipe.send(task)
        except OSError:
            raise WorkerError(GONE) from None

    def _receive(self, pipe: Any) -> Any:
        try:
            return pipe.recv()
        except (EOFError, OSError):
            raise WorkerError(GONE) from None


def even_order(lengths: list[int], shares: int) -> list[int]:
    """An order of rows in which every n-th row, from each of the first n on, makes shares of about as many tokens."""
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    rounds = [by_length[start : start + shares] for start in range(0, len(by_length), shares)]
    # There and back: who had the longest row of one round has the shortest of the next. A round that is not full has the shortest.
    return [row for number, found in enumerate(rounds) for row in (found[::-1] if number % 2 and len(found) == shares else found)]


def _trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _views(flat: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Flat memory as tensors of the parameters' shapes."""
    parts = flat.split([parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]


def _work(parent: int, config: FinetuneConfig, base_model: Path, autocast: bool, pipe: Any) -> None:
    """A worker: its parameters and their gradients are the shared memory itself."""
    die_with_parent(parent)
    torch.set_num_threads(1)
    memory = hardware.memory_mb()
    shared_mb = memory["rss_mb"] - memory["private_mb"]  # with the process it was forked from, and counted there
    model = build_model(config, base_model)
    model.train()
    most_tokens = tokens_at_a_time(config, "cpu")
    parameters = _trainable(model)
    if (shared := pipe.recv()) is None:
        pipe.send(hardware.peak_rss_mb() - shared_mb)
        return
    values, gradients = shared
    for parameter, value, gradient in zip(parameters, _views(values, parameters), _views(gradients, parameters), strict=True):
        parameter.data, parameter.grad = value, gradient
    while (task := pipe.recv()) is not None:
        if task == RESTORE:
            restore_16bit(model, base_model)
            continue
        inputs, items = task
        gradients.zero_()
        total = 0.0
        for part in parts({name: torch.from_numpy(array) for name, array in inputs.items()}, most_tokens):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = completion_loss(model, part, items)
            loss.backward()
            total += loss.item()
        pipe.send(total)
    pipe.send(hardware.peak_rss_mb() - shared_mb)
