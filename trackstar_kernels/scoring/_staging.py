"""Bringing rows to a device while those before them are scored."""

from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

ALIGNMENT = 256
"""Every tensor of a piece begins at a multiple of so many bytes of the buffer."""

Tensors = tuple[Any, ...]
"""Tensors, and None where there is none."""


class Link(Protocol):
    """A way to a device: a stream of copies, beside the stream of what is done with them."""

    def pinned(self, size: int) -> torch.Tensor:
        """Bytes that the device can read by itself."""

    def room(self, size: int) -> torch.Tensor:
        """Bytes of the device's."""

    def event(self) -> torch.cuda.Event:
        """Something that has not happened and is not waited for until it is promised."""

    def copy(
        self, to: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event, then: torch.cuda.Event
    ) -> None:
        """Queue a copy that begins after one event and ends with another."""

    def wait(self, event: torch.cuda.Event) -> None:
        """Let nothing that is queued from now on begin before the event."""

    def mark(self, event: torch.cuda.Event) -> None:
        """Let the event happen when everything is done that has been queued until now."""


class CudaLink:
    """The way to a CUDA device, for work on the stream that is current now."""

    def __init__(self, device: torch.device) -> None:
        self.copies = torch.cuda.Stream(device)
        self.uses = torch.cuda.current_stream(device)

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def room(self, size: int) -> torch.Tensor:
        # Memory that other streams may still be reading is not to be had this way, nor is this one given to others
        # while it is read.
        with torch.cuda.stream(self.copies):
            room = torch.empty(size, dtype=torch.uint8, device=self.copies.device)
        room.record_stream(self.uses)
        return room

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def copy(
        self, to: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event, then: torch.cuda.Event
    ) -> None:
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(after)
            to.copy_(source, non_blocking=True)
            then.record(self.copies)

    def wait(self, event: torch.cuda.Event) -> None:
        self.uses.wait_event(event)

    def mark(self, event: torch.cuda.Event) -> None:
        event.record(self.uses)


class _Buffer:
    """Room for a piece on both sides, and what must have happened before it is written again."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.here, self.there = link.pinned(0), link.room(0)
        self.copied, self.used = link.event(), link.event()

    def load(self, piece: Sequence[torch.Tensor | None]) -> Tensors:
        """Queue the piece's copy; returns where it will be."""
        self.copied.synchronize()  # the copy of the piece before
        starts, size = [], 0
        for tensor in piece:
            starts.append(size)
            size += 0 if tensor is None else -(-tensor.numel() * tensor.itemsize // ALIGNMENT) * ALIGNMENT
        if size > len(self.here):
            self.used.synchronize()
            self.here, self.there = self.link.pinned(size), self.link.room(size)
        for tensor, view in zip(piece, _views(self.here, piece, starts), strict=True):
            if tensor is not None and view is not None:
                view.copy_(tensor)
        self.link.copy(self.there[:size], self.here[:size], after=self.used, then=self.copied)
        return _views(self.there, piece, starts)


def _views(buffer: torch.Tensor, piece: Sequence[torch.Tensor | None], starts: Sequence[int]) -> Tensors:
    """The parts of a buffer of bytes that are for the tensors of a piece."""
    return tuple(
        None
        if tensor is None
        else buffer[start : start + tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(piece, starts, strict=True)
    )


def staged(
    pieces: Iterable[Sequence[torch.Tensor | None]], device: torch.device, *, link: Link | None = None
) -> Generator[Tensors]:
    """Pieces of a store on a CUDA device, one after the other, so that it may be larger than the device's memory.

    While a piece is scored, a thread copies the next one to pinned memory, from where the device fetches it; there
    are two buffers on both sides, each as large as the largest piece so far. So a scan takes as long as the slowest
    of reading, copying and scoring.

    Args:
        pieces: CPU tensors of any kinds and shapes; None stands for one that is not there. The next piece is asked
            for, in that thread, while the last one is in use.
        device: where they go.
        link: the way there, if not CUDA's.

    Yields:
        The piece's tensors on the device, dense. Work on them may be queued until the next piece is asked for, on
        the stream that was current when the first one was.
    """
    link = CudaLink(device) if link is None else link
    coming, buffers = iter(pieces), [_Buffer(link), _Buffer(link)]

    def load(buffer: _Buffer) -> Tensors | None:
        piece = next(coming, None)
        return None if piece is None else buffer.load(piece)

    with ThreadPoolExecutor(1, "trackstar-stage") as loader:
        loading = loader.submit(load, buffers[0])
        while (tensors := loading.result()) is not None:
            buffer = buffers[0]
            buffers.reverse()
            loading = loader.submit(load, buffers[0])
            link.wait(buffer.copied)
            yield tensors
            link.mark(buffer.used)
