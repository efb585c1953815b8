"""One way of computing a step, in a process of its own."""

import gc
import multiprocessing
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import PeakMemory, Phases, now
from benchmarks.step_cases import Case, Variant
from hyspark_nnunet.building_blocks.recomputation import set_recomputation
from hyspark_nnunet.building_blocks.reconstruction_decoder import UpsamplingLevel
from hyspark_nnunet.cpu_allocator import keep_freed_memory, release_freed_memory
from hyspark_nnunet.training.loss import reconstruction_loss
from hyspark_nnunet.training.runtime.precision import autocast_dtype


class Step:
    """One variant's forward and backward pass of a case."""

    def __init__(self, case: Case, variant: Variant) -> None:
        self.case, self.variant, self.device = case, variant, torch.device(case.device)
        if variant.keep_memory and not keep_freed_memory():
            raise RuntimeError(f"'{variant.name}' needs glibc and none of its MALLOC_ variables set")
        self.network = case.network()
        set_recomputation(self.network, variant.recompute)
        for module in self.network.modules():
            if isinstance(module, UpsamplingLevel):
                module.merge = None if variant.merge else False
        self.dense = case.dense(self.network, variant) if variant.dense or variant.unmasked else None
        # with the loss outside, as nnU-Net compiles
        self.whole = self.network if self.dense is None else self.dense
        if variant.compiled and not case.encoder_only:
            self.whole.compile(backend=variant.backend)
        self.image, self.visible, self.num_visible = case.batch(self.network)
        self.mask = None if variant.unmasked else self.visible
        if variant.channels_last:
            self.network.to(memory_format=torch.channels_last_3d)
            self.image = self.image.contiguous(memory_format=torch.channels_last_3d)
        self.compute = self._encode if case.encoder_only else self._loss
        if variant.compiled and case.encoder_only:
            self.compute = torch.compile(self.compute, backend=variant.backend)

    def _autocast(self) -> Any:
        named = self.variant.autocast
        dtype = autocast_dtype(self.device) if named == "training" else getattr(torch, named, None)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _encode(self) -> Tensor:
        """Sum of the squared features: hidden ones are zero where they are stored at all."""
        with self._autocast():
            if self.dense is not None:
                features = self.dense.features(self.image, self.mask)
            else:
                found = self.network.encoder.features(self.image, self.visible, self.num_visible)
                features = [feature.field for feature in found]
        return sum((f.float().square().sum() for f in features), self.image.new_zeros(()))

    def _loss(self) -> Tensor:
        with self._autocast():
            if self.dense is not None:
                reconstruction = self.dense(self.image, self.mask)
            else:
                reconstruction = self.network(self.image, self.visible, self.num_visible)
        return reconstruction_loss(reconstruction, self.image, self.visible)

    def run(self) -> Phases:
        """Seconds of both passes, and the loss."""
        gc.collect()
        self.network.zero_grad(set_to_none=True)
        begin = now(self.device)
        loss = self.compute()
        middle = now(self.device)
        loss.backward()
        end = now(self.device)
        return {"forward": middle - begin, "backward": end - middle, "loss": loss.item()}

    def gradient(self) -> Tensor:
        """Of all parameters of the last run, as one vector."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.network.parameters()]
        return torch.cat([gradient.flatten() for gradient in gradients]).cpu()

    def operations(self) -> int:
        """Floating-point operations of a forward and backward pass."""
        with FlopCounterMode(display=False) as counter:
            self.run()
        return counter.get_total_flops()


class Worker:
    """A variant in a process of its own, run when asked."""

    def __init__(self, case: Case, variant: Variant) -> None:
        context = multiprocessing.get_context("spawn")
        self.variant = variant
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(case, variant, other), daemon=True)
        self.process.start()
        other.close()

    def ask(self, what: str) -> Any:
        """The answer to "run", "peak", "operations" or "gradient"."""
        try:
            self.connection.send(what)
            return self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RuntimeError(f"the process of '{self.variant.name}' ended (out of memory?)") from None

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def _run_and_release(step: Step) -> Phases:
    """The second of two runs, with the memory that the first one left; then gives it back to the system.

    If all of them kept their memory, that of SparK's five variants would exceed 24 GB.
    """
    step.run()
    found = step.run()
    gc.collect()
    release_freed_memory()
    return found


def _serve(case: Case, variant: Variant, connection: Any) -> None:
    step = Step(case, variant)
    peak = PeakMemory(step.device)
    run = partial(_run_and_release, step) if variant.keep_memory else step.run
    answers = {"run": run, "peak": peak.bytes, "operations": step.operations, "gradient": step.gradient}
    while True:
        answer = answers[connection.recv()]()
        # tensors by value: shared memory would outlive the process in no useful way
        connection.send(answer.numpy() if isinstance(answer, Tensor) else answer)
