"""Random numbers, threads, buffers, interrupts and cache locations, used by every other layer."""
