"""Pieces on their way to a device, with one that does everything as late as it may."""

import threading

import pytest
import torch
from trackstar.scoring import scan

from trackstar_kernels.scoring._staging import CudaLink, staged

DEVICE = torch.device("cpu")


class LateEvent:
    """Happens when it is waited for: only then is what it was promised after done."""

    def __init__(self):
        self.promise = lambda: None

    def synchronize(self):
        self.promise()


class LateStream:
    """Work in order, none of which is done before something waits for it."""

    def __init__(self):
        self.work = []

    def queue(self, work):
        self.work.append(work)

    def so_far(self):
        """A promise to have done what has been queued until now."""
        until = self.work[-1] if self.work else None

        def keep():
            while until in self.work:
                self.work.pop(0)()

        return keep


class LateLink:
    """Copies and uses are done when something waits for them, and not before.

    So whoever writes a buffer without waiting finds that what was there before is copied, or used, after that.
    """

    def __init__(self):
        self.copies, self.uses = LateStream(), LateStream()
        self.lock = threading.RLock()

    def pinned(self, size):
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    room = pinned

    def event(self):
        return LateEvent()

    def copy(self, to, source, after, then):
        with self.lock:
            self.copies.queue(self.locked(after.promise))
            self.copies.queue(lambda: to.copy_(source))
            then.promise = self.locked(self.copies.so_far())

    def wait(self, event):
        self.use(event.promise)

    def use(self, work):
        with self.lock:
            self.uses.queue(lambda: work())

    def mark(self, event):
        with self.lock:
            event.promise = self.locked(self.uses.so_far())

    def locked(self, promise):
        def keep():
            with self.lock:
                promise()

        return keep


def pieces(sizes):
    """Strided rows, some numbers of another kind, and something that is missing now and then."""
    for i, n in enumerate(sizes):
        values = torch.arange(n * 14, dtype=torch.float16).view(n, 2, 7) + 100 * i
        yield values[:, :, :5], None if i % 3 == 1 else torch.full((n,), float(i)), torch.tensor([i])


SIZES = [3, 3, 5, 1, 8, 8, 2, 13]


def received(link):
    found = []
    for tensors in staged(pieces(SIZES), DEVICE, link=link):
        link.use(lambda tensors=tensors: found.append([None if t is None else t.clone() for t in tensors]))
    link.uses.so_far()()
    return found


def same(found, wanted):
    return len(found) == len(wanted) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for got, expected in zip(found, wanted, strict=True)
        for a, b in zip(got, expected, strict=True)
    )


def test_every_piece_arrives():
    assert same(received(LateLink()), list(pieces(SIZES)))


class WithoutWaiting(LateLink):
    """Work begins before the copy has ended."""

    def wait(self, event):
        pass


class WithoutUse(LateLink):
    """Copies begin before the last piece has been used."""

    def copy(self, to, source, after, then):
        super().copy(to, source, LateEvent(), then)


class WithoutCopied(LateLink):
    """Pinned memory is written before the last copy from it has ended."""

    def copy(self, to, source, after, then):
        super().copy(to, source, after, then)
        then.synchronize = lambda: None


@pytest.mark.parametrize("link", [WithoutWaiting, WithoutUse, WithoutCopied])
def test_what_a_missing_wait_does(link):
    """The device above shows it."""
    assert not same(received(link()), list(pieces(SIZES)))


def test_the_next_piece_is_read_meanwhile():
    asked = []

    def watched():
        for piece in pieces(SIZES):
            asked.append(threading.current_thread())
            yield piece

    link = LateLink()
    staging = staged(watched(), DEVICE, link=link)
    next(staging)
    for _ in range(1000):
        if len(asked) == 2:
            break
        threading.Event().wait(0.01)
    assert len(asked) == 2 and threading.current_thread() not in asked
    staging.close()
    assert threading.active_count() == 1 or "trackstar-stage" not in str(threading.enumerate())


def test_errors_of_the_source_arrive():
    def broken():
        yield from pieces([2])
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(staged(broken(), DEVICE, link=LateLink()))


def test_nothing_to_stage():
    assert list(staged([], DEVICE, link=LateLink())) == []


class PromptLink(LateLink):
    """Everything is done at once."""

    def copy(self, to, source, after, then):
        to.copy_(source)


def test_a_scan_gets_its_pieces(monkeypatch):
    """What the engine makes of them on a device is what it has on the CPU."""
    wanted = [scan.Piece.__new__(scan.Piece) for _ in SIZES]
    for piece, (codes, scales, norms) in zip(wanted, pieces(SIZES), strict=True):
        piece.rows, piece.codes, piece.scales, piece.squared_norms = (
            torch.arange(len(codes)),
            codes,
            scales,
            norms,
        )
    monkeypatch.setattr(scan, "staged", lambda tensors, device: staged(tensors, device, link=PromptLink()))
    found = [
        (piece.rows, *(t if t is None else t.clone() for t in tensors))
        for piece, *tensors in scan._on_device(wanted, torch.device("cuda"))
    ]
    on_cpu = [(piece.rows, *tensors) for piece, *tensors in scan._on_device(wanted, torch.device("cpu"))]
    assert same(found, on_cpu)


@pytest.mark.gpu
def test_on_a_device():
    device = torch.device("cuda")
    sizes = [1000, 3000, 500, 4000, 4000, 10]
    found = [
        [None if t is None else t.clone().cpu() for t in tensors] for tensors in staged(pieces(sizes), device)
    ]
    assert same(found, list(pieces(sizes)))
    assert CudaLink(device).pinned(8).is_pinned()
