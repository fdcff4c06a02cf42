"""Times of things done in turn, in one process, so that what else runs hits all alike."""
import statistics
import time

import torch

CLOCKS = dict(wall=time.perf_counter, cpu=time.process_time)


class Stopwatch:
    """Seconds by name.

    Args:
        clock (str): 'wall', or 'cpu' where other jobs share the machine (one thread, no GPU).
        device (torch.device): is waited for.
    """

    def __init__(self, clock='wall', device='cpu'):
        self.now, self.device = CLOCKS[clock], torch.device(device)
        self.seconds = {}

    def read(self):
        """The clock, once the device is done."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return self.now()

    def time(self, name, function):
        """Call `function`, and note how long it took."""
        began = self.read()
        result = function()
        self.note(name, self.read() - began)
        return result

    def note(self, name, seconds):
        """Add one measurement."""
        self.seconds.setdefault(name, []).append(seconds)

    def median(self, name, skip=3):
        """Median, the first `skip` measurements left out."""
        return statistics.median(self.seconds[name][skip:])

    def ratio(self, name, other, skip=3):
        """Median of the ratios of measurements made in turn."""
        pairs = zip(self.seconds[name][skip:], self.seconds[other][skip:])
        return statistics.median(a / b for a, b in pairs)
