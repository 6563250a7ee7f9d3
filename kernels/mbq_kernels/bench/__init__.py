"""One benchmark of every low-bit linear of this project against what others offer, on one GPU, in one run."""
