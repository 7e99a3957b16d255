"""The ranks of a run: one process for each device, started by torchrun, on top of torch.distributed alone.

Outside of torchrun there is one rank, and nothing here communicates. No state is kept but that of torch.distributed,
the default process group, and whether this rank works `alone`. Tensors on the host travel by gloo, those on a GPU by
NCCL.

Blocking collectives have no timeout of their own, since ranks wait for one another as long as a fit takes. A rank that
ends closes its connections, and the launcher ends the others (`launch`, torchrun).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from flatquant.errors import RankError, one_line

_NEVER = timedelta(days=30)
_NOTE = "note"  # the entry of a message that holds its JSON
_foreach_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
_BUCKET = 1 << 25  # elements that are summed over ranks at a time
_GRACE = 30.0  # seconds in which a launcher is expected to end a rank that has lost another
_KEPT = "what is done is kept; repeat the command to go on, quantize with --resume"

_alone = False  # of the process, not of a thread: backward passes on a GPU run in threads of their own

Message = tuple[Mapping[str, Tensor], Any]


def launched() -> bool:
    """Whether torchrun has started this process as one of several ranks."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Number of this process among all ranks; 0 without others, or `alone`."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def size() -> int:
    """Number of ranks; 1 while this one works `alone`."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def leads() -> bool:
    """Whether this is the rank that reads text, writes files and speaks."""
    return rank() == 0


def local_rank() -> int | None:
    """Number of this process on its host, which is that of its GPU; None without other ranks."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else None


def local_size() -> int:
    """Number of ranks on this host, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1


def share(count: int) -> range:
    """This rank's part of so many things in a row."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


def turns(count: int) -> Iterator[int]:
    """This rank's of so many jobs: the next that no rank has begun, whenever this one asks. Every rank calls it.

    Raises:
        RankError: a rank has ended.
    """
    if size() == 1:
        yield from range(count)
        return
    counter = broadcast(({}, f"turns {secrets.token_hex(8)}"))[1]
    store = dist.distributed_c10d._get_default_store()
    while True:
        with _reaching():
            turn = store.add(counter, 1) - 1
        if turn >= count:
            return
        yield turn


@contextmanager
def alone() -> Iterator[None]:
    """Compute as one rank of one: nothing in the body communicates. The device and its part of memory stay."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the ranks that torchrun has started, if it has and nobody else did.

    After an error the process group is left as it is: the others may wait for this rank, and see it end.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    with _reaching():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_NEVER)
    yield
    dist.destroy_process_group()


def broadcast(message: Message | None, source: int = 0) -> tuple[dict[str, Tensor], Any]:
    """Tensors and a JSON note of one rank, on all. Every rank calls it; what others than the source give is ignored.

    Returns:
        On the source what it gave, elsewhere tensors on the host.

    Raises:
        RankError: a rank has ended.
    """
    if rank() == source:
        assert message is not None
        tensors, note = message
        if size() > 1:
            _send(tensors, note, source)
        return dict(tensors), note
    length = torch.zeros(1, dtype=torch.int64)
    with _reaching():
        dist.broadcast(length, source)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, source)
    found = load(data.numpy().tobytes())
    return found, json.loads(found.pop(_NOTE).numpy().tobytes())


def gathered(values: Sequence[Any]) -> list[Any]:
    """JSON values of all ranks, the first rank's first, on every rank.

    Raises:
        RankError: a rank has ended.
    """
    return [value for source in range(size()) for value in broadcast(({}, list(values)), source)[1]]


def _send(tensors: Mapping[str, Tensor], note: Any, source: int) -> None:
    """The source's side of `broadcast`. Safetensors holds no code, as a pickle does."""
    assert _NOTE not in tensors
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    stored[_NOTE] = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
    data = torch.frombuffer(bytearray(save(stored)), dtype=torch.uint8)
    with _reaching():
        dist.broadcast(torch.tensor([len(data)]), source)
        dist.broadcast(data, source)


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Add up the gradients of all ranks, in place, and a loss, a scalar, which is returned.

    A parameter has no gradient afterwards if it had none on any rank. All ranks end with the same bits.

    Raises:
        RankError: a rank has ended.
    """
    if size() == 1:
        return loss
    absent = [i for i, p in enumerate(parameters) if p.grad is None]
    present = torch.ones(len(parameters), device=loss.device)
    present[absent] = 0.0
    for i in absent:
        parameters[i].grad = torch.zeros_like(parameters[i])
    loss = loss.clone()
    _sum([loss, present, *(p.grad for p in parameters if p.grad is not None)])
    for i in absent:
        if not bool(present[i]):
            parameters[i].grad = None
    return loss


def summed(tensor: Tensor) -> Tensor:
    """The sum over ranks, in float32 if there are several; the same bits on all. Every rank calls it.

    Raises:
        RankError: a rank has ended.
    """
    if size() == 1:
        return tensor
    total = tensor.float().contiguous()
    with _reaching():
        dist.all_reduce(total)
    return total


def _sum(tensors: Sequence[Tensor]) -> None:
    """Sums over ranks, in place; small tensors together."""
    for bucket in _buckets(tensors):
        flat = torch.cat([t.flatten() for t in bucket])
        with _reaching():
            dist.all_reduce(flat)
        totals = flat.split([t.numel() for t in bucket])
        _foreach_copy(bucket, [total.view_as(t) for t, total in zip(bucket, totals, strict=True)])


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype that follow one another, each time until they have `_BUCKET` elements."""
    for _, alike in groupby(tensors, key=lambda t: t.dtype):
        bucket: list[Tensor] = []
        elements = 0
        for tensor in alike:
            bucket.append(tensor)
            elements += tensor.numel()
            if elements >= _BUCKET:
                yield bucket
                bucket, elements = [], 0
        if bucket:
            yield bucket


@contextmanager
def _reaching(concerns: Callable[[RuntimeError], bool] = lambda error: True) -> Iterator[None]:
    """Say of a failed connection what it means, and leave errors alone that do not concern one."""
    try:
        yield
    except RuntimeError as error:
        if not concerns(error):
            raise
        raise RankError(f"another rank has ended ({one_line(error)}); {_KEPT}") from error


def reaching_in_passes() -> AbstractContextManager[None]:
    """Likewise of connections that torch uses inside of forward and backward passes, among other errors of these."""
    return _reaching(lambda e: size() > 1 and (isinstance(e, dist.DistError) or "gloo/transport" in str(e)))


# ---------------------------------------------------------------------------------------------- command line


def speaks() -> bool:
    """Whether this rank is to say why the run fails: the first to ask. Before ranks are joined, all fail alike."""
    if size() == 1:
        return not launched() or os.environ["RANK"] == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # whoever kept the store has ended: nobody else is left to ask
        return True


def await_end() -> None:
    """Give the launcher time to end this rank, which has lost another: the other is the one to be named."""
    time.sleep(_GRACE)


def launch(ranks: int, module: str, arguments: Sequence[str]) -> int:
    """Run a Python module in so many processes of this host, as `torchrun --standalone` does.

    Returns:
        0, or the exit code of the rank that failed first, which has said why.

    Raises:
        RankError: a rank was killed.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the account below takes its place
    try:
        run(parse_args(["--standalone", f"--nproc-per-node={ranks}", "--module", module, *arguments]))
    except SignalException as error:  # the ranks got the signal too, and one of them has said so
        return 128 + error.sigval
    except ChildFailedError as error:
        codes = {r: failure.exitcode for r, failure in error.failures.items()}
        first = min(codes, key=lambda r: (codes[r] == -signal.SIGTERM, r))  # by which the others were ended
        code = codes[first]
        if code < 0:
            raise RankError(
                f"rank {first} was ended by {signal.Signals(-code).name}"
                f"{' (out of memory?)' if code == -signal.SIGKILL else ''}; {_KEPT}"
            ) from None
        return code
    return 0
