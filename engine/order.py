"""The order of the images: which rows of the training set a step has, and which of them are mirrored.

A shuffle that is never stored: a keyed bijection of 0 … N − 1 gives the row at any position of an epoch on its own, so
a rank holds neither a permutation of 500 million images nor draws one at each epoch, and a resumed run starts anywhere.
"""

import numpy as np

# Named in every checkpoint: another way to draw the order gets another name, and runs are not resumed across it.
ORDER = "feistel 8"
ROUNDS = 8


class Shuffle:
    """The images of one epoch: `rows(positions)`, a permutation of 0 … size − 1, and `mirrored(positions)`.

    A Feistel network on pairs (a, b) with a·b just above size: each round adds to one half, modulo its range, a hash of
    the other half and of the round's key, which can be undone; what falls beyond `size` is sent through again. seed and
    epoch make the keys; the number of ranks and batch_size play no part.
    """

    def __init__(self, size, seed, epoch):
        self.size = size
        high = int(np.ceil(np.sqrt(size)))
        self.ranges = np.uint64(high), np.uint64(-(-size // high))
        self.keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS + 1, np.uint64)

    def rows(self, positions):
        """int64 [n]: the row at each of the positions int [n]."""
        rows = self._permute(np.asarray(positions).astype(np.uint64))
        while len(beyond := np.flatnonzero(rows >= self.size)):
            rows[beyond] = self._permute(rows[beyond])
        return rows.astype(np.int64)

    def mirrored(self, positions):
        """bool [n]: whether the image at each position is mirrored."""
        return (_hash(np.asarray(positions).astype(np.uint64) ^ self.keys[-1]) >> np.uint64(63)).astype(bool)

    def _permute(self, values):
        halves = [values // self.ranges[1], values % self.ranges[1]]
        for number, key in enumerate(self.keys[:-1]):
            this, other = number % 2, 1 - number % 2
            halves[this] = (halves[this] + _hash(halves[other] ^ key) % self.ranges[this]) % self.ranges[this]
        return halves[0] * self.ranges[1] + halves[1]


def _hash(values):
    """The finaliser of SplitMix64: each input bit changes about half of the output's, uint64 [n]."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class ShuffledRows:
    """A rank's rows in each step of an epoch, and which of them are mirrored: yields `(rows, mirrored)`."""

    def __init__(self, num_image, batch_size, seed, rank, world_size):
        self.num_image, self.batch_size, self.seed = num_image, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start_step = 0

    def __len__(self):
        return self.num_image // (self.batch_size * self.world_size)

    def __iter__(self):
        shuffle = Shuffle(self.num_image, self.seed, self.epoch)
        for step in range(self.start_step, len(self)):
            first = (step * self.world_size + self.rank) * self.batch_size
            positions = np.arange(first, first + self.batch_size)
            yield shuffle.rows(positions), shuffle.mirrored(positions)


class RowsInOrder:
    """The rows `start` ... `stop` − 1, none mirrored."""

    def __init__(self, batch_size, start, stop):
        self.batch_size, self.start, self.stop = batch_size, start, stop

    def __len__(self):
        return -(-(self.stop - self.start) // self.batch_size)

    def __iter__(self):
        for first in range(self.start, self.stop, self.batch_size):
            yield np.arange(first, min(first + self.batch_size, self.stop)), np.zeros(0, bool)
