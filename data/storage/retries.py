"""How often a read is tried again, and how long it waits: the same for a server and for a disk on the network."""

import random
import time

# Tries in a row that bring no byte before a read fails. The waits between them double, in seconds: a minute in all.
MAX_TRIES, FIRST_WAIT, LONGEST_WAIT = 8, 0.5, 30.0


def wait(failures: int) -> None:
    """Wait before the next try, after so many failures in a row; a random share is left out, so that ranks disperse."""
    time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1))
