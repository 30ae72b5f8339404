"""The trained parameters over several workers, and a step's gradients from micro-batches.

FSDP2 with a worker a GPU (arXiv 2304.11277), also where there is one: the same code, and float32
master weights beside the bfloat16 that computes. In bfloat16 alone a weight would not move: at
a learning rate of 1e-5 an update is far below its last bit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from omnisift.training.pruned_loss import LaidExample, PrunedLoss
from omnisift.training.state import world


def shard(loss: PrunedLoss) -> None:
    """Make float32 master weights and spread them over the workers of the process group.

    The LLM computes in the type it was loaded in. The selector is small and decides what is
    kept: every worker has all of it, in float32 throughout.
    """
    mesh = init_device_mesh(loss.backbone.device.type, (world()[1],))
    policy = MixedPrecisionPolicy(param_dtype=loss.backbone.dtype, reduce_dtype=torch.float32)
    for layer in loss.language_model.layers:
        # One by one: only a layer is ever whole in float32.
        fully_shard(layer.float(), mesh=mesh, mp_policy=policy)
    loss.language_model.float()
    loss.lm_head.float()
    # A batch is media, not activations: sound in bfloat16 would be noisy before it is heard.
    fully_shard(
        loss,
        mesh=mesh,
        mp_policy=replace(policy, cast_forward_inputs=False),
        ignored_params=set(loss.selector.float().parameters()),
    )


def gather_gradients(
    loss: PrunedLoss, micro_batches: Iterable[Sequence[LaidExample]], *, selecting: bool = False
) -> dict[str, Tensor]:
    """Leave the gradients of a whole batch in the parameters; return its metrics.

    The loss is the mean over all answer tokens of the batch, wherever they are: on other workers,
    or in other micro-batches, of which every worker must bring equally many. With `selecting` only
    the selector gets gradients, of two selections of each example.
    """
    sums = torch.zeros(4, device=loss.backbone.device, dtype=torch.float64)
    for batch in micro_batches:
        part = loss(batch, selecting=selecting)
        part.loss.backward()
        counts = torch.tensor([part.num_answer, part.num_tokens], dtype=torch.float64)
        values = torch.stack([part.loss.detach().double(), part.correct.double()])
        sums += torch.cat([values, counts.to(sums.device, non_blocking=True)])
    _, workers = world()
    for parameter in loss.selector.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:  # a batch without sound
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    dist.all_reduce(sums)
    loss_sum, correct, num_answer, num_tokens = sums
    learned = num_answer.clamp(min=1)  # a batch of which nothing could be read changes nothing
    for parameter in loss.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):  # the mean over the workers
            gradient.to_local().mul_(workers / learned)
        elif gradient is not None:
            gradient.div_(learned)
    return {
        "loss": loss_sum / learned,
        "accuracy": correct / learned,
        "answer_tokens": num_answer,
        "llm_tokens": num_tokens,
    }
