"""The streams of a chain at the boundaries of units, and how each came to be."""
from .capture import advance


class Boundaries:
    """Streams by position in a chain, each with the path of positions it was run along.

    Storage in half precision rounds at every stop, and batches are laid out anew, so a
    stream that went 0 -> 2 -> 4 may differ in its last bits from one that went 0 -> 4.
    With its path a stream can be computed again to the same bytes, as long as the
    leaves before it stay as they are; `drop_after` forgets those that do not.

    Args:
        chain (Chain): what the streams run through.
        stream (Stream): at position 0.
        device (torch.device): where to compute.
        cache (FeatureCache | None): keeps the streams.
        at_once (int | None): images computed together at most.
    """

    def __init__(self, chain, stream, device, cache=None, at_once=None):
        self.chain, self.device = chain, device
        self.cache, self.at_once = cache, at_once
        self.streams, self.paths = {0: stream}, {0: ()}

    def at(self, position):
        """The stream at `position`, run on from the nearest boundary that is kept."""
        if position not in self.streams:
            nearest = max(b for b in self.streams if b < position)
            self.put(position, nearest, self._advance(self.streams[nearest], nearest, position))
        return self.streams[position]

    def put(self, position, start, stream):
        """Keep a stream that was run from the boundary `start` to `position`."""
        self.streams[position] = stream
        self.paths[position] = (*self.paths[start], position)

    def drop_after(self, position):
        """Forget all boundaries behind `position`: the leaves after it have changed."""
        self._keep(lambda b: b <= position)

    def keep_only(self, positions):
        """Forget all boundaries but these and 0, from which all can be run."""
        self._keep(lambda b: b == 0 or b in positions)

    def follow(self, paths):
        """Compute the streams again that had these paths.

        Args:
            paths (dict[int, tuple[int]]): `paths` of the boundaries to get back.
        """
        first = self.streams[0]
        self.streams, self.paths = {0: first}, {0: ()}
        self._follow((), first, {tuple(path): position for position, path in paths.items()})

    def _follow(self, path, stream, kept):
        """Walk the tree of paths; no more streams are held than it has open branches."""
        while True:
            if path and path in kept:
                self.streams[kept[path]], self.paths[kept[path]] = stream, path
            depth = len(path)
            steps = sorted({p[depth] for p in kept if len(p) > depth and p[:depth] == path})
            if not steps:
                return
            start = path[-1] if path else 0
            for step in steps[:-1]:
                self._follow((*path, step), self._advance(stream, start, step), kept)
            stream, path = self._advance(stream, start, steps[-1]), (*path, steps[-1])

    def _advance(self, stream, start, stop):
        return advance(
            self.chain, stream, start, stop, self.device, self.at_once, self.cache,
            sides=False)[0]

    def _keep(self, wanted):
        for boundary in [b for b in self.streams if not wanted(b)]:
            del self.streams[boundary], self.paths[boundary]
